"""Measures how much of a small adapter's effect survives bfloat16, and what it costs to keep it.

    python -m benchmarks.adapter_slope [--layers 6] [--width 256] [--updates 1,8,24,64] [--rows 32]
                                       [--products] [--merged]

A fresh adapter takes steps of the learning rate along the sign of a float32 gradient, like the first steps of Adam. The
change of every token's log-probability is then computed in float32 and in bfloat16. The slope is that of the regression
of the bfloat16 change on the float32 change: 1 if nothing is lost, 0 if the adapter has no effect. The table shows it
with its standard error. Each row adds the adapter's product to the base's in another way (`WAYS`), the first of which
is the library's.

`--merged` merges the adapter into the weights, as an export does: its rows differ in the dtype of the export and of the
computation. `--products` also measures the time of a wide matrix product with an adapter, in each way.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import number, parser_of, several
from gdsd_jax.denoiser import TARGETS, DenoiserConfig, init_base, init_lora, ops
from gdsd_jax.diffusion import masking
from gdsd_jax.diffusion.scoring import read_views
from gdsd_jax.methods import Batch, common
from gdsd_jax.runtime import ranges

PROMPT, COMPLETION, RANK = 16, 112, 32


# B rows, L completion tokens. The functions below have the signature of `ops.product_plus`.


def _apart(x: jax.Array, w: jax.Array, addends: tuple, precision: Any) -> jax.Array:
    """Rounds the base's product before the addends are added."""
    return sum(addends, ops.product(x, w, precision))


def _addend_first(x: jax.Array, w: jax.Array, addends: tuple, precision: Any) -> jax.Array:
    """Computes the addends first: the compiler may then start the sum of the wide product with them, as cuBLAS can."""
    return sum(jax.lax.optimization_barrier(addends), ops.product(x, w, precision))


# The first is the library's own; the others replace it while they are measured.
WAYS: dict[str, Callable] = {
    "once, float32 sum": ops.product_plus,
    "base rounded first": _apart,
    "addend ready before": _addend_first,
}


def model(layers: int, width: int, dtype: str) -> DenoiserConfig:
    """Returns the config of the measured model."""
    return DenoiserConfig(
        family="llada", vocab_size=2048, hidden_size=width, num_layers=layers, num_heads=width // 64,
        num_kv_heads=width // 64, intermediate_size=3 * width, max_length=512, rope_theta=10000.0, rms_norm_eps=1e-5,
        qkv_bias=False, tied_head=False, next_token_logits=False, mask_token_id=3, eos_token_id=1, pad_token_id=0,
        dtype=dtype,
    )  # fmt: skip


def scorer(config: DenoiserConfig, base: Any, rows: int) -> tuple[Callable, Callable]:
    """Returns two functions of an adapter: log-probabilities `[B, L]`, and the gradient of a weighted sum of them."""
    draws = np.random.default_rng(0)
    tokens = jnp.asarray(draws.integers(4, config.vocab_size, (rows, PROMPT + COMPLETION)), jnp.int32)
    masked = masking.stratified(jax.random.key(2), rows, COMPLETION, stratum=rows)
    batch = Batch(tokens, None, jnp.ones((rows, COMPLETION)), group_size=rows)
    views = common.coupled_views(masking.behind_prompt(masked, PROMPT)[None], batch, weighted=False)
    advantages = jnp.asarray(draws.standard_normal((rows, 1)), jnp.float32)

    def scores(base: Any, lora: Any) -> jax.Array:
        return read_views(config, base, lora, tokens, views, ("log_prob",), chunk=config.vocab_size)["log_prob"][0]

    compiled = jax.jit(jax.grad(lambda lora, base: jnp.sum(advantages * scores(base, lora))))
    # The base is an argument, because the compiler would spend minutes on constants of its size.
    return functools.partial(jax.jit(scores), base), lambda lora: compiled(lora, base)


