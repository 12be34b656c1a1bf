"""Settings and fixtures of all tests. The settings must come before JAX and the package are imported."""

import collections
import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# They are set in the environment, not in jax.config, so that processes which tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Compiled programs are kept between runs. The first run, which lacks them, must meet the time limit too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
# No test may use a network: transformers fails at once if it does not find a file on disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook  # noqa: E402

# In the rooms of array code, shapes and types of every annotated function are checked at each call; an int passes for a
# float. The other rooms are left to mypy: checking each call of a grader would cost much and find little.
ARRAY_ROOMS = [f"gdsd_jax.{room}" for room in ("denoiser", "diffusion", "methods", "training")]
install_import_hook(ARRAY_ROOMS, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from compilation import optimised  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

# There is no deadline, because the first example compiles. Examples are not random, so that a change passes or fails
# alike everywhere.
hypothesis.settings.register_profile("gdsd_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gdsd_jax")


# Files with few but long tests: training runs, whole commands, interpreted kernels.
LONG = ("attention", "resume", "one_program", "compare", "evaluate", "math_tasks", "commands", "launch", "code_task")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files for the workers: long ones first, then by their number of tests, so that no long file begins late."""
    counts = collections.Counter(item.path for item in items)
    long = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (long.get(item.path.name, len(long)), -counts[item.path], item.path.name))


NO_MESH = jax.sharding.get_mesh()


@pytest.fixture(autouse=True)
def _mesh_of_its_own():
    """Removes the mesh that a command has set, so that every test starts without one."""
    yield
    jax.set_mesh(NO_MESH)


# Half of what Linux allows a process by default (vm.max_map_count).
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Drops compiled programs when they hold many memory maps, because XLA crashes in a process with too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without most optimisations, for modules with many small programs."""
    with optimised(False):
        yield


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of recorded reference data.

    `llada_tiny_sharded` holds the weights of `llada_tiny` in shards. They are cut here by its recorded index, so that
    the same weights are not stored twice.
    """
    directory = tmp_path_factory.mktemp("golden")
    recorded = ROOT / "tests" / "golden"
    for entry in recorded.iterdir():
        if entry.name != "llada_tiny_sharded":
            (directory / entry.name).symlink_to(entry)
    sharded = directory / "llada_tiny_sharded"
    shutil.copytree(recorded / sharded.name, sharded)
    tensors = load_file(recorded / "llada_tiny" / "model.safetensors")
    shards: dict[str, dict] = {}
    for name, file in json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"].items():
        shards.setdefault(file, {})[name] = tensors[name]
    for file, part in shards.items():
        save_file(part, sharded / file, metadata={"format": "pt"})
    return directory
