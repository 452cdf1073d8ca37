"""The model of a run: loaded with a head for the task, and made ready to train by a method.

Start with `loading` and `attach`; `head`, `houlsby` and `adaptive` are what they call.
"""
