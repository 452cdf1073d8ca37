"""What a run leaves: its directory, checkpoints, digests of what it read, result, and plots."""
