"""The settings of a run, from a config file and the command line to frozen dataclasses.

A config file (`configs/*.py`) returns a locked `ConfigDict` with exactly the fields of `TrainConfig`. `freeze` converts
it, and refuses a field that is missing, unknown or of another type. No code below the commands sees a ConfigDict.
"""

from gdsd_jax.config.freeze import default, freeze, to_dict
from gdsd_jax.config.greedy import greedy_sampler
from gdsd_jax.config.read import read_config
from gdsd_jax.config.schema import (
    CheckpointOverrides,
    EvalConfig,
    LoRAConfig,
    ModelConfig,
    TaskConfig,
    TinyConfig,
    TrainConfig,
)
from gdsd_jax.config.updates import OptimizerConfig, ReferenceConfig, RefillConfig, SFTConfig
from gdsd_jax.runtime.hosts import HostsConfig
from gdsd_jax.runtime.sharding import MeshConfig

__all__ = [
    "CheckpointOverrides",
    "EvalConfig",
    "HostsConfig",
    "LoRAConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ReferenceConfig",
    "RefillConfig",
    "SFTConfig",
    "TaskConfig",
    "TinyConfig",
    "TrainConfig",
    "default",
    "freeze",
    "greedy_sampler",
    "read_config",
    "to_dict",
]
