"""The typed config tree: schema, checks, files."""
