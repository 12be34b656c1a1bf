"""Defines where arrays live: the axes of the device mesh, a table from logical to mesh axes, and constraints by name.

    data    holds copies of the model, each of which has rows of its own; the only axis that crosses between slices
    fsdp    divides the rows too, and cuts every matrix along the model dimension; matrices are gathered for their use
    tensor  cuts the heads, the hidden layer of the MLP and the vocabulary

Other modules name the logical axes of their arrays and leave the rest to this file. The current mesh is JAX's own
(`jax.set_mesh`); without one, or on a single device, constraints do nothing, so that one CPU runs the same code.
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

# Logical axis -> mesh axes. `embed` is the model dimension of parameters, `residual` that of activations. The rank axis
# of an adapter's matrix is `lora_rank` if the other axis is `embed`, and `lora_rank_split` if that leaves fsdp unused.
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
    # While tokens are drawn, each device has the whole vocabulary for some of the positions.
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
    """A size of the logical axis `axis` that the mesh must divide, and its name in error messages."""

    axis: str
    size: int
    name: str


# ----------------------------------------------------------------------------------------------------------- the mesh


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, *, dimensions: Iterable[Dimension] = ()
) -> Mesh:
    """Returns the mesh of a run, with the axes `AXES`, over `devices` (None: all devices of the job).

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not divide a dimension; the message names the
        nearest mesh that does both.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _resolve(config, len(devices), tuple(dimensions))
    if config.slices == 1:
        arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices)
    else:
        inside = (shape[0] // config.slices, *shape[1:])
        # CPU devices do not belong to slices; there, each process counts as a slice.
        by_process = not hasattr(devices[0], "slice_index")
        arrange = functools.partial(
            mesh_utils.create_hybrid_device_mesh, inside, (config.slices, 1, 1), devices, process_is_granule=by_process
        )
    try:
        arranged = arrange()
    except NotImplementedError:
        # The sizes are no products of the slice's own, such as 16 x 4 on 8 x 8 chips: a row of chips must be split.
        arranged = arrange(allow_split_physical_axes=True)
    return automatic(Mesh(arranged, AXES))


def automatic(mesh: Mesh) -> Mesh:
    """Returns the mesh with axes along which the compiler chooses how results lie.

    `jax.make_mesh` gives axes of another type, under which every operation on sharded arrays states its result's place.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


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
    """Returns the reason why a mesh cannot have this shape, or None if it can."""
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
    """Returns the mesh axes of an array with these logical axes.

    Raises:
      ValueError: a logical axis is unknown, or two of them use the same mesh axis.
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
    """Returns `spec` for one shape: each dimension is cut along the leading mesh axes of its own that divide it.

    Four key/value heads on a tensor axis of eight, for example, are kept whole on each device, which is correct and
    costs memory. `make_mesh` checks the dimensions that must be cut.
    """
    spec(axes)
    return PartitionSpec(*(_leading(mesh, RULES[axis], size) or None for axis, size in zip(axes, shape, strict=True)))


def _leading(mesh: Mesh | AbstractMesh, names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns as many of the mesh axes `names`, from the first on, as together divide `size`.

    Axes that the mesh lacks are left out, so a mesh of the user's own need not have all of `AXES`.
    """
    names = tuple(name for name in names if name in mesh.shape)
    fits = lambda count: size % math.prod(mesh.shape[name] for name in names[:count]) == 0  # noqa: E731
    return names[: max(filter(fits, range(len(names) + 1)))]


def named_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of one array."""
    return NamedSharding(mesh, fitted_spec(mesh, axes, shape))


def shardings(mesh: Mesh, axes: Any, arrays: Any) -> Any:
    """Returns a sharding for every leaf of `arrays`.

    Args:
      axes: tuples of logical axes, such as those of `denoiser.logical_axes`, in the structure of `arrays`.
      arrays: arrays or their shapes.
    """
    return jax.tree.map(lambda array, names: named_sharding(mesh, names, array.shape), arrays, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(arrays: Any, places: Any) -> Any:
    """Sends arrays that every process holds whole to the devices; each process sends what its own devices hold."""

    def one(array: Any, place: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        pieces = place.addressable_devices_indices_map(array.shape)
        # Made by hand, because a transfer guard does not regard make_array_from_callback as an explicit transfer.
        parts = [jax.device_put(array[index], device) for device, index in pieces.items()]
        return jax.make_array_from_single_device_arrays(array.shape, place, parts)

    return jax.tree.map(one, arrays, places)


def current() -> AbstractMesh:
    """Returns the current mesh, which is empty if none is set.

    Raises:
      UserError: its axes are of the type Explicit, under which every operation on cut arrays states its result's place.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        raise UserError(
            f"the current mesh {dict(mesh.shape)} has axes of the type Explicit, the default of jax.make_mesh: give it "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )
    return mesh


def constrain(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Fixes how an intermediate result lies on the current mesh; does nothing without a mesh of several devices."""
    mesh = current()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitted_spec(mesh, axes, x.shape))


def alone() -> bool:
    """Tells whether programs are for a single device: no mesh is set, or one of one device."""
    mesh = current()
    return mesh.empty or mesh.size == 1


def gathered(weights: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Gathers parameters with these logical axes along fsdp, for the product that reads them next.

    If a matrix is cut along the axis that a product contracts, the TPU compiler passes shards around in a loop, which
    reads and writes the whole result once for each shard and adds partial sums in the result's dtype.
    """
    if alone():
        return weights
    mesh = current()
    # The first constraint keeps the parameters as they lie. In the backward pass it comes last and scatters the
    # gradient, which is summed over the shards, over them again.
    weights = jax.lax.with_sharding_constraint(weights, fitted_spec(mesh, axes, weights.shape))
    kept = ([n for n in _leading(mesh, RULES[a], s) if n != "fsdp"] for a, s in zip(axes, weights.shape, strict=True))
    return jax.lax.with_sharding_constraint(weights, PartitionSpec(*(tuple(names) or None for names in kept)))


def pieces(axis: str, size: int) -> int:
    """Returns the number of pieces into which the current mesh cuts a dimension of logical axis `axis`."""
    mesh = current()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in _leading(mesh, RULES[axis], size))
