"""Records of runs: schema, files, lock, frame, code version, mirrors."""
