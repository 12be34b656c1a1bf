"""Chooses the sizes that a config leaves open by the memory of a device.

These are the rows of a part of a rollout and of a micro-batch, and the activations that the backward pass recomputes.
The memory of one device is estimated from the shapes of its arrays, with factors that keep the estimate closely above
the TPU compiler's own figures for all planned rows (docs/pods_plan.json); `gdsd_jax.plan` asks the compiler itself. The
fastest choice that fits is taken: first the backward pass that recomputes least, then the largest micro-batch, up to
the size from which products take the time and not the reading of weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.denoiser import DenoiserConfig, attention
from gdsd_jax.denoiser.lora import target_shapes
from gdsd_jax.denoiser.prepared import SHARE
from gdsd_jax.diffusion.proposals import slices_of
from gdsd_jax.methods import Batch, Method
from gdsd_jax.runtime import memory
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import AXES, make_mesh
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.setup import dimensions, require_room, spread_rows, with_compute

# Share of the memory that estimates may fill; the rest is for fragmentation and for what they neglect.
FILL = 0.85
# Tokens per device from which a pass is bound by its products on all accelerators whose figures we know.
ENOUGH_TOKENS = 8192
# Fitted to the table of plans (docs/pods_plan.json), as the factors below are: copies of a step's logits, without and
# with top-p or top-k; of all keys and values; and of the head, where it is gathered over many devices.
LOGITS, CUT_LOGITS, CACHES, HEADS_OF_MANY, MANY = 3.2, 5.0, 1.9, 2.53, 32
# What the backward pass keeps of a layer: copies of its input, and of the outputs of its products.
KEPT, KEPT_OUTPUTS = 1.65, 1.2
# From the fastest to the one that needs the least memory.
POLICIES = ("none", "dots", "full")


class Place(NamedTuple):
    """A device and its mesh.

    memory: bytes of the device's memory.
    data, fsdp, tensor: devices along each axis of the mesh.
    kernel: whether attention is a fused kernel, which never holds a matrix of scores.
    apart: whether a rollout under a cache unstacks the layers if a copy of them fits, see `denoiser.prepared`.
    """

    memory: int
    data: int
    fsdp: int
    tensor: int
    kernel: bool
    apart: bool = False

    @property
    def rows(self) -> int:
        """Returns the number of devices over which rows are spread."""
        return self.data * self.fsdp


class Sizes(NamedTuple):
    """Estimates the memory of a run, in bytes of one device.

    model: the denoiser's sizes.
    views: forward passes of the method for each row of an update.
    """

    config: TrainConfig
    model: DenoiserConfig
    views: int
    place: Place

    @property
    def _width(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def _tokens(self) -> int:
        return max(self.config.prompt_buckets) + self.config.sampler.completion_length

    @property
    def _layer(self) -> int:
        """Returns the number of parameters in the matrices of one layer."""
        return sum(i * o for i, o in target_shapes(self.model).values())

    @property
    def _stored(self) -> int:
        """Returns the bytes per entry of a layer's matrices."""
        return 1 if self.config.model.weights == "int8" else self._width

    @property
    def _trained(self) -> float:
        """Returns the number of trained parameters of one device."""
        m, c, targets = self.model, self.config, target_shapes(self.model)
        if c.lora.rank:
            trained = m.num_layers * c.lora.rank * sum(sum(targets[name]) for name in c.lora.targets)
        else:
            trained = m.num_layers * self._layer + self._tables
        return trained / (self.place.fsdp * self.place.tensor)

    @property
    def _tables(self) -> int:
        """Returns the number of parameters of embedding and head."""
        return self.model.vocab_size * self.model.hidden_size * (1 if self.model.tied_head else 2)

    @property
    def _rounded(self) -> float:
        """Returns the bytes of the trained parameters in the dtype of products, if there is no base beside them."""
        return 0 if self.config.lora.rank else self._width * self._trained

    def state(self) -> float:
        """Estimates the arrays that are always in memory: base, trained parameters and moments."""
        c, m = self.config, self.model
        base = m.num_layers * self._layer * self._stored + self._tables * self._width
        # Optimizers may tell parameters apart by their names and axes.
        matrix = {"layers": {"gate": {"weight": jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)}}}
        moments = jax.eval_shape(make_optimizer(c.optimizer, 1)[0].init, matrix)
        copies = sum(x.size for x in jax.tree.leaves(moments)) // 1024
        return base / (self.place.fsdp * self.place.tensor) + 4 * self._trained * (1 + copies)

    def _activations(self, tokens: float, *, hidden: float = 0, wide: float = 0, heads: float = 0) -> float:
        """Returns the bytes of multiples of arrays of model width, MLP width and the width of all heads and keys."""
        m, tensor = self.model, self.place.tensor
        cut = wide * m.intermediate_size + heads * (m.num_heads + m.num_kv_heads) * m.head_dim
        return tokens * self._width * (hidden * m.hidden_size + cut / tensor)

    def _scores(self, tokens: int, copies: int) -> float:
        """Returns the bytes of the matrices of attention scores of one row, where no kernel avoids them."""
        return 0 if self.place.kernel else copies * 4 * self.model.num_heads / self.place.tensor * tokens**2

    def _gathered(self) -> tuple[float, float]:
        """Estimates the matrices that are gathered, or widened from int8, for their products: of layers and head."""
        m, cut = self.model, self.place.fsdp > 1
        matrices = 2 * self._layer if cut else self._layer if self._stored == 1 else 0
        head = m.vocab_size * m.hidden_size if cut else 0
        return matrices * self._width / self.place.tensor, head * self._width / self.place.tensor

    def sampler(self, rows: int) -> float:
        """Estimates a rollout of `rows` rows, including the arrays that stay in memory."""
        m, s, tensor = self.model, self.config.sampler, self.place.tensor
        local, blocks = math.ceil(rows / self.place.rows) * (2 if s.cfg_scale > 0 else 1), m.block_size is not None
        # A pass of a block-causal model is a block long.
        layers, head = self._gathered()
        tokens = s.block_length if blocks else self._tokens
        layer = layers + local * (self._activations(tokens, hidden=2, wide=3) + self._scores(tokens, 2))
        # Hidden states of a step's positions in float32, and logits, which are cut into slices.
        positions = s.block_length if s.forbid_mask and s.blocks > 1 else s.completion_length
        logits = 4 * local * m.vocab_size * (positions // slices_of(positions, local * m.vocab_size)) / tensor
        drawn = head + (LOGITS if s.top_p is None and s.top_k is None else CUT_LOGITS) * logits
        drawn += 4 * 4 * local * positions * m.hidden_size + (layers if self._stored == 1 else 0)
        working = max(layer, drawn, HEADS_OF_MANY * head if self.place.fsdp > MANY else 0)
        if s.cache != "none" or blocks:
            cache = 2 * m.num_layers * self._tokens * m.num_kv_heads * m.head_dim * self._width / tensor
            working += CACHES * local * cache
        copied = m.num_layers * self._layer * self._stored / (self.place.fsdp * tensor)
        if s.cache != "none" and self.place.apart and copied <= SHARE * self.place.memory:
            working += copied
        return self.state() + self._rounded + working

    def update(self, rows: int, remat: str) -> float:
        """Estimates an update in micro-batches of `rows` rows, including the arrays that stay in memory."""
        m, tensor = self.model, self.place.tensor
        local = math.ceil(rows / self.place.rows) * self.views
        # A block-causal model reads a noisy copy of the completion beside it.
        tokens = self._tokens + (0 if m.block_size is None else self.config.sampler.completion_length)
        kept = KEPT * m.hidden_size
        if remat != "full":
            kept += (
                KEPT_OUTPUTS * sum(o for name, (_, o) in target_shapes(m).items() if name not in ("o", "down")) / tensor
            )
        if remat == "none":
            # Few plans recompute nothing, and they differ: this is up to two fifths above them.
            cut = 8 * m.intermediate_size + 2.8 * (m.num_heads + m.num_kv_heads) * m.head_dim
            kept += 8 * m.hidden_size + cut / tensor
        row = m.num_layers * tokens * kept * self._width
        if remat == "none":
            row += m.num_layers * self._scores(tokens, 1)
        working = self._activations(tokens, wide=6.7, heads=0.2) + self._scores(tokens, 3)
        working += 4 * self.config.sampler.completion_length * min(m.vocab_size, self.config.model.vocab_chunk) / tensor
        # The old policy, the gradient of a micro-batch and the sum of gradients.
        policies = 3 * 4 * self._trained
        return self.state() + self._rounded + policies + local * row + max(*self._gathered(), local * working)

    def fits(self, needed: float) -> bool:
        """Returns whether an estimate fits the memory, with the margin `FILL`."""
        return needed <= FILL * self.place.memory


def fitted(config: TrainConfig, model: DenoiserConfig, method: Method, place: Place) -> TrainConfig:
    """Returns the config with sizes in place of `rollout_rows=None`, `microbatch_rows=None` and `model.remat="auto"`.

    If all rows fit at once, `rollout_rows` stays None. Sizes that the config sets are never changed. If nothing fits by
    the estimate, the smallest sizes are taken; the device then decides.

    Raises:
      UserError: the rows of an iteration cannot be spread evenly over the mesh.
    """
    if None not in (config.rollout_rows, config.microbatch_rows) and config.model.remat != "auto":
        return config
    total, group = config.prompts_per_iteration * config.group_size, config.group_size
    of_update = config.microbatch_rows is None or config.model.remat == "auto"
    sizes = Sizes(config, model, views_of(config, method) if of_update else 0, place)
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = sorted({*small, *(total // n for n in small)}, reverse=True)
    divisors = [n for n in divisors if n % place.rows == 0]
    if not divisors:
        raise UserError(
            f"config.mesh spreads rows over {place.rows} devices, which do not divide the {total} rows of an "
            "iteration: change config.prompts_per_iteration or config.mesh"
        )
    if config.rollout_rows is None:
        further = config.refill.prompts * group if config.refill.rounds and config.refill.prompts else 0
        parts = [n for n in divisors if n % group == 0 and further % n == 0] or divisors[:1]
        rows = next((n for n in parts if sizes.fits(sizes.sampler(n))), parts[-1])
        config = dataclasses.replace(config, rollout_rows=None if rows == total else rows)
    if not of_update:
        return config
    remats = POLICIES if config.model.remat == "auto" else (config.model.remat,)
    rows = [config.microbatch_rows]
    if config.microbatch_rows is None:
        rows = [n for n in divisors if (config.update_rows or total) % n == 0] or divisors[-1:]
    # Larger micro-batches only take memory. The signal-to-noise ratio can be measured with whole groups alone.
    most = math.ceil(ENOUGH_TOKENS / (sizes.views * sizes._tokens)) * place.rows
    rows = [n for n in rows if n <= max(most, group)] or rows[-1:]
    rows.sort(key=lambda n: (n % group == 0, n), reverse=True)
    choices = [(remat, n) for remat in remats for n in rows]
    remat, some = next(
        ((remat, n) for remat, n in choices if sizes.fits(sizes.update(n, remat))), (remats[-1], min(rows))
    )
    return dataclasses.replace(config, microbatch_rows=some, model=dataclasses.replace(config.model, remat=remat))


def place_of(mesh: Mesh, model: DenoiserConfig, memory: int) -> Place:
    """Describes a device of a mesh, with `memory` bytes, for the estimates."""
    with jax.set_mesh(mesh):
        kind = attention.chosen(model)
    return Place(memory, *(mesh.shape[axis] for axis in AXES), kind != "plain", kind == "cudnn")


def fitted_to_devices(config: TrainConfig, method: Method, plan: Mapping[str, Any]) -> TrainConfig:
    """Returns `fitted` for the devices of this job.

    Args:
      plan: the sizes of the plan in the workdir (`planned_sizes`), which take precedence over the estimates; empty
        without a plan.
    """
    if config.microbatch_rows is None and "microbatch_rows" in plan:
        config = dataclasses.replace(config, microbatch_rows=plan["microbatch_rows"])
    if config.rollout_rows is None and "rollout_rows" in plan:
        config = dataclasses.replace(config, rollout_rows=plan["rollout_rows"])
    if config.model.remat == "auto" and "remat" in plan:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=plan["remat"]))
    sizes = with_compute(hub.read_config(config.checkpoint, config.overrides), config.model)
    require_room(config, sizes, spread_rows(config))
    mesh = make_mesh(config.mesh, dimensions=dimensions(sizes, spread_rows(config)))
    return fitted(config, sizes, method, place_of(mesh, sizes, memory.of_devices() // jax.device_count()))


def views_of(config: TrainConfig, method: Method) -> int:
    """Returns the number of forward passes that an update makes for each row."""
    batch = batch_shapes(config, method, jax.ShapeDtypeStruct)
    key = jax.eval_shape(lambda: jax.random.key(0))
    views = jax.eval_shape(lambda key, batch: method.views(method.masks(key, batch), batch), key, batch)
    return views.masked.shape[0]


def batch_shapes(config: TrainConfig, method: Method, shape: Callable) -> Batch:
    """Returns the shapes of a rewarded rollout, as the method needs it, for prompts of the largest bucket.

    Args:
      shape: a function from a shape and a dtype to what stands in for an array, such as `jax.ShapeDtypeStruct`.
    """
    rows, prompt = config.prompts_per_iteration * config.group_size, max(config.prompt_buckets)
    completion = config.sampler.completion_length
    recorded = shape((rows, completion), jnp.float32) if method.records else None
    return Batch(
        tokens=shape((rows, prompt + completion), jnp.int32),
        prompt_mask=shape((rows, prompt), bool),
        completion_mask=shape((rows, completion), jnp.float32),
        rewards=shape((rows,), jnp.float32),
        commit_step=shape((rows, completion), jnp.int32),
        confidence=shape((rows, completion), jnp.float32),
        log_prob=recorded,
        entropy=recorded,
        group_size=config.group_size,
        eos_token_id=config.eos_token_id,
        sampler=config.sampler,
    )
