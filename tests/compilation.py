"""How hard XLA tries: most tests run a program once or twice, so that compiling it is what costs."""

import contextlib

import jax


@contextlib.contextmanager
def optimised(whether: bool):
    """Compiles what is called inside with XLA's optimisations, or without most of them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not whether)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
