"""Are two runs the same, and if not, from which step on and why? Reads their files; imports no torch."""
