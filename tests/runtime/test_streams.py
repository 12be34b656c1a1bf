"""Every draw has a key of its own."""

import re
from pathlib import Path

import jax

import gdsd_jax
from gdsd_jax.runtime.streams import Stream, stream_key, stream_of_seed

COUNTS = 50


def test_no_two_draws_share_a_key():
    """Keys of all streams and counts, and what a draw splits its key into: matrices, batches, steps, micro-batches."""
    seed = jax.random.key(0)
    grid = jax.jit(
        jax.vmap(
            jax.vmap(lambda stream, count: jax.random.fold_in(jax.random.fold_in(seed, stream), count), (None, 0)),
            (0, None),
        )
    )
    keys = grid(jax.numpy.arange(len(Stream)), jax.numpy.arange(COUNTS))
    for stream in Stream:
        assert (
            jax.random.key_data(stream_key(seed, stream, 7)).tolist() == jax.random.key_data(keys[stream, 7]).tolist()
        )
    children = jax.vmap(jax.vmap(lambda key: jax.random.split(key, 8)))(keys)
    roots = [seed, *(jax.random.fold_in(seed, int(stream)) for stream in Stream)]
    data = [jax.random.key_data(x).reshape(-1, 2).tolist() for x in (keys, children, jax.numpy.stack(roots))]
    found = [tuple(key) for part in data for key in part]
    assert len(set(found)) == len(found) == len(Stream) * COUNTS * 9 + len(Stream) + 1


def test_streams_of_one_seed_differ_from_those_of_another():
    one, other = (jax.random.key_data(stream_of_seed(seed, Stream.EVALUATION)).tolist() for seed in (0, 1))
    assert one != other


def test_the_keys_of_seeds_start_here_alone():
    """Whoever folds or splits the bare key of a seed could meet a stream."""
    package = Path(gdsd_jax.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    users = {name for name, text in sources.items() if re.search(r"\bseed_key\(", text)}
    assert users == {"runtime/transfer.py", "runtime/streams.py"}
    loose = {
        name
        for name, text in sources.items()
        if re.search(r"(fold_in|split)\((jax\.random\.key\(|state\.key|self\.key)", text)
    }
    # GDPO's masks are a function of the tokens, the same at every evaluation, and of no key of the run.
    assert loose == {"methods/gdpo.py"}
