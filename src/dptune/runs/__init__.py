"""A config becomes a plan, a trained adapter and a record."""
