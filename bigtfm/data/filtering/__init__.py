"""What `bigtfm prepare --filters` leaves out of a data set, and why."""
