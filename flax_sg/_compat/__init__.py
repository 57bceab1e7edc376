"""Private names of JAX (`jax`) and of Flax Linen (`linen`), each with the reason for it; and taps.

Nothing else in the package imports a private name. Imports nothing of it; `linen` may use `jax`.
"""
