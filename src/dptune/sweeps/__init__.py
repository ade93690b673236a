"""Sweeps expanded to runs, and their state."""
