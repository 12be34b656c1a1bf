"""Switches XLA's optimisations: most tests run a program once or twice, so most of their time is compilation."""

import contextlib

import jax


@contextlib.contextmanager
def optimised(whether: bool):
    """Compiles programs inside this context with XLA's optimisations, or without most of them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not whether)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
