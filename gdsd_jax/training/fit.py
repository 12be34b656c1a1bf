"""Chooses the sizes that a config leaves open by the memory of a device.

These are the rows of a part of a rollout and of a micro-batch, and the activations that the backward pass recomputes.
The memory of one device is estimated from the shapes of its arrays, with constants that come near the TPU compiler's
own figures (docs/pods_plan.json) and a margin above them; `gdsd_jax.plan` asks the compiler itself. The fastest choice
that fits is taken: first the backward pass that recomputes least, then the largest micro-batch, up to the size from
which products take the time and not the reading of weights.
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

    def resident(self) -> float:
        """Estimates the arrays that stay in memory: base, trained parameters, moments, two gradients, old policy."""
        c, m, cut = self.config, self.model, self.place.fsdp * self.place.tensor
        tables = m.vocab_size * m.hidden_size * (1 if m.tied_head else 2)
        layers = m.num_layers * self._layer
        base = layers * self._stored + tables * self._width
        if c.lora.rank:
            targets = target_shapes(m)
            trained = m.num_layers * c.lora.rank * sum(sum(targets[name]) for name in c.lora.targets)
        else:
            trained = layers + tables
        # Optimizers may tell parameters apart by their names and axes.
        matrix = {"layers": {"gate": {"kernel": jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)}}}
        moments = jax.eval_shape(make_optimizer(c.optimizer, 1)[0].init, matrix)
        copies = sum(x.size for x in jax.tree.leaves(moments)) // 1024
        return (base + 4 * trained * (4 + copies)) / cut

    def gathered(self) -> float:
        """Estimates the matrices that are gathered or widened for their products: of two layers, and of the head."""
        head = self.model.vocab_size * self.model.hidden_size if self.place.fsdp > 1 else 0
        layers = 2 * self._layer if self.place.fsdp > 1 or self.config.model.weights == "int8" else 0
        return (layers + head) * self._width / self.place.tensor

    def _working(self, *, gradient: bool) -> float:
        """Estimates the activations that one layer holds at one time for one row."""
        m, tensor = self.model, self.place.tensor
        wide = m.num_heads * m.head_dim + m.num_kv_heads * m.head_dim + (2 if gradient else 1.5) * m.intermediate_size
        found = self._tokens * self._width * ((16 if gradient else 6) * m.hidden_size + 2 * wide / tensor)
        if not self.place.kernel:
            found += (3 if gradient else 2) * 4 * m.num_heads / tensor * self._tokens**2
        return found

    def sampler(self, rows: int) -> float:
        """Estimates a rollout of `rows` rows, including the arrays that stay in memory."""
        m, s = self.model, self.config.sampler
        local = math.ceil(rows / self.place.rows) * (2 if s.cfg_scale > 0 else 1)
        read = s.block_length if s.forbid_mask and s.blocks > 1 else s.completion_length
        row = self._working(gradient=False) + read * m.vocab_size * 4 * 0.6 / self.place.tensor
        if s.cache != "none" or m.block_size is not None:
            row += 2 * m.num_layers * self._tokens * m.num_kv_heads * m.head_dim * self._width / self.place.tensor
        copied = m.num_layers * self._layer * self._stored / (self.place.fsdp * self.place.tensor)
        if s.cache == "none" or not self.place.apart or copied > SHARE * self.place.memory:
            copied = 0
        return self.resident() + self.gathered() + copied + local * row

    def update(self, rows: int, remat: str) -> float:
        """Estimates an update in micro-batches of `rows` rows, including the arrays that stay in memory."""
        m, tensor = self.model, self.place.tensor
        local = math.ceil(rows / self.place.rows) * self.views
        kept = m.hidden_size
        if remat != "full":
            outputs = sum(o for name, (_, o) in target_shapes(m).items() if name not in ("o", "down"))
            kept += outputs / tensor + 2 * m.hidden_size + len(self.config.lora.targets) * self.config.lora.rank
        if remat == "none":
            kept += 8 * m.hidden_size + 2 * (m.num_heads * m.head_dim + m.intermediate_size) / tensor
        row = m.num_layers * self._tokens * kept * self._width + self._working(gradient=True)
        if remat == "none" and not self.place.kernel:
            row += m.num_layers * 4 * m.num_heads / tensor * self._tokens**2
        row += 3 * 4 * self.config.sampler.completion_length * min(m.vocab_size, self.config.model.vocab_chunk) / tensor
        return self.resident() + self.gathered() + local * row

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
