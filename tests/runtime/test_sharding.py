"""The table of axes: what lies where, what is refused, and what a message advises."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gdsd_jax.denoiser import DenoiserConfig, hidden_states, init_base, init_lora, logical_axes
from gdsd_jax.runtime import sharding
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.sharding import Dimension, MeshConfig

CONFIG = DenoiserConfig(
    family="dream", vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48,
    max_length=64, rope_theta=10000.0, rms_norm_eps=1e-5, qkv_bias=True, tied_head=False, next_token_logits=True,
    mask_token_id=3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
DEVICES = 8


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def refused(config, *dimensions):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(config, jax.devices()[:1] * DEVICES, dimensions=dimensions)
    return str(error.value)


def test_each_parameter_is_named_and_every_name_is_in_the_table():
    base = jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0))
    lora = init_lora(CONFIG, jax.random.key(0), rank=2, alpha=2.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
    for axes, arrays in ((logical_axes(CONFIG), base), (logical_axes(CONFIG, lora), lora.weights)):
        specs = jax.tree.map(lambda array, names: (sharding.spec(names), len(names) == array.ndim), arrays, axes)
        assert all(fits for _, fits in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple)))


def test_every_large_matrix_is_cut_along_fsdp():
    lora = init_lora(CONFIG, jax.random.key(0), rank=2, alpha=2.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    for axes in (logical_axes(CONFIG), logical_axes(CONFIG, lora)):
        for path, names in jax.tree.leaves_with_path(axes, is_leaf=is_names):
            matrix = len([name for name in names if name != "layers"]) == 2
            assert ("fsdp" in sharding.spec(names)) == matrix, path


def test_a_mesh_of_ones_own_may_lack_axes():
    own = AbstractMesh((2, 4), ("tensor", "other"), axis_types=(AxisType.Auto,) * 2)
    assert sharding.fitted_spec(own, ("layers", "embed", "heads"), (2, 8, 4)) == P(None, None, ("tensor",))


@pytest.mark.parametrize(
    "use",
    [
        lambda: sharding.constrain(jnp.zeros((2, 3)), ("rows", "tokens")),
        lambda: sharding.gathered(jnp.zeros((2, 3)), ("embed", "mlp")),
        lambda: sharding.pieces("rows", 4),
        lambda: hidden_states(CONFIG, {}, None, jnp.zeros((1, 2), jnp.int32)),  # before the parameters are read
    ],
)
def test_a_current_mesh_of_explicit_axes_is_refused_with_the_remedy(use):
    """`jax.make_mesh` makes such meshes, and JAX's own error names one of its primitives."""
    explicit = jax.make_mesh((1,), ("fsdp",))
    with jax.set_mesh(explicit), pytest.raises(UserError, match=r"type Explicit.*axis_types=\(.*Auto,\) \* 1$"):
        use()


def test_two_logical_axes_on_one_mesh_axis_raise():
    assert sharding.spec(("layers", "embed", "heads")) == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="'fsdp' more than once"):
        sharding.spec(("rows", "embed"))
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        sharding.spec(("rows", "head"))


def test_a_dimension_is_cut_as_far_as_the_mesh_divides_it():
    axes = ("rows", "tokens", "kv_heads", "head_dim")
    cases = (
        (8, 4, P(("data", "fsdp"), None, "tensor", None)),
        (2, 3, P("data", None, None, None)),
        (1, 4, P(None, None, "tensor", None)),
    )
    for rows, heads, expected in cases:
        assert sharding.fitted_spec(mesh(2, 2, 2), axes, (rows, 5, heads, 16)) == expected


def test_the_open_size_takes_what_is_left():
    made = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(made.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(made.axis_types) == {AxisType.Auto}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the arrangement of devices looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_only_the_data_axis_crosses_between_slices():
    chips = [Chip(i, slice_index=i % 2) for i in range(16)]
    made = sharding.make_mesh(MeshConfig(data=4, fsdp=-1, tensor=2, slices=2), chips)
    assert made.devices.shape == (4, 2, 2)
    assert sorted(chip.id for chip in made.devices.flat) == list(range(16))
    for index, copy in enumerate(made.devices):
        assert {chip.slice_index for chip in copy.flat} == {index // 2}


@pytest.mark.parametrize(
    ("config", "problem", "advice"),
    [
        (MeshConfig(data=3, fsdp=1, tensor=2), "multiply to 6", "data=4,fsdp=1,tensor=2"),
        (MeshConfig(data=1, fsdp=-1, tensor=3), "multiply to 6", "data=1,fsdp=2,tensor=4"),
        (MeshConfig(data=1, fsdp=8, tensor=1, slices=2), "not a multiple of the 2 slices", "data=2,fsdp=4,tensor=1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, problem, advice):
    message = refused(config)
    assert problem in message and f"nearest mesh that works is {advice}" in message


def test_a_mesh_that_does_not_divide_the_model_or_the_rows_is_refused():
    message = refused(MeshConfig(1, 1, 8), Dimension("heads", 4, "the heads"), Dimension("rows", 2, "config.rows"))
    assert "tensor = 8 does not divide the heads 4" in message
    assert "nearest mesh that works is data=1,fsdp=2,tensor=4" in message
    assert "no mesh of them works" in refused(MeshConfig(), Dimension("heads", 1, "h"), Dimension("rows", 3, "rows"))


@pytest.mark.parametrize("config", [MeshConfig(-1, -1, 1), MeshConfig(0, 1, 1), MeshConfig(slices=0)])
def test_sizes_must_be_sizes(config):
    assert "one of them may be -1" in refused(config)


def test_constraints_vanish_without_a_mesh():
    x = jnp.ones((4, 3, 8))
    assert sharding.constrain(x, ("rows", "tokens", "residual")) is x
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        assert sharding.constrain(x, ("rows", "tokens", "residual")) is x
