"""Published figures of the chips that can be planned for, and the topologies they come in.

Peak compute, HBM and interconnect are those of Google's pages on each chip (docs.cloud.google.com/tpu/docs/v5e, /v5p,
/v6e). Usable HBM is what the compiler grants a program; it says so when one does not fit.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any, NamedTuple

from gdsd_jax.runtime.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One chip.

    flops: bf16 FLOP/s; hbm_bandwidth: bytes/s; hbm_bytes: usable.
    ici_bandwidth: bytes/s that it can send while it receives as many, over all of its links: half of the published
      bidirectional figure.
    dimensions: of the torus; a chip has two links along each.
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
        """Bytes/s that the chip with the fewest neighbours can send: what bounds a collective over all chips.

        A dimension closes to a ring at 16 chips on v5e and v6e, and on v5p where the slice is made of whole cubes of
        4 x 4 x 4; elsewhere the chips at its ends have one link along it, and none if the dimension is one chip.
        """
        ring = (lambda size: size == 16) if self.chip.dimensions == 2 else lambda _: all(n % 4 == 0 for n in self.sizes)
        links = sum(0 if size == 1 else 2 if ring(size) else 1 for size in self.sizes)
        return self.chip.ici_bandwidth * links / (2 * self.chip.dimensions)


def parse_topology(name: str) -> Slice:
    """The slice called CHIP:SIZE, such as v5e:2x4 or v5p:2x4x4; sizes count chips.

    Raises:
      UserError: an unknown chip, or sizes in another number of dimensions than its torus has.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology {name!r}: write CHIP:SIZE, such as v5p:2x4x4, with a chip of {', '.join(CHIPS)}")
    sizes = text.split("x")
    wanted = CHIPS[kind].dimensions
    if len(sizes) != wanted or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"--topology {name!r}: {kind} slices have {wanted} sizes, such as {'x'.join('4' * wanted)}")
    return Slice(name, CHIPS[kind], tuple(map(int, sizes)))


def devices(topology: Slice) -> list[Any]:
    """Devices of the slice, to compile for and not to run on.

    Raises:
      UserError: libtpu, which compiles for TPUs, is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed here: `make venv-tpu`, then .venv-tpu/bin/python -m gdsd_jax.plan ...")
    # Late, with the compiler told not to look for a TPU on this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:
        raise UserError(f"--topology {topology.name}: libtpu does not know it ({str(error).splitlines()[0]})") from None
