"""From files to batches: tokenizer, prepared token data sets, and the order in which they are read."""
