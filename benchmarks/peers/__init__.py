"""What a user would run instead of bigtfm, each by its own package and in a process of its own."""