def slope(seen: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Returns the slope of the regression of `seen` on `true` through the origin, and its standard error."""
    x, y = (np.asarray(value, np.float64).ravel() for value in (true, seen))
    found = x @ y / (x @ x)
    return float(found), float(np.sqrt(np.mean((y - found * x) ** 2) / (x @ x)))


def trained(layers: int, width: int, rows: int, updates: Sequence[int], rate: float) -> tuple[Any, dict, dict]:
    """Returns the base and, by number of updates, the adapters and the log-probabilities under them in float32."""
    exact = model(layers, width, "float32")
    # Like a stored checkpoint, the base is exact in bfloat16.
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_base(exact, jax.random.key(0)))
    lora = init_lora(exact, jax.random.key(1), rank=RANK, alpha=2.0 * RANK, targets=TARGETS)
    true, gradient = scorer(exact, base, rows)
    adapters = {0: lora}
    for count in range(1, max(updates) + 1):
        lora = jax.tree.map(lambda x, g: x + rate * jnp.sign(g), lora, gradient(lora))
        if count in updates:
            adapters[count] = lora
    return base, adapters, {count: np.asarray(true(lora)) for count, lora in adapters.items()}


def merged(base: Any, lora: Any, dtype: Any) -> Any:
    """Returns the weights that an export writes: the sum in float32, rounded once to `dtype`."""

    def one(name: str, weight: jax.Array) -> jax.Array:
        factors = lora.weights["layers"][name]
        product = jnp.einsum("nir,nro->noi", factors["a"], factors["b"], precision="highest")
        return (weight.astype(jnp.float32) + lora.alpha / lora.rank * product).astype(dtype)

    layers = {
        name: tree | {"weight": one(name, tree["weight"])} if name in lora.targets else tree
        for name, tree in base["layers"].items()
    }
    return base | {"layers": layers}


def merged_slopes(
    layers: int, width: int, rows: int, updates: Sequence[int], rate: float
) -> Iterator[tuple[str, dict[int, tuple[float, float]]]]:
    """Yields slopes and errors by number of updates, for each dtype of the export and of the computation."""
    base, adapters, expected = trained(layers, width, rows, updates, rate)
    for stored, computed in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"),
                             ("float32", "float32")):  # fmt: skip
        config = model(layers, width, computed)
        values = {
            count: np.asarray(scorer(config, merged(base, lora, stored), rows)[0](None))
            for count, lora in adapters.items()
        }
        name = f"merged in {stored}, computed in {computed}"
        yield name, {n: slope(values[n] - values[0], expected[n] - expected[0]) for n in updates}


def slopes(
    layers: int, width: int, rows: int, updates: Sequence[int], rate: float, ways: Sequence[str] = tuple(WAYS)
) -> Iterator[tuple[str, dict[int, tuple[float, float]]]]:
    """Yields slopes and errors by number of updates, for each of the ways."""
    base, adapters, expected = trained(layers, width, rows, updates, rate)
    for way in ways:
        ops.product_plus = WAYS[way]
        seen, _ = scorer(model(layers, width, "bfloat16"), base, rows)
        values = {count: np.asarray(seen(lora)) for count, lora in adapters.items()}
        ops.product_plus = WAYS[next(iter(WAYS))]
        yield way, {n: slope(values[n] - values[0], expected[n] - expected[0]) for n in updates}


def seconds(work: Callable[[], Any], turns: int = 20) -> float:
    """Returns the median seconds of a call, after a first one that compiles."""
    jax.block_until_ready(work())
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product_seconds(rows: int, size: tuple[int, int], rank: int) -> dict[str, float]:
    """Returns the seconds of `x W^T` with an adapter of `rank`, by way."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)  # noqa: E731
    x, w, a, b = draw(0, rows, size[0]), draw(1, *size[::-1]), draw(2, size[0], rank), draw(3, rank, size[1])
    plain = jax.lax.Precision.DEFAULT

    def timed(way: Callable) -> float:
        program = jax.jit(lambda x, w, a, b: way(x, w, (ops.low_rank(x, a, b, plain),), plain))
        return seconds(lambda: program(x, w, a, b))

    return {name: timed(way) for name, way in WAYS.items()}


def main() -> None:
    flags, count = parser_of(__doc__), number(ranges.Count)
    flags.add_argument("--layers", type=count, default=6, help="layers of the model")
    flags.add_argument("--width", type=count, default=256, help="width of the model")
    flags.add_argument("--rows", type=count, default=32, help="rows of tokens")
    flags.add_argument("--rate", type=number(ranges.Positive), default=3e-6, help="learning rate of the steps")
    flags.add_argument("--updates", type=several(count), default="1,8,24,64", help="numbers of steps, commas between")
    flags.add_argument("--products", action="store_true", help="also measures the time of a product with an adapter")
    flags.add_argument("--merged", action="store_true", help="merges the adapter into the weights")
    given = flags.parse_args()
    updates = given.updates
    print(f"{jax.devices()[0].device_kind}, {given.layers} layers, width {given.width}, rate {given.rate:g}")
    work = merged_slopes if given.merged else slopes
    print("| way | " + " | ".join(f"{n} updates" for n in updates) + " |\n|" + "---|" * (len(updates) + 1), flush=True)
    for way, by_count in work(given.layers, given.width, given.rows, updates, given.rate):
        cells = " | ".join(f"{by_count[n][0]:.3f} +- {by_count[n][1]:.3f}" for n in updates)
        print(f"| {way} | {cells} |", flush=True)
    if given.products:
        for size in ((4096, 4096), (4096, 12288), (12288, 4096)):
            for way, taken in product_seconds(8192, size, 128).items():
                print(f"8192 rows through {size[0]} x {size[1]}, {way}: {1e3 * taken:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
