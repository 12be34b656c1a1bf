"""Measures the parts of `benchmarks.accelerator` that share a process: product, steps, update and disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdsd_jax.config import OptimizerConfig
from gdsd_jax.denoiser import TARGETS, hidden_states_at, init_base, init_lora, pick, repeated
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.cache import cached_states_at, refresh
from gdsd_jax.diffusion.proposals import propose
from gdsd_jax.diffusion.scoring import DEFAULT_CHUNK
from gdsd_jax.diffusion.step import beginning, row_keys
from gdsd_jax.diffusion.step import commit as write
from gdsd_jax.hub import export_checkpoint, load_checkpoint, names, tiny
from gdsd_jax.hub.published import LLADA_8B
from gdsd_jax.methods import Batch, build
from gdsd_jax.planning import flops
from gdsd_jax.runtime.sharding import MeshConfig, make_mesh
from gdsd_jax.training.optimizer import make_optimizer
from gdsd_jax.training.state import init_state
from gdsd_jax.training.update import UpdateSpec, make_inner_update


class Sizes(NamedTuple):
    """The measured sizes; `model` replaces fields of the published config."""

    model: dict[str, Any]
    rows: int
    update_rows: int
    prompt: int
    completion: int
    block: int
    rank: int
    product: int
    turns: int


REAL = Sizes({}, 32, 8, 400, 256, 32, 128, 8192, 5)
TINY = Sizes(
    {
        "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
        "intermediate_size": 128, "max_length": 512,
    },
    2, 2, 16, 16, 8, 4, 64, 2,
)  # fmt: skip


class Shapes(NamedTuple):
    """The model, its weights, an adapter, tokens `[B, P+L]` (random, then masked), and their prompt mask `[B, P]`."""

    model: Any
    base: Any
    lora: Any
    tokens: Any
    mask: Any


def timed(work: Callable[[], Any], turns: int) -> dict[str, float]:
    """Returns the seconds of the first call, which compiles, and the median and the worst of `turns` later calls."""
    taken = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return {"first_seconds": taken[0], "seconds": statistics.median(taken[1:]), "worst_seconds": max(taken[1:])}


def memory() -> dict[str, float]:
    """Returns the peak memory of the device so far, if it reports one."""
    found = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": found["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in found else {}


# ------------------------------------------------------------------------------------------------------------- set-up


def make(sizes: Sizes, attention: str) -> Shapes:
    """Draws the weights: normal matrices of standard deviation `in^-0.5`, and an adapter that is not zero."""
    tokenizer = tiny.make_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    model = dataclasses.replace(LLADA_8B, **sizes.model | ids, dtype="bfloat16", remat="full", attention=attention)
    shapes = jax.eval_shape(functools.partial(init_base, model), jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Norms are ones. Apart from the layers they have a single axis.
    norm = lambda x: x.ndim == 1 or x.shape[0] == model.num_layers and x.ndim == 2  # noqa: E731
    drawn = [
        jnp.ones(x.shape, jnp.bfloat16) if norm(x) else draw(key, x.shape) for key, x in zip(keys, leaves, strict=True)
    ]
    base = jax.tree.unflatten(tree, drawn)
    adapter = functools.partial(init_lora, model, rank=sizes.rank, alpha=sizes.rank / 2.0, targets=TARGETS)
    lora = jax.jit(lambda key: jax.tree.map(lambda x: x + 1e-3, adapter(key)))(jax.random.key(1))
    length = sizes.prompt + sizes.completion
    tokens = jax.random.randint(jax.random.key(2), (sizes.rows, length), 0, model.vocab_size, jnp.int32)
    tokens = tokens.at[:, sizes.prompt + sizes.block :].set(model.mask_token_id)
    pads = jnp.arange(sizes.rows)[:, None] * (sizes.prompt // 2 // sizes.rows)
    return Shapes(model, base, lora, tokens, jnp.arange(sizes.prompt) >= pads)


# -------------------------------------------------------------------------------------------------------------- parts


def product(sizes: Sizes) -> dict[str, Any]:
    """Measures FLOP/s of a square bfloat16 product of random data, and bytes/s of a copy, reads and writes counted."""
    n = sizes.product
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    # Ten products per call, so that the overhead of a call does not count.
    repeat = jax.jit(lambda x, y: jax.lax.fori_loop(0, 10, lambda _, z: (z @ y) * jnp.bfloat16(n**-0.5), x))
    found = timed(lambda: repeat(x, y), sizes.turns)
    large = jnp.zeros((n * n // 2, 8), jnp.float32)
    copy = timed(functools.partial(jax.jit(lambda x: x + 1), large), sizes.turns)
    return {
        "device": jax.devices()[0].device_kind,
        "flops": 10 * 2 * n**3 / found["seconds"],
        "copy_bytes": 2 * large.nbytes / copy["seconds"],
    } | found


def steps(sizes: Sizes, shapes: Shapes) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields name and measurement of a full sampler step and of a step under a dual cache."""
    model, base, lora, tokens, mask = shapes
    model = dataclasses.replace(model, remat="none")
    rows, length = tokens.shape
    settings = SamplerConfig(
        sizes.completion, sizes.completion, sizes.block, "low_confidence", temperature=1.0, cache="dual"
    )
    start, places = jnp.int32(sizes.prompt + sizes.block), jnp.arange(sizes.block)
    uniform = jax.random.uniform(jax.random.key(3), (rows, sizes.block, 2))
    counted = flops.Model(model, sizes.rank, TARGETS)
    head = counted.head(rows * sizes.block)

    def commit(base: Any, hidden: jax.Array, uniform: jax.Array) -> tuple:
        return propose(model, base, hidden[None], uniform, settings)

    @jax.jit
    def full(base: Any, lora: Any, tokens: jax.Array, mask: jax.Array, start: jax.Array, uniform: jax.Array) -> tuple:
        read = hidden_states_at(model, base, lora, tokens, prompt_mask=mask)
        return commit(base, read(start + places), uniform)

    @jax.jit
    def cached_steps(base: Any, lora: Any, tokens: jax.Array, mask: jax.Array, count: jax.Array) -> Any:
        """Makes the refresh of the second block and `count` cached steps, as a rollout does."""
        base, lora = repeated(model, base, lora, tokens=rows * length, cached=True)
        state = beginning(model, settings, tokens, settings.step_limit)._replace(block=jnp.int32(1))
        keys = row_keys(jax.random.key(3), rows, None)
        hidden, cache = refresh(model, base, lora, tokens, mask, state.block, settings)
        first = write(model, base, keys, settings, state, functools.partial(pick, hidden))

        def step(loop: tuple) -> tuple:
            state, cache = loop
            read, cache = cached_states_at(model, base, lora, hidden, cache, state.tokens, mask, state.block, settings)
            return write(model, base, keys, settings, state, read), cache

        return jax.lax.while_loop(lambda loop: loop[0].step <= count, step, (first, cache))[0].tokens

    def run_full() -> dict[str, Any]:
        return timed(lambda: full(base, lora, tokens, mask, start, uniform), sizes.turns) | {
            "rows": rows, "flops_needed": counted.forward(rows, length) + head,
        }  # fmt: skip

    def run_dual() -> dict[str, Any]:
        """Measures one cached step, as the difference of many steps and few."""
        # The head is applied to the masked tokens, on average half of the block.
        needed = counted.forward(rows, length, window=sizes.block) + head / 2
        few, many = 1, sizes.block - 2
        some, more = (
            timed(lambda: cached_steps(base, lora, tokens, mask, jnp.int32(count)), sizes.turns)  # noqa: B023
            for count in (few, many)
        )
        taken = {key: (more[key] - some["seconds"]) / (many - few) for key in ("seconds", "worst_seconds")}
        return {"first_seconds": some["first_seconds"]} | taken | {"rows": rows, "flops_needed": needed}

    yield "full", run_full
    yield "dual", run_dual


