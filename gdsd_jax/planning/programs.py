"""Lowers a run's own sampler, scorer and update at their real size for a mesh of chips, without any weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.denoiser import DenoiserConfig, LoRA, init_base, init_lora, logical_axes
from gdsd_jax.denoiser.quantise import quantised
from gdsd_jax.diffusion import Rollout
from gdsd_jax.diffusion.sampler import compiled_sample
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.diffusion.trajectory import check_defined, compiled_log_prob
from gdsd_jax.methods import Batch, Scores, build
from gdsd_jax.planning import flops
from gdsd_jax.runtime import sharding
from gdsd_jax.training.arrange import micro_batches
from gdsd_jax.training.fit import batch_shapes, fitted, place_of
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.setup import beside_policy, with_compute
from gdsd_jax.training.state import NOTHING, Beside, TrainState, init_state, policy
from gdsd_jax.training.update import UpdateSpec, make_inner_update

STORED = jnp.bfloat16  # dtype of the published checkpoints


class Program(NamedTuple):
    """One jitted program of a run.

    lower: traces the program on shapes and lowers it.
    flops: FLOPs of the program's matrix products by their equations, over all chips.
    beside: bytes per chip that stay in memory while the program runs although it does not read them.
    what: one line that describes the program.
    loops: the most often that its loops run whose length depends on data, from the outermost inwards.
    """

    lower: Callable[[], jax.stages.Lowered]
    flops: float
    beside: int
    what: str
    loops: tuple[int, ...] = (1,)


class Plan(NamedTuple):
    """The programs of a run, and the bytes per chip of all parameters and of the optimizer's state."""

    programs: dict[str, Program]
    parameter_bytes: int
    optimizer_bytes: int


