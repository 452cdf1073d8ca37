"""The rows that a run reads: tasks and their files, the built-in docstring task, splits, tokens.

Rule: this wing knows no model, no method and no flags; a tokenizer is all that it is given.
"""
