"""Tasks beyond plain text, one file each: the data's format, predictions, and how good they are.

The loop knows none of them: a task is an objective, a head and marked data.
"""
