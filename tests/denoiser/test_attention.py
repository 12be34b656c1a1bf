"""Attention kernels against the plain path, and when they are chosen: splash interpreted, cuDNN's call through XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from gdsd_jax.denoiser import (
    DenoiserConfig,
    attention,
    hidden_states,
    init_base,
    ops,
    refresh_cache,
    splash,
    window_states_at,
)
from gdsd_jax.denoiser.layout import Layout
from gdsd_jax.denoiser.model import allowed_of
from gdsd_jax.runtime import sharding
from gdsd_jax.runtime.errors import UserError

CONFIG = DenoiserConfig(
    family="llada", vocab_size=32, hidden_size=256, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=64,
    max_length=256, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=True, next_token_logits=False,
    mask_token_id=31, eos_token_id=30, pad_token_id=30, dtype="float32",
)  # fmt: skip


def arrays(rows, length, heads, kv_heads, head_dim=128):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def left_padded(rows, length):
    """Rows with 0, 5, 10, ... pads on the left."""
    return jnp.arange(length) >= 5 * jnp.arange(rows)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "kv_heads", "padded", "layout"),
    [
        (128, 2, False, None),
        (200, 1, True, None),
        (200, 1, True, Layout(8, 120, 40)),
        (280, 2, False, Layout(12, 160, 48)),
    ],
)
def test_values_and_gradients_equal_the_plain_path(monkeypatch, length, kv_heads, padded, layout):
    """One tile that the tokens fill, and several that they do not, with grouped heads, pads, and two copies of a text.

    The kernel computes the mask of the copies from indices.
    """
    monkeypatch.setattr(splash, "LARGEST_BLOCK", splash.LANES)
    q, k, v, weight = arrays(2, length, 2, kv_heads)
    real = left_padded(2, length) if padded else None
    # Pad queries compute what nobody reads.
    weight = weight if real is None else weight * real[:, :, None, None]

    def plain(q, k, v):
        allowed = None if layout is None else allowed_of(layout, length, None)
        return ops.attention(q, k, v, real, jax.lax.Precision.HIGHEST, allowed=allowed)

    def kernel(q, k, v):
        return splash.attention(q, k, v, real, layout=layout, interpret=True)

    def value_and_gradients(f):
        value, pull = jax.vjp(f, q, k, v)
        return value if real is None else jnp.where(real[:, :, None, None], value, 0), pull(weight)

    (expected, gradients), (found, found_gradients) = (
        jax.jit(value_and_gradients, static_argnums=0)(f) for f in (plain, kernel)
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for found, expected in zip(found_gradients, gradients, strict=True):
        assert jnp.any(expected != 0)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_no_token_reads_a_pad():
    """Other values under the pads change nothing, to the bit."""
    q, k, v, _ = arrays(2, 41, 2, 2)
    real = left_padded(2, 41)
    pads = ~real[:, :, None, None]
    first = splash.attention(q, k, v, real, interpret=True)
    second = splash.attention(q, jnp.where(pads, 100.0, k), jnp.where(pads, -50.0, v), real, interpret=True)
    assert (first[real] == second[real]).all()


@pytest.mark.slow
def test_the_denoiser_under_recomputation(monkeypatch):
    """A layer with the kernel and its gradient through the scan over layers, recomputed."""
    monkeypatch.setattr(splash, "attention", functools.partial(splash.attention, interpret=True))
    base = init_base(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 32)
    mask = left_padded(2, 16)

    def loss(base, attention):
        config = dataclasses.replace(CONFIG, attention=attention, remat="full")
        hidden = hidden_states(config, base, None, tokens, prompt_mask=mask)
        return jnp.sum(jnp.sin(hidden[:, 16:]))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    values = {kind: both(base, kind) for kind in ("plain", "splash")}
    np.testing.assert_allclose(values["splash"][0], values["plain"][0], rtol=1e-5)
    for found, expected in zip(*(jax.tree.leaves(values[kind][1]) for kind in ("splash", "plain")), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * jnp.max(jnp.abs(expected)))


def test_the_devices_decide():
    """The chips that a program is compiled for, not the machine that compiles, and only where the kernel is right."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert attention.chosen(config) == "plain"
    tpu = AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = AbstractMesh((1, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.chosen(config) == "splash"
        for other in ({"attention": "plain"}, {"dtype": "float32"}, {"num_heads": 4}):
            assert attention.chosen(dataclasses.replace(config, **other)) == "plain"
    assert attention.chosen(dataclasses.replace(CONFIG, attention="splash")) == "splash"
    with pytest.raises(UserError, match="config.model.attention"):
        dataclasses.replace(CONFIG, attention="flash")


@pytest.mark.parametrize(("capability", "kind"), [("9.0", "cudnn"), ("7.5", "plain"), ("gfx90a", "plain")])
def test_gpus_attend_through_cudnn_where_it_has_the_kernel(monkeypatch, capability, kind):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert attention.chosen(config) == kind
    assert attention.chosen(CONFIG) == "plain"
    assert attention.chosen(dataclasses.replace(config, hidden_size=24)) == "plain"


@pytest.mark.slow
@pytest.mark.parametrize(("length", "window"), [(41, None), (40, 7)])
def test_the_call_for_cudnn_equals_the_plain_path(monkeypatch, length, window):
    """Pads, grouped heads, odd lengths, blocks, and a window under a cache of which it sees a part."""
    monkeypatch.setattr(attention, "IMPLEMENTATION", "xla")
    q, k, v, weight = arrays(2, length, 4, 2, head_dim=16)
    real = left_padded(2, length)
    if window is None:
        blocks = allowed_of(Layout(size=8, clean=length), length, None)
        plain = lambda *qkv: ops.attention(*qkv, real, jax.lax.Precision.HIGHEST, None, blocks)  # noqa: E731
        call = lambda *qkv: attention.cudnn(*qkv, real, blocks)  # noqa: E731
    else:
        q, weight = q[:, :window], weight[:, :window]

        def split(k, v):
            return k[:, -window:], v[:, -window:], None

        def plain(q, k, v):
            cache = k[:, :-window].transpose(0, 2, 3, 1), v[:, :-window].swapaxes(1, 2), real[:, :-window]
            return ops.attention(q, *split(k, v), jax.lax.Precision.HIGHEST, cache)

        def call(q, k, v):
            stale = (x.at[:, -window:].set(3.0) for x in (k, v))
            keys, values = attention.written(tuple(stale), split(k, v)[:2], jnp.int32(length - window), None)
            return attention.cudnn(q, keys, values, real)

        real = real.at[:, -window:].set(True)
    read = real[:, : q.shape[1], None, None] if window is None else True
    both = [jax.vjp(f, q, k, v) for f in (call, plain)]
    np.testing.assert_allclose(*(np.where(read, value, 0) for value, _ in both), atol=2e-6)
    for found, expected in zip(*(pull(jnp.where(read, weight, 0)) for _, pull in both), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shifted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_cached_denoiser_under_the_call_for_cudnn(monkeypatch, shifted):
    """A window whose tokens the cache has seen gives the states of the full pass, for either kind of logits."""
    monkeypatch.setattr(attention, "IMPLEMENTATION", "xla")
    config = dataclasses.replace(CONFIG, attention="cudnn", num_layers=2, next_token_logits=shifted)
    base = init_base(config, jax.random.key(0))
    tokens, mask = jax.random.randint(jax.random.key(1), (2, 24), 0, 32), left_padded(2, 12)
    start, size = jnp.int32(16), 4
    # Under a prefix cache what lies before the block is frozen, under a dual one all that lies around it.
    frozen, around = (start, None) if shifted else (None, (start, size))

    @jax.jit
    def both(base):
        whole = hidden_states(dataclasses.replace(config, attention="plain"), base, None, tokens, prompt_mask=mask)
        _, cache = refresh_cache(config, base, None, tokens, jnp.arange(2), around=around, prompt_mask=mask)
        read = window_states_at(
            config, base, None, tokens, cache, start=start, size=size, frozen=frozen, prompt_mask=mask
        )
        return read(jnp.arange(size)), whole[:, 16:20]

    np.testing.assert_allclose(*both(base), atol=1e-4)
