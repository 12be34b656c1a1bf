"""Gives the published figures of the chips that can be planned for, and the topologies of their slices.

Peak compute, HBM and interconnect are those of Google's pages on each chip (docs.cloud.google.com/tpu/docs/v5e, /v5p,
/v6e). Usable HBM is what the compiler grants a program, as its message says when a program does not fit.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from gdsd_jax.runtime.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of chip.

    flops: peak bf16 FLOP/s; hbm_bandwidth: bytes/s; hbm_bytes: usable bytes of HBM.
    ici_bandwidth: bytes/s that the chip can send over all of its links while it receives as many: half of the published
      bidirectional figure.
    dimensions: the dimensions of the torus; a chip has two links along each.
    wraps: sizes at which a dimension closes to a ring, given all sizes of the slice.
    """

    flops: float
    hbm_bandwidth: float
    hbm_bytes: int
    ici_bandwidth: float
    dimensions: int


CHIPS = {
    "v5e": Chip(197e12, 819e9, int(15.75 * GIB), 200e9, 2),
    "v5p": Chip(459e12, 2765e9, int(95.74 * GIB), 600e9, 3),
    "v6e": Chip(918e12, 1638e9, int(31.25 * GIB), 400e9, 2),
}


class Slice(NamedTuple):
    """A named piece of a pod: `name` as in "v5p:2x4x4", its chip and its sizes."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def network_bandwidth(self) -> float:
        """Returns the bytes/s that the chip with the fewest neighbours can send, a bound on collectives over all chips.

        On v5e and v6e a dimension of 16 chips closes to a ring; on v5p all dimensions do if the slice is made of whole
        cubes of 4 x 4 x 4. Otherwise the chips at the ends of a dimension have one link along it, and along a dimension
        of one chip there is no link.
        """
        ring = (lambda size: size == 16) if self.chip.dimensions == 2 else lambda _: all(n % 4 == 0 for n in self.sizes)
        links = sum(0 if size == 1 else 2 if ring(size) else 1 for size in self.sizes)
        return self.chip.ici_bandwidth * links / (2 * self.chip.dimensions)


def parse_topology(name: str) -> Slice:
    """Returns the slice named CHIP:SIZE, such as v5e:2x4 or v5p:2x4x4; sizes count chips.

    Raises:
      UserError: the chip is unknown, or the number of sizes is not that of its torus's dimensions.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology {name!r}: write CHIP:SIZE, such as v5p:2x4x4, with a chip of {', '.join(CHIPS)}")
    sizes = text.split("x")
    wanted = CHIPS[kind].dimensions
    if len(sizes) != wanted or not all(re.fullmatch("[1-9][0-9]{0,3}", size) for size in sizes):
        raise UserError(f"--topology {name!r}: {kind} slices have {wanted} sizes, such as {'x'.join('4' * wanted)}")
    return Slice(name, CHIPS[kind], tuple(map(int, sizes)))


def devices(topology: Slice) -> list[Any]:
    """Returns the devices of the slice. Programs can be compiled for them, but not run on them.

    Raises:
      UserError: libtpu, which compiles for TPUs, is not installed or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed here: `make venv-tpu`, then .venv-tpu/bin/python -m gdsd_jax.plan ...")
    # These variables keep the compiler from looking for a TPU on this machine; they must be set before the import.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    # By default a host has 2 x 2 chips or more, which a smaller slice is not made of.
    sizes = [*topology.sizes, 1][:3]
    small = {"chips_per_host_bounds": sizes} if any(size % 2 for size in topology.sizes[:2]) else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **small).devices)
    except Exception as error:
        raise UserError(f"--topology {topology.name}: libtpu does not know it ({str(error).splitlines()[0]})") from None
