"""`bigtfm doctor`: what is wrong with this machine, or what stopped a run, and what to do."""
