"""Computes the FLOPs of sampler, scorer and update from their equations, for comparison with the compiled programs.

A product of `[m, k]` and `[k, n]` counts 2 m k n. Attention is bidirectional and counted in full. Elementwise work,
norms and softmaxes are not counted. All numbers are for the whole batch, over all chips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.denoiser.blocks import Grid, grid_of
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.blocks import step_limit


class Model(NamedTuple):
    """A denoiser with the rank and targets of its adapter. Rank 0 means no adapter: all parameters train."""

    config: DenoiserConfig
    rank: int
    targets: Sequence[str]

    def _matrices(self, leave_out: Sequence[str] = ()) -> float:
        """Computes the FLOPs per token of the layers' matrices, except those left out."""
        shapes = target_shapes(self.config)
        return 2 * self.config.num_layers * sum(i * o for name, (i, o) in shapes.items() if name not in leave_out)

    def _adapter(self, leave_out: Sequence[str] = ()) -> float:
        shapes = target_shapes(self.config)
        sides = sum(sum(shapes[name]) for name in self.targets if name not in leave_out)
        return 2 * self.config.num_layers * self.rank * sides

    def _attention(self, length: int) -> float:
        """Computes the FLOPs per token of the attention scores and of the weighted sums of values."""
        c = self.config
        return 4 * c.num_layers * length * c.num_heads * c.head_dim

    def forward(self, rows: int, length: int, *, window: int | None = None, adapter: bool = True) -> float:
        """Computes the layers' FLOPs on `[rows, length]` tokens, or on `window` tokens per row if others are cached."""
        per_token = self._matrices() + self._attention(length) + (self._adapter() if adapter else 0)
        return rows * (length if window is None else window) * per_token

    def recomputation(self, rows: int, length: int) -> float:
        """Computes the FLOPs that the backward pass repeats under the remat policy.

        "full" repeats the whole layer except its last product, the down projection, whose value no gradient needs;
        "dots" repeats only attention; "none" repeats nothing.
        """
        if self.config.remat == "none":
            return 0.0
        per_token = self._attention(length)
        if self.config.remat == "full":
            per_token += self._matrices(("down",)) + self._adapter(("down",))
            if "down" in self.targets:
                # The gradient of B needs the product with A.
                per_token += 2 * self.config.num_layers * self.rank * self.config.intermediate_size
        return rows * length * per_token

    def backward(self, rows: int, length: int) -> float:
        """Computes the FLOPs of the gradients of the activations and of the trained parameters."""
        trained = self._adapter() if self.rank else self._matrices()
        per_token = self._matrices() + 2 * self._attention(length) + trained + (self._adapter() if self.rank else 0)
        return rows * length * per_token

    def head(self, positions: int) -> float:
        """Computes the FLOPs of the logits over the whole vocabulary, at this many positions."""
        return 2 * positions * self.config.hidden_size * self.config.vocab_size


def sampler(model: Model, settings: SamplerConfig, rows: int, prompt_length: int) -> float:
    """Computes a rollout's FLOPs without a cache: each step runs all layers, and the head where it reads logits.

    A block-causal denoiser runs the prompt once, each step on one block, and each finished block once more.
    """
    passes, config = 2 if settings.cfg_scale > 0 else 1, model.config
    loops = sampler_loops(config, settings, prompt_length)
    if config.block_size is not None:
        grid = _grid(config, settings, prompt_length)
        # A block attends to the whole cache, masked, and to itself.
        block = model.forward(passes * rows, grid.width + grid.size, window=grid.size)
        steps = math.prod(loops)
        blocks = (steps + loops[0]) * block + steps * model.head(passes * rows * settings.block_length)
        return model.forward(passes * rows, grid.first) + blocks
    active_only = settings.forbid_mask and settings.blocks > 1
    read = settings.block_length if active_only else settings.completion_length
    length = prompt_length + settings.completion_length
    step = model.forward(passes * rows, length) + model.head(passes * rows * read)
    return settings.blocks * settings.steps_per_block * step


def exact(model: Model, settings: SamplerConfig, rows: int, prompt_length: int) -> float:
    """Computes the FLOPs of the exact log-probability of rollouts that take all their steps.

    Each step runs all layers, and the head on one block, once for the normaliser and once for the mass behind the ranks
    of what was committed. Cuts, and strategies that need more walks over the vocabulary, are not counted.
    """
    passes = 2 if settings.cfg_scale > 0 else 1
    step = model.forward(passes * rows, scored_columns(model.config, settings, prompt_length))
    step += 2 * model.head(passes * rows * settings.block_length)
    return step_limit(model.config, settings) * step


def scored_columns(config: DenoiserConfig, settings: SamplerConfig, prompt_length: int) -> int:
    """Returns the columns of a scoring pass; that of a block-causal model holds a noisy copy of the completion too."""
    if config.block_size is None:
        return prompt_length + settings.completion_length
    grid = _grid(config, settings, prompt_length)
    return 2 * grid.width - grid.first


def sampler_loops(config: DenoiserConfig, settings: SamplerConfig, prompt_length: int) -> tuple[int, ...]:
    """Returns the most passes of each of the sampler's loops, the outermost first; their product is the steps."""
    if config.block_size is None:
        return (settings.blocks * settings.steps_per_block,)
    grid = _grid(config, settings, prompt_length)
    steps = grid.size // settings.block_length * settings.steps_per_block
    return (grid.width - grid.first) // grid.size, steps


def _grid(config: DenoiserConfig, settings: SamplerConfig, prompt_length: int) -> Grid:
    return grid_of(config, prompt_length, settings.completion_length, jnp.ones((1, prompt_length), bool))


def walks_vocabulary(reads: Sequence) -> bool:
    """Returns whether these reads need every logit; "centred" does not, as it averages the head's rows first."""
    return any(read != "centred" for read in reads)


def score(model: Model, passes: int, reads: Sequence, positions: int, length: int, *, adapter: bool = True) -> float:
    """Computes the FLOPs of old or reference scores: `passes` rows of `length` columns, read at `positions` tokens."""
    head = model.head(positions) if walks_vocabulary(reads) else 0.0
    return model.forward(passes, length, adapter=adapter) + head


def gradient(model: Model, passes: int, reads: Sequence, positions: int, length: int) -> float:
    """Computes the FLOPs of one micro-batch of the update: forward, recomputation, backward and head.

    The head is always computed once, because the entropy needs it. With an adapter, the gradient of a log-normaliser
    costs one more product, and that of the k largest logits two more, because their chunks of the vocabulary are
    computed again. Without an adapter, both cost three more, including the gradient of the head itself.
    """
    layers = model.forward(passes, length) + model.recomputation(passes, length) + model.backward(passes, length)
    products = 1
    if walks_vocabulary(reads):
        recomputed = any(isinstance(read, tuple) for read in reads)
        products += (2 if recomputed else 1) if model.rank else 3
    return layers + products * model.head(positions)
