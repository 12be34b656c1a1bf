"""Where arrays live: the axes of the device mesh, one table from logical to mesh axes, and constraints by name.

    data    copies of the model, each on rows of its own; the only axis that crosses between slices
    fsdp    rows too, and every matrix is cut along the model dimension and gathered where it is used
    tensor  heads, the hidden layer of the MLP and the vocabulary

Everything above names the axes of its arrays and leaves the rest to this file. The current mesh is JAX's own
(`jax.set_mesh`); without one, or on a single device, constraints vanish, so that one CPU runs the same code.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import Count, Range

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. `embed` is the model dimension of parameters, `residual` that of activations. The rank of
# an adapter's matrix is `lora_rank` beside `embed`, and `lora_rank_split` where the other side leaves fsdp free.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "layers": (),
    "lora_rank": (),
    "lora_rank_split": ("fsdp",),
    "rows": ("data", "fsdp"),
    "micro_batches": (),
    "views": (),
    "tokens": (),
    "residual": (),
    "head_dim": (),
    # Where a token is drawn, each device has the whole vocabulary for some of the positions.
    "positions": ("tensor",),
    "candidates": (),
}


Extent = Annotated[int, Range(-1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; of the three sizes one may be -1, for what the others leave.

    Attributes:
      data: copies of the model.
      fsdp: parts into which every matrix is cut along the model dimension.
      tensor: parts into which heads, MLP and vocabulary are cut.
      slices: number of TPU slices, which the data axis spans over the data-center network.
    """

    data: Extent = 1
    fsdp: Extent = -1
    tensor: Extent = 1
    slices: Count = 1


class Dimension(NamedTuple):
    """A size that the mesh must divide: of logical axis `axis`, and what to call it in a message."""

    axis: str
    size: int
    name: str


