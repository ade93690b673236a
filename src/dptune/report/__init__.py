"""Views of records: pure functions of a table, no torch."""
