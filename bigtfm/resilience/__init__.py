"""What keeps a run alive, or ends it with one line: signals and numerics."""
