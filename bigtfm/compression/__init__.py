"""`bigtfm compress`: a trained model made smaller or faster, and what that costs it."""
