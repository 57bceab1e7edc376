"""Small tools for jaxprs, primitives, and the lines and blocks that equations come from.

Nothing here knows a block, a module or a predicate. Imports `_errors` and `_compat.jax`.
"""
