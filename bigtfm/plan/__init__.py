"""`bigtfm plan`: whether a job fits, how long a step takes, what the run costs."""
