"""Every rule of a run, checked before a weight is touched and before torch is imported; all problems in one error.

run.py is the entry: gather a run from a command line, and validate it. Every other file holds the rules of one subject
as generators of problems, each with field, value, rule and way out. What a single field may be is its type, in config.py.
"""
