"""Runs one of several processes that save a state and best parameters at the same time, repeatedly, as a run does.

JAX_COORDINATOR_ADDRESS=... JAX_NUM_PROCESSES=... JAX_PROCESS_ID=... python tests/multi_saves.py CONFIG_FILE WORKDIR
"""

import os
import sys
from pathlib import Path

SAVES = 10


def main(file: Path, workdir: Path) -> None:
    import jax
    import jax.numpy as jnp

    from gdsd_jax.config import HostsConfig, TrainConfig, freeze, read_config
    from gdsd_jax.runtime import hosts
    from gdsd_jax.training.checkpoint import Best, Checkpoints
    from gdsd_jax.training.cursor import Cursor
    from gdsd_jax.training.state import TrainState

    hosts.initialize(HostsConfig())
    jax.set_mesh(jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)))

    @jax.jit
    def make() -> TrainState:
        params = {"w": jax.lax.with_sharding_constraint(jnp.arange(8000.0).reshape(8, -1), jax.P("fsdp"))}
        return TrainState(params, (), jnp.int32(0), jnp.int32(0), jax.random.key(0))

    config, state = freeze(TrainConfig, read_config(file)), make()
    with Checkpoints(workdir, config, state) as checkpoints, Best(workdir, 0, "eval/reward") as best:
        for iteration in range(1, SAVES + 1):
            best.offer(iteration, state.params, float(iteration))
            checkpoints.save(iteration, state, Cursor(iteration))


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    main(Path(sys.argv[1]), Path(sys.argv[2]))