# ----------------------------------------------------------------------------------------------------------- the mesh


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, *, dimensions: Iterable[Dimension] = ()
) -> Mesh:
    """The mesh of a run, axes `AXES`, over `devices` (None: all of the job).

    Raises:
      UserError: sizes that do not multiply to the devices, or do not divide a dimension; the message names the nearest
        mesh that does both.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _resolve(config, len(devices), tuple(dimensions))
    if config.slices == 1:
        arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices)
    else:
        inside = (shape[0] // config.slices, *shape[1:])
        # Devices that know no slices, CPUs, stand in for them by process.
        by_process = not hasattr(devices[0], "slice_index")
        arrange = functools.partial(
            mesh_utils.create_hybrid_device_mesh, inside, (config.slices, 1, 1), devices, process_is_granule=by_process
        )
    try:
        arranged = arrange()
    except NotImplementedError:
        # No size is a product of the slice's own, such as 16 x 4 on 8 x 8 chips: a row of chips has to be cut.
        arranged = arrange(allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _resolve(config: MeshConfig, count: int, dimensions: tuple[Dimension, ...]) -> tuple[int, int, int]:
    wanted = (config.data, config.fsdp, config.tensor)
    open_axes = [axis for axis, size in zip(AXES, wanted, strict=True) if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in (*wanted, config.slices)):
        raise UserError(f"config.mesh {_text(wanted)}: sizes are at least 1, and one of them may be -1 (what is left)")
    known = math.prod(size for size in wanted if size != -1)
    filled = tuple(max(count // known, 1) if size == -1 else size for size in wanted)
    problem = _problem(filled, count, config.slices, dimensions)
    if problem is None:
        return filled
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    works = [s for s in itertools.product(sizes, repeat=3) if _problem(s, count, config.slices, dimensions) is None]
    distance = lambda shape: sum(abs(math.log(a / b)) for a, b in zip(shape, filled, strict=True))  # noqa: E731
    advice = f"the nearest mesh that works is {_text(min(works, key=distance))}" if works else "no mesh of them works"
    raise UserError(f"config.mesh {_text(filled)} on {count} devices: {problem}; {advice}")


def _problem(shape: tuple[int, ...], count: int, slices: int, dimensions: tuple[Dimension, ...]) -> str | None:
    """What stands against a mesh of this shape."""
    if math.prod(shape) != count:
        return f"the sizes multiply to {math.prod(shape)}"
    if shape[0] % slices:
        return f"data is not a multiple of the {slices} slices"
    extent = dict(zip(AXES, shape, strict=True))
    for axis, size, name in dimensions:
        over = math.prod(extent[mesh_axis] for mesh_axis in RULES[axis])
        if size % over:
            return f"{' x '.join(RULES[axis])} = {over} does not divide {name} {size}"
    return None


def _text(shape: Iterable[int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


# ---------------------------------------------------------------------------------------------------------- the arrays


def spec(axes: Sequence[str]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Raises:
      ValueError: an unknown logical axis, or two that claim one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; RULES has {', '.join(RULES)}")
    used = [mesh_axis for axis in axes for mesh_axis in RULES[axis]]
    twice = [mesh_axis for mesh_axis in AXES if used.count(mesh_axis) > 1]
    if twice:
        raise ValueError(f"logical axes {tuple(axes)} lie on the mesh axis {twice[0]!r} more than once")
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def fitted_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """`spec` for one shape: a dimension is cut along the leading ones of its mesh axes as far as they divide it.

    Four key/value heads on a tensor axis of eight are so kept whole on each device: right, at the price of memory.
    What must be cut is checked by `make_mesh`.
    """
    spec(axes)
    return PartitionSpec(*(_leading(mesh, RULES[axis], size) or None for axis, size in zip(axes, shape, strict=True)))


def _leading(mesh: Mesh | AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """As many of the mesh axes `names`, from the first on, as divide `size`."""
    fits = lambda count: size % math.prod(mesh.shape[name] for name in names[:count]) == 0  # noqa: E731
    return names[: max(filter(fits, range(len(names) + 1)))]


def named_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """The sharding of one array."""
    return NamedSharding(mesh, fitted_spec(mesh, axes, shape))


def shardings(mesh: Mesh, axes: Any, arrays: Any) -> Any:
    """A sharding for every leaf of `arrays`.

    Args:
      axes: tuples of logical axes, such as `denoiser.logical_axes` gives, in the structure of `arrays`.
      arrays: arrays or their shapes.
    """
    return jax.tree.map(lambda array, names: named_sharding(mesh, names, array.shape), arrays, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(arrays: Any, places: Any) -> Any:
    """Arrays of the host, whole in every process, on the devices; each process sends what its own devices hold."""

    def one(array: Any, place: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        pieces = place.addressable_devices_indices_map(array.shape)
        # By hand, because make_array_from_callback is no explicit transfer in the eyes of a transfer guard.
        parts = [jax.device_put(array[index], device) for device, index in pieces.items()]
        return jax.make_array_from_single_device_arrays(array.shape, place, parts)

    return jax.tree.map(one, arrays, places)


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Fixes how an intermediate result lies on the current mesh; the identity where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted_spec(mesh, axes, x.shape))


def gathered(weights: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Parameters with these logical axes, whole along fsdp: for the product that reads them next.

    A matrix that is cut along the axis that a product contracts makes the TPU compiler pass shards around in a loop,
    which reads and writes the whole result once for each shard and adds partial sums in the result's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return weights
    # First as they lie, and so in the gradient last: what is summed over the shards is scattered over them again.
    weights = jax.lax.with_sharding_constraint(weights, fitted_spec(mesh, axes, weights.shape))
    kept = ([n for n in _leading(mesh, RULES[a], s) if n != "fsdp"] for a, s in zip(axes, weights.shape, strict=True))
    return jax.lax.with_sharding_constraint(weights, PartitionSpec(*(tuple(names) or None for names in kept)))


def pieces(axis: str, size: int) -> int:
    """Into how many pieces the current mesh cuts a dimension of logical axis `axis`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in _leading(mesh, RULES[axis], size))
