"""The tests: `support` and `compiled` hold what they stand on, then a folder for each wing."""
