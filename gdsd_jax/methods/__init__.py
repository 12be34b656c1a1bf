"""The loss library. A method is one small value in one dictionary, `METHODS`.

Read `method` (the contract) first, then `gdsd` (an example); `common` has the pieces that several equations share.
"""

from gdsd_jax.methods.contract import check
from gdsd_jax.methods.method import Batch, Method, Scores
from gdsd_jax.methods.on_views import loss_on_views
from gdsd_jax.methods.registry import METHODS, Recipe, build

__all__ = ["METHODS", "Batch", "Method", "Recipe", "Scores", "build", "check", "loss_on_views"]
