"""gradient_flow: where gradients get to and where they end, read off a traced program.

Knows jaxprs, and no module. Imports `_views`, `_filters`, `_jax`, `_errors` and `_compat.jax`.
"""
