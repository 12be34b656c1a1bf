"""FLOPs of the matrix products of sampler, scorer and update, from their equations: what a compiled program is held to.

A product of `[m, k]` and `[k, n]` counts 2 m k n; attention is bidirectional and counted whole; elementwise work, norms
and softmaxes are not counted. All numbers are of the whole batch, over all chips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.diffusion import SamplerConfig


class Model(NamedTuple):
    """What is computed: the denoiser, and the rank and targets of its adapter (rank 0: none, all parameters train)."""

    config: DenoiserConfig
    rank: int
    targets: Sequence[str]

    def _matrices(self, leave_out: Sequence[str] = ()) -> float:
        """FLOPs per token of the layers' matrices."""
        shapes = target_shapes(self.config)
        return 2 * self.config.num_layers * sum(i * o for name, (i, o) in shapes.items() if name not in leave_out)

    def _adapter(self, leave_out: Sequence[str] = ()) -> float:
        shapes = target_shapes(self.config)
        sides = sum(sum(shapes[name]) for name in self.targets if name not in leave_out)
        return 2 * self.config.num_layers * self.rank * sides

    def _attention(self, length: int) -> float:
        """FLOPs per token of scores and mix."""
        c = self.config
        return 4 * c.num_layers * length * c.num_heads * c.head_dim

    def forward(self, rows: int, length: int, *, window: int | None = None, adapter: bool = True) -> float:
        """The layers on `[rows, length]` tokens, or on `window` tokens of each row under a cache of the others."""
        per_token = self._matrices() + self._attention(length) + (self._adapter() if adapter else 0)
        return rows * (length if window is None else window) * per_token

    def recomputation(self, rows: int, length: int) -> float:
        """What the backward pass computes again under the remat policy.

        "full" repeats the layer but for its last product, the down projection, whose value no gradient reads; "dots"
        repeats attention alone.
        """
        if self.config.remat == "none":
            return 0.0
        per_token = self._attention(length)
        if self.config.remat == "full":
            per_token += self._matrices(("down",)) + self._adapter(("down",))
            if "down" in self.targets:
                # The gradient of B reads the product with A.
                per_token += 2 * self.config.num_layers * self.rank * self.config.intermediate_size
        return rows * length * per_token

    def backward(self, rows: int, length: int) -> float:
        """Gradients of the activations, and of what is trained."""
        trained = self._adapter() if self.rank else self._matrices()
        per_token = self._matrices() + 2 * self._attention(length) + trained + (self._adapter() if self.rank else 0)
        return rows * length * per_token

    def head(self, positions: int) -> float:
        """Logits over the whole vocabulary."""
        return 2 * positions * self.config.hidden_size * self.config.vocab_size


def sampler(model: Model, settings: SamplerConfig, rows: int, prompt_length: int) -> float:
    """A whole rollout without a cache: every step a forward of everything, and the head where the step reads it."""
    active_only = settings.forbid_mask and settings.blocks > 1
    read = settings.block_length if active_only else settings.completion_length
    passes = 2 if settings.cfg_scale > 0 else 1
    length = prompt_length + settings.completion_length
    step = model.forward(passes * rows, length) + model.head(passes * rows * read)
    return settings.blocks * settings.steps_per_block * step


def walks_vocabulary(reads: Sequence) -> bool:
    """Whether these reads need every logit; "centred" takes the mean of the head's rows first."""
    return any(read != "centred" for read in reads)


def score(model: Model, passes: int, reads: Sequence, positions: int, length: int, *, adapter: bool = True) -> float:
    """Old or reference scores: `passes` rows of `length` tokens forward, `positions` tokens read."""
    head = model.head(positions) if walks_vocabulary(reads) else 0.0
    return model.forward(passes, length, adapter=adapter) + head


def gradient(model: Model, passes: int, reads: Sequence, positions: int, length: int) -> float:
    """One micro-batch of the update: forward, recomputation, backward, and the head, which entropy always reads.

    The gradient of a log-normaliser costs one more product, that of the k largest logits two: their chunks of the
    vocabulary are computed again, as they are for the gradient of the head itself.
    """
    layers = model.forward(passes, length) + model.recomputation(passes, length) + model.backward(passes, length)
    products = 1
    if walks_vocabulary(reads):
        recomputed = any(isinstance(read, tuple) for read in reads)
        products += (2 if recomputed else 1) if model.rank else 3
    return layers + products * model.head(positions)