def make_plan(config: TrainConfig, mesh: Mesh) -> Plan:
    """Plans the programs of a run on a mesh: sampler, scorer, a later inner update, and the exact likelihood.

    A later update also scores the old policy and the reference. The exact likelihood is that of one micro-batch of
    rollouts; traced where it is not defined, it raises UserError.

    Raises:
      UserError: the model, method or schedule is unknown.
    """
    model = with_compute(hub.architecture(config.checkpoint, config.overrides), config.model)
    method = build(config.method, **config.method_settings)
    optimizer, schedule = make_optimizer(config.optimizer, config.iterations * config.inner_updates)
    more = beside_policy(config, method, model)
    base, state = parameters(config, model, mesh, optimizer, more)
    placed = lambda shape, dtype: place(mesh, jax.ShapeDtypeStruct(shape, dtype), ("rows", "tokens")[: len(shape)])  # noqa: E731
    batch, key = batch_shapes(config, method, placed), place(mesh, jax.eval_shape(lambda: jax.random.key(0)), ())
    weights, lora = policy(base, state.params)
    spec = UpdateSpec.of_run(config, model, method, optimizer, schedule, more.optimizer)
    update = make_inner_update(spec, jax.tree.map(lambda x: x.sharding, state))

    @jax.jit
    def score(base: Any, lora: LoRA | None, extras: Any, batch: Batch, key: jax.Array) -> Scores:
        views = method.views(method.masks(key, batch), batch)
        pieces = micro_batches(batch, config.microbatch_rows), micro_batches(views, config.microbatch_rows, axis=1)
        rows, seen = jax.tree.map(lambda x: x[0], pieces)
        reads = read_views(
            model, base, lora, rows.tokens, seen, method.reads,
            prompt_mask=rows.prompt_mask, chunk=config.model.vocab_chunk,
        )  # fmt: skip
        return method.scores(reads, seen, extras)

    def exact() -> jax.stages.Lowered:
        check_defined(config.sampler, model)
        few = lambda x: place(mesh, jax.ShapeDtypeStruct((some, *x.shape[1:]), x.dtype), ("rows", "tokens"))  # noqa: E731
        rollout = Rollout(few(batch.tokens), few(batch.commit_step), few(batch.confidence))
        arguments = model, weights, lora, rollout, few(batch.prompt_mask), config.sampler, config.model.vocab_chunk, 1
        with jax.set_mesh(mesh):
            return compiled_log_prob.lower(*arguments)

    def on_mesh(lower: Callable, *arguments: Any) -> Callable[[], jax.stages.Lowered]:
        def lowered() -> jax.stages.Lowered:
            with jax.set_mesh(mesh):
                return lower(*arguments)

        return lowered

    # ------------------------------------------------------------------------------------------ FLOPs
    rows, length = len(batch.tokens), flops.scored_columns(model, config.sampler, batch.prompt_length)
    some, pieces = config.microbatch_rows, rows // config.microbatch_rows
    updated = config.update_rows or rows
    steps = updated // some
    counted = flops.Model(model, config.lora.rank, config.lora.targets)
    views = jax.eval_shape(lambda key, batch: method.views(method.masks(key, batch), batch), key, batch)
    passes, positions = views.masked.shape[0] * some, math.prod(views.weights.shape) // pieces
    old = flops.score(counted, passes, method.reads, positions, length)
    reference = flops.score(counted, passes, method.reads, positions, length, adapter=False)
    scored = (old if method.old != "unused" else 0) + (reference if method.needs_reference else 0)
    new = flops.gradient(counted, passes, method.reads, positions, length)

    # ------------------------------------------------------------------------------------------ programs
    trained = bytes_per_chip(state)
    beside = trained - bytes_per_chip(state.params) + (0 if lora else bytes_per_chip(base))
    # A rollout in parts runs the program of one part once for each part.
    part = config.rollout_rows or rows

    def of_part(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return place(mesh, jax.ShapeDtypeStruct((part, *shape), dtype), ("rows", "tokens")[: 1 + len(shape)])

    asked = [of_part(dtype, batch.prompt_length) for dtype in (jnp.int32, bool)]
    loops = flops.sampler_loops(model, config.sampler, batch.prompt_length)
    denoising = math.prod(loops)
    programs = {
        "sampler": Program(
            on_mesh(compiled_sample.lower, model, weights, lora, *asked, key, config.sampler, of_part(jnp.int32)),
            flops.sampler(counted, config.sampler, part, batch.prompt_length),
            beside,
            f"{part} completions of {batch.completion_length} tokens after {batch.prompt_length}, {denoising} steps",
            loops,
        ),
        "score": Program(
            on_mesh(score.lower, weights, lora, state.extras, batch, key),
            old,
            beside,
            f"old policy on one micro-batch of {some} completions, {passes} views",
        ),
        "update": Program(
            on_mesh(update.lower, state, base, state.params, batch),
            steps * (scored + new),
            0,
            f"old policy, reference and gradient on {updated} completions in {steps} micro-batches",
        ),
        "exact": Program(
            exact,
            flops.exact(counted, config.sampler, some, batch.prompt_length),
            beside,
            f"exact log-probability of {some} completions of {batch.completion_length} tokens in {denoising} steps",
        ),
    }
    stored = bytes_per_chip(state.params) + bytes_per_chip(base)
    return Plan(programs, stored, bytes_per_chip(state.opt_state))


def with_sizes(config: TrainConfig, mesh: Mesh, chip_bytes: int) -> TrainConfig:
    """Returns the config with the sizes that it leaves to memory, as a run on chips of so many bytes would choose."""
    model = with_compute(hub.architecture(config.checkpoint, config.overrides), config.model)
    method = build(config.method, **config.method_settings)
    return fitted(config, model, method, place_of(mesh, model, chip_bytes))


def bytes_per_chip(tree: Any) -> int:
    """Computes the bytes per chip of arrays or shapes that carry their sharding; PRNG keys are not counted."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def base_shapes(model: DenoiserConfig) -> Any:
    """Returns the shapes of a base, with the dtype of published checkpoints, or with kernels in 8 bits."""

    def make() -> Any:
        drawn = init_base(dataclasses.replace(model, weights="stored"), jax.random.key(0))
        stored = jax.tree.map(lambda x: x.astype(STORED), drawn)
        return quantised(stored) if model.weights == "int8" else stored

    return jax.eval_shape(make)


def place(mesh: Mesh, array: jax.ShapeDtypeStruct, axes: Sequence[str]) -> jax.ShapeDtypeStruct:
    """Returns the shape with the sharding that the logical names of its axes imply."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.named_sharding(mesh, axes, array.shape))


def parameters(
    config: TrainConfig,
    model: DenoiserConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    more: Beside = NOTHING,
) -> tuple[Any, TrainState]:
    """Returns the shapes of the frozen base and of the training state, with their shardings."""
    shapes, axes = base_shapes(model), logical_axes(model)
    base = jax.tree.map(lambda x, axes: place(mesh, x, axes), shapes, axes)
    params = shapes
    if config.lora.rank:
        params = jax.eval_shape(lambda: init_lora(model, jax.random.key(0), **dataclasses.asdict(config.lora)))
        axes = params.replace(weights=logical_axes(model, params))
    state = jax.eval_shape(lambda params: init_state(params, optimizer, config.seed, more), params)
    whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))  # noqa: E731
    params = jax.tree.map(lambda x, axes: place(mesh, x, axes), state.params, axes)
    placed = jax.tree.map(lambda x: x.sharding, params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
        state.opt_state,
        placed,
        transform_non_params=whole,
    )
    reference = None if state.reference is None else params
    return base, jax.tree.map(whole, state).replace(params=params, opt_state=opt_state, reference=reference)
