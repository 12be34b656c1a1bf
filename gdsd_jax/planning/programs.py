"""Lowers a run's own sampler, scorer and update at their real size for a mesh of chips, without any weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gdsd_jax import hub
from gdsd_jax.config import TrainConfig
from gdsd_jax.denoiser import DenoiserConfig, init_base, init_lora, logical_axes
from gdsd_jax.denoiser.quantise import quantised
from gdsd_jax.diffusion import Rollout
from gdsd_jax.diffusion.sampler import compiled_sample
from gdsd_jax.diffusion.trajectory import check_defined, compiled_log_prob
from gdsd_jax.methods import Batch, Scores, build
from gdsd_jax.planning import flops
from gdsd_jax.runtime import sharding
from gdsd_jax.training.fit import batch_shapes, fitted, place_of
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.setup import beside_policy, with_compute
from gdsd_jax.training.state import NOTHING, Beside, TrainState, init_state, policy
from gdsd_jax.training.update import UpdateSpec, draw_pieces, make_inner_update, score

STORED = jnp.bfloat16  # dtype of the published checkpoints


class Program(NamedTuple):
    """One jitted program of a run.

    lower: traces the program on shapes and lowers it.
    flops: FLOPs of the program's matrix products by their equations, over all chips.
    beside: bytes per chip that stay in memory while the program runs although it does not read them.
    what: a description in one line.
    loops: the largest numbers of passes of the loops whose length depends on data, from the outermost inwards.
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


class Run(NamedTuple):
    """A planned run: its config and mesh, the static parts of its updates, and the shapes of its arrays."""

    config: TrainConfig
    mesh: Mesh
    spec: UpdateSpec
    base: Any
    state: TrainState
    batch: Batch
    key: Any

    @property
    def counted(self) -> flops.Model:
        """Returns the model as `flops` counts it."""
        return flops.Model(self.spec.config, self.config.lora.rank, self.config.lora.targets)

    @property
    def beside(self) -> int:
        """Returns the bytes per chip of parameters and optimizer that a program of the policy alone does not read."""
        state = bytes_per_chip(self.state) - bytes_per_chip(self.state.params)
        return state + (0 if self.config.lora.rank else bytes_per_chip(self.base))


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
    spec = UpdateSpec.of_run(config, model, method, optimizer, schedule, more.optimizer)
    base, state = parameters(config, model, mesh, optimizer, more)
    key = place(mesh, jax.eval_shape(lambda: jax.random.key(0)), ())
    batch = batch_shapes(config, method, functools.partial(rows_first, mesh))
    run = Run(config, mesh, spec, base, state, batch, key)
    programs = {"sampler": sampler(run)} | scorer_and_update(run) | {"exact": exact(run)}
    stored = bytes_per_chip(state.params) + bytes_per_chip(base)
    return Plan(programs, stored, bytes_per_chip(state.opt_state))


def sampler(run: Run) -> Program:
    """Plans the rollout of one part; a rollout in parts runs this program once for each part."""
    rows, asked = run.config.rollout_rows or len(run.batch.tokens), run.batch.prompt_length
    prompts = [rows_first(run.mesh, (rows, asked), dtype) for dtype in (jnp.int32, bool)]
    loops = flops.sampler_loops(run.spec.config, run.config.sampler, asked)
    arguments = (*prompts, run.key, run.config.sampler, rows_first(run.mesh, (rows,), jnp.int32))
    return Program(
        on_mesh(run.mesh, compiled_sample.lower, run.spec.config, *policy(run.base, run.state.params), *arguments),
        flops.sampler(run.counted, run.config.sampler, rows, asked),
        run.beside,
        f"{rows} completions of {run.batch.completion_length} tokens after {asked}, {math.prod(loops)} steps",
        loops,
    )


def scorer_and_update(run: Run) -> dict[str, Program]:
    """Plans the scoring of one micro-batch by the old policy, and a later inner update."""
    config, method, batch = run.config, run.spec.method, run.batch
    rows, some = len(batch.tokens), config.microbatch_rows
    updated = config.update_rows or rows
    steps = updated // some
    views = jax.eval_shape(lambda key, batch: method.views(method.masks(key, batch), batch), run.key, batch)
    passes, positions = views.masked.shape[0] * some, math.prod(views.weights.shape) // (rows // some)
    length = flops.scored_columns(run.spec.config, config.sampler, batch.prompt_length)
    count = functools.partial(flops.score, run.counted, passes, method.reads, positions, length)
    old, reference = count(), count(adapter=False)
    scored = (old if method.old != "unused" else 0) + (reference if method.needs_reference else 0)
    new = flops.gradient(run.counted, passes, method.reads, positions, length)

    scorer = jax.jit(functools.partial(score_first, run.spec))
    update = make_inner_update(run.spec, jax.tree.map(lambda x: x.sharding, run.state))
    return {
        "score": Program(
            on_mesh(run.mesh, scorer.lower, run.base, run.state.params, run.state.extras, batch, run.key),
            old,
            run.beside,
            f"old policy on one micro-batch of {some} completions, {passes} views",
        ),
        "update": Program(
            on_mesh(run.mesh, update.lower, run.state, run.base, run.state.params, batch),
            steps * (scored + new),
            0,
            f"old policy, reference and gradient on {updated} completions in {steps} micro-batches",
        ),
    }


def score_first(spec: UpdateSpec, base: Any, params: Any, extras: Any, batch: Batch, key: jax.Array) -> Scores:
    """Scores the first micro-batch of a batch, in views that are drawn for all of it."""
    first = jax.tree.map(lambda x: x[0], draw_pieces(spec, key, batch))
    return score(spec, base, params, extras, *first)[0]


def exact(run: Run) -> Program:
    """Plans the exact log-probability of one micro-batch of rollouts."""
    config, model, batch, some = run.config, run.spec.config, run.batch, run.config.microbatch_rows

    def lower() -> jax.stages.Lowered:
        check_defined(config.sampler, model)
        few = lambda x: rows_first(run.mesh, (some, *x.shape[1:]), x.dtype)  # noqa: E731
        rollout = Rollout(few(batch.tokens), few(batch.commit_step), few(batch.confidence))
        settings = few(batch.prompt_mask), config.sampler, config.model.vocab_chunk, 1
        return compiled_log_prob.lower(model, *policy(run.base, run.state.params), rollout, *settings)

    steps = math.prod(flops.sampler_loops(model, config.sampler, batch.prompt_length))
    return Program(
        on_mesh(run.mesh, lower),
        flops.exact(run.counted, config.sampler, some, batch.prompt_length),
        run.beside,
        f"exact log-probability of {some} completions of {batch.completion_length} tokens in {steps} steps",
    )


def on_mesh(mesh: Mesh, lower: Callable, *arguments: Any) -> Callable[[], jax.stages.Lowered]:
    """Returns a function that calls `lower` with the arguments while the mesh is the current one."""

    def lowered() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return lower(*arguments)

    return lowered


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
    """Returns the shapes of a base, with the dtype of published checkpoints, or with the layers' matrices in 8 bits."""

    def make() -> Any:
        drawn = init_base(dataclasses.replace(model, weights="stored"), jax.random.key(0))
        stored = jax.tree.map(lambda x: x.astype(STORED), drawn)
        return quantised(stored) if model.weights == "int8" else stored

    return jax.eval_shape(make)


def rows_first(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array `[B]` or `[B, T]` whose rows are spread over the mesh."""
    return place(mesh, jax.ShapeDtypeStruct(shape, dtype), ("rows", "tokens")[: len(shape)])


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
