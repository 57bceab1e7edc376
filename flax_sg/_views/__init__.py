"""One forward pass with several derivatives: `gradient_views`, and what it differentiates how.

Nothing here knows a library of modules. Imports `_transforms` and what that may import.
"""
