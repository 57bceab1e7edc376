"""Which variables: predicates, what they may know of a variable, and trees of variables by name.

No value is read or changed here, and nothing differentiated. Imports `_errors` alone.
"""