def update(sizes: Sizes, shapes: Shapes) -> dict[str, Any]:
    """Measures the first inner update on a rollout, with all rows in one micro-batch."""
    rows, length = sizes.update_rows, sizes.prompt + sizes.completion
    method = build("gdsd", psi=1.0, beta=1e-3, views=1)
    optimizer, schedule = make_optimizer(OptimizerConfig(), updates=10)
    run = make_inner_update(UpdateSpec(shapes.model, method, optimizer, schedule, rows, DEFAULT_CHUNK))
    batch = Batch(
        tokens=jax.random.randint(jax.random.key(4), (rows, length), 0, shapes.model.vocab_size, jnp.int32),
        prompt_mask=jnp.tile(shapes.mask, (-(-rows // sizes.rows), 1))[:rows],
        completion_mask=jnp.ones((rows, sizes.completion)),
        rewards=jnp.arange(rows) % 2 * 1.0,
        commit_step=jnp.zeros((rows, sizes.completion), jnp.int32),
        confidence=jnp.ones((rows, sizes.completion)),
        group_size=rows,
    )
    state = init_state(shapes.lora, optimizer, seed=0)

    def work() -> Any:
        nonlocal state
        state, report = run(state, shapes.base, None, batch)
        return report["loss"]

    found = timed(work, sizes.turns)
    # The coupled pair is two passes.
    count = lambda remat: flops.gradient(  # noqa: E731
        flops.Model(dataclasses.replace(shapes.model, remat=remat), sizes.rank, TARGETS),
        2 * rows, method.reads, rows * sizes.completion, length,
    )  # fmt: skip
    counted = flops.Model(shapes.model, sizes.rank, TARGETS)
    reference = flops.score(counted, 2 * rows, method.reads, rows * sizes.completion, length, adapter=False)
    return found | {
        "rows": rows, "flops_needed": count("none") + reference, "flops_done": count(shapes.model.remat) + reference,
    } | memory()  # fmt: skip


def disk(shapes: Shapes, workdir: Path) -> dict[str, Any]:
    """Measures writing the checkpoint with its tokenizer, and loading it."""
    source, target = workdir / "source", workdir / "checkpoint"
    for path in (source, target):
        shutil.rmtree(path, ignore_errors=True)
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(names.hf_config(shapes.model)))
    tiny.make_tokenizer().save_pretrained(str(source))
    start = time.perf_counter()
    export_checkpoint(target, shapes.model, shapes.base, source=source)
    written = time.perf_counter()
    size = sum(path.stat().st_size for path in target.iterdir())
    for leaf in jax.tree.leaves(shapes.base):
        leaf.delete()
    begin = time.perf_counter()
    jax.block_until_ready(load_checkpoint(target, mesh=make_mesh(MeshConfig(), jax.devices()[:1])))
    return {"gb": size / 1e9, "export_seconds": written - start, "load_seconds": time.perf_counter() - begin} | memory()
