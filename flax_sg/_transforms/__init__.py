"""The transforms, and the blocks of a thread in which they are open.

Nothing here knows a library of modules: those enter themselves in `front_ends`. Imports `_filters`,
`_jax`, `_errors` and `_compat.jax`.
"""
