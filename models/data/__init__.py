"""What a run reads: tasks and their files, the built-in docstring task, splits, tokens."""
