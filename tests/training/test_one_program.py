"""A short run as one set of compiled programs: what compiles when, what crosses between host and device, and where.

XLA's CPU guards transfers to the device only, so reads from it are counted by watching the array type itself.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from gdsd_jax import config as settings
from gdsd_jax import hub
from gdsd_jax import train as walk
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.denoiser import DenoiserConfig, init_base
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.sampler import compiled_sample
from gdsd_jax.evaluation import completions
from gdsd_jax.hub import tiny
from gdsd_jax.runtime import transfer
from gdsd_jax.training import checkpoint, rollout

pytestmark = pytest.mark.usefixtures("quick_compilation")

ITERATIONS, EVERY, HELD_OUT, EVAL_ROWS = 50, 10, 5, 2
COMPILED = "/jax/core/compile/backend_compile_duration"


def tiny_run(directory) -> TrainConfig:
    """A run on a random checkpoint of one layer, 20 tokens a puzzle."""
    tiny.build(directory, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
    config = settings.default(checkpoint=str(directory))
    with config.unlocked():
        config.task.settings = {"template": "{puzzle}", "system": ""}
        config.task.train_rows = 32
        config.prompt_buckets = (18,)
        config.model.update(dtype="float32", remat="none")
        config.lora.update(rank=2, alpha=4.0, targets=("v", "down"), dropout=0.0)
        config.sampler.update(completion_length=20, steps=4, block_length=20)
        config.update(prompts_per_iteration=2, group_size=2, inner_updates=2, microbatch_rows=2, save_every=20)
        config.update(iterations=ITERATIONS)
        # Which prompts an iteration skips must not affect the shapes.
        config.refill.revisit = 0.5
        config.evaluation.update(every=EVERY, count=HELD_OUT, batch_rows=EVAL_ROWS, evaluation_prompt=False)
    return freeze(TrainConfig, config)


class Watch:
    """Counts of compilations, of fetches, and of reads of device arrays outside a fetch or a checkpoint."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.compilations = self.fetches = self.depth = 0
        self.strays: list[str] = []
        self.at_step: dict[int, int] = {}
        self.programs = {}
        jax.monitoring.register_event_duration_secs_listener(self._event)

        @contextlib.contextmanager
        def allowed():
            self.depth += 1
            yield
            self.depth -= 1

        def fetch(tree, original=transfer.fetch):
            self.fetches += 1
            with allowed():
                return original(tree)

        def saving(original):
            def save(manager, *args):
                with allowed():
                    original(manager, *args)

            return save

        def write(writer, step, metrics, original=walk.MetricWriter.write):
            self.at_step[step] = self.compilations
            original(writer, step, metrics)

        def make_inner_update(*args, original=walk.make_inner_update, **kwargs):
            update = original(*args, **kwargs)

            def wrapped(*values, by_component):
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
                self.programs["first" if values[2] is None else "later"] = update, shapes
                return update(*values, by_component=by_component)

            return wrapped

        def stray(name, original):
            def reading(array, *args, **kwargs):
                if isinstance(array, jax.Array) and not self.depth:
                    self.strays.append(name)
                return original(array, *args, **kwargs)

            return reading

        for module in (rollout, completions, walk):
            patch.setattr(module, "fetch", fetch)
        patch.setattr(checkpoint.Checkpoints, "save", saving(checkpoint.Checkpoints.save))
        patch.setattr(checkpoint.Best, "offer", saving(checkpoint.Best.offer))
        patch.setattr(walk.MetricWriter, "write", write)
        patch.setattr(walk, "make_inner_update", make_inner_update)
        patch.setattr(ArrayImpl, "_value", property(stray("value", ArrayImpl._value.fget)))
        for name in ("__array__", "item", "tolist"):
            patch.setattr(ArrayImpl, name, stray(name, getattr(ArrayImpl, name)))
        for name in ("asarray", "array", "asanyarray"):
            patch.setattr(np, name, stray(name, getattr(np, name)))

    def _event(self, name: str, seconds: float, **_) -> None:
        self.compilations += name == COMPILED

    def close(self):
        jax.monitoring.unregister_event_duration_listener(self._event)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of fifty iterations under watch, and its config."""
    # Another test's run of the same shapes would have compiled for this one.
    jax.clear_caches()
    directory = tmp_path_factory.mktemp("run")
    config = tiny_run(directory / "start")
    samplers = compiled_sample._cache_size()
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        # Set-up reads and compiles freely; the watch over reads begins with the first prompts.
        first = rollout.Prompts.pick

        def pick(prompts, *args):
            if not watch.at_step and not watch.fetches:
                watch.strays.clear()
            return first(prompts, *args)

        patch.setattr(rollout.Prompts, "pick", pick)
        walk.train(config, directory / "run")
        watch.close()
    watch.samplers = compiled_sample._cache_size() - samplers
    return config, watch


def test_nothing_is_compiled_after_the_first_iteration_of_each_shape(run):
    _, watch = run
    steps = sorted(watch.at_step)
    assert steps == list(range(1, ITERATIONS + 1))
    assert watch.at_step[1] > 0
    later = [step for step in steps if step > 1 and watch.at_step[step] > watch.at_step[step - 1]]
    # Step 10 has the first evaluation: its sampler is greedy, its batch of another size. Counted with the step after
    # them: the checksum of the first best parameters, saved at 10, and that of the first checkpoint, saved at 20.
    assert later == [EVERY, EVERY + 1, 21]


def test_update_and_sampler_are_two_programs_each(run):
    """The first inner update does without the old policy; the evaluation samples greedily."""
    _, watch = run
    update, _ = watch.programs["later"]
    assert update._cache_size() == 2
    assert watch.samplers == 2


def test_results_come_back_through_fetch_alone(run):
    _, watch = run
    evaluations, batches = ITERATIONS // EVERY, -(-HELD_OUT // EVAL_ROWS)
    # An iteration fetches the draws of its prompts, its completions and its metrics.
    assert watch.fetches == 3 * ITERATIONS + evaluations * batches
    assert watch.strays == []


def test_watch_sees_reads(monkeypatch):
    watch = Watch(monkeypatch)
    watch.close()
    x = jnp.arange(3.0)
    reads = (lambda: float(x[0]), lambda: np.asarray(x), lambda: np.array(x), lambda: x.tolist(), lambda: f"{x[0]:.1f}")
    for number, read in enumerate(reads):
        watch.strays.clear()
        read()
        assert watch.strays, number
    watch.strays.clear()
    rollout.fetch(x)
    assert (watch.strays, watch.fetches) == ([], 1)


def host_calls(program) -> list[str]:
    """What a lowered program calls on the host: callbacks, and the operations that feed and empty a running program."""
    return re.findall(r"custom_call @\w*callback\w*|stablehlo\.(?:infeed|outfeed|send|recv)\b", program.as_text())


def test_programs_hold_no_callback(run):
    config, watch = run
    assert set(watch.programs) == {"first", "later"}
    printing = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0)
    assert host_calls(printing)
    for update, shapes in watch.programs.values():
        assert not host_calls(update.lower(*shapes))
    state, base, _, batch = watch.programs["later"][1]
    model, _ = hub.load_checkpoint(config.checkpoint)
    prompts = jax.ShapeDtypeStruct(batch.prompt_mask.shape, jnp.int32)
    lowered = compiled_sample.lower(model, base, state.params, prompts, batch.prompt_mask, state.key, config.sampler)
    assert not host_calls(lowered)


def test_an_implicit_transfer_inside_the_loop_raises(run, tmp_path, monkeypatch):
    config, _ = run

    def transferring(*args, **kwargs):
        return jnp.sin(np.ones(3, np.float32))

    monkeypatch.setattr(walk, "roll_out", transferring)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        walk.train(config, tmp_path / "run")


def test_sampler_compiles_once_per_prompt_bucket():
    model = DenoiserConfig(
        family="llada",
        vocab_size=32,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=16,
        max_length=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        tied_head=False,
        next_token_logits=False,
        mask_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
    )
    base = init_base(model, jax.random.key(0))
    sampler = SamplerConfig(completion_length=4, steps=2, block_length=4, strategy="low_confidence", temperature=1.0)
    before = compiled_sample._cache_size()
    for seed, length in enumerate((3, 5, 3, 5, 3)):
        prompts = np.full((2, length), 7, np.int32)
        mask = np.arange(length) >= np.array([[seed % 2], [0]])
        sample(model, base, None, prompts, mask, jax.random.key(seed), sampler)
    assert compiled_sample._cache_size() - before == 2
