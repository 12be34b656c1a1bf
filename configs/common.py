"""The parts that configs share: recipes of published models, TPU slices, the embedded model, settings of comparisons.

This file is not a config itself. Configs import it as `common`, because the directory of a config file is on Python's
path while the file is read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from gdsd_jax import config as settings
from gdsd_jax.families import family_named, family_of
from gdsd_jax.hub import architecture
from gdsd_jax.runtime.errors import UserError

# Default directories of Hugging Face checkpoints; `--config.checkpoint` names another one.
CHECKPOINTS = {
    "llada": "checkpoints/LLaDA-8B-Instruct",
    "dream": "checkpoints/Dream-v0-Instruct-7B",
    "diffucoder": "checkpoints/DiffuCoder-7B-Instruct",
    "qwen3": "checkpoints/Qwen3-0.6B-diffusion-mdlm-v0.1",
    "coder": "checkpoints/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
    "sdar": "checkpoints/SDAR-1.7B-Chat",
    "sdar4b": "checkpoints/SDAR-4B-Chat",
    "fastdllm": "checkpoints/Fast_dLLM_v2_1.5B",
    "illada": "checkpoints/iLLaDA-8B-Instruct",
    "mmada": "checkpoints/MMaDA-8B-MixCoT",
}
# Runs of the recipes for one accelerator, MODEL_PART: "lora" trains adapters; "full" trains all parameters, for models
# below a billion.
SMALL_RUNS = ("qwen3_lora", "qwen3_full", "coder_lora", "coder_full", "sdar_lora", "fastdllm_lora")
# Published sizes, in billions of parameters, and a model of each, for `sizes_pod`.
SIZES = {"0.5b": "coder", "0.6b": "qwen3", "1.5b": "fastdllm", "1.7b": "sdar", "4b": "sdar4b"}
SIZES |= {"7b": "dream", "8b": "llada"}
# Runs of most baselines, MODEL_TASK.
LLADA_RUNS = ("llada_sudoku", "llada_countdown", "llada_gsm8k", "llada_math")
DREAM_RUNS = ("dream_sudoku", "dream_countdown")
# Accelerator types with their topology, the rows of a micro-batch (at least one per chip, and at least a group) and
# `model.remat`. Types of v5p count cores, two per chip; topologies count chips. v5e-8 is a single host. The mesh is the
# default, all chips along fsdp: gathering the weights takes less time than the matrix products, so no other mesh makes
# these programs faster.
SLICES = {
    "v5e-8": ("v5e:2x4", 16, "full"),
    "v5e-64": ("v5e:8x8", 64, "dots"),
    "v5p-32": ("v5p:2x2x4", 16, "dots"),
    "v5p-64": ("v5p:2x4x4", 32, "dots"),
    "v5p-128": ("v5p:4x4x4", 64, "dots"),
}


def recipe(
    model: str,
    task: str,
    method: str,
    *,
    learning_rate: float,
    inner_updates: int = 8,
    prompts: int = 20,
    group: int = 16,
    microbatch_rows: int = 16,
    **method_settings: Any,
) -> ConfigDict:
    """Returns the config of a published recipe, with GDSD's values for whatever its paper leaves open.

    The learning rate warms up over the updates of the first iteration. Models other than LLaDA sample in Dream's
    entropy order, without blocks.

    Args:
      model: a key of `CHECKPOINTS`.
      prompts, group: prompts of an iteration, and completions of each.
      method_settings: settings of the method.
    """
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name, config.method = task, method
        config.settings[method] = method_settings
        config.prompts_per_iteration, config.group_size = prompts, group
        config.inner_updates, config.microbatch_rows = inner_updates, microbatch_rows
        config.optimizer.update(learning_rate=learning_rate, warmup_updates=inner_updates)
        if model != "llada":
            config.sampler.update(block_length=256, strategy="entropy", top_p=0.95)
    return config


def one_device(
    run: str,
    task: str,
    *,
    rows: int,
    runs: Sequence[str] = SMALL_RUNS,
    weights: str = "stored",
    lion: bool = False,
) -> ConfigDict:
    """Returns a recipe for one accelerator: GDSD on 8 prompts of 8 completions, with its authors' sampler.

    Args:
      run: one of `runs`, MODEL_PART; "full" trains all parameters, at a tenth of the adapters' learning rate.
      rows: rows of a micro-batch, as many as the accelerator holds.
      weights: `config.model.weights`.
      lion: whether the optimizer is Lion, which has one moment, at a third of AdamW's learning rate.
    """
    model, part = chosen(run, runs)
    config = settings.default(checkpoint=CHECKPOINTS[model])
    with config.unlocked():
        config.task.name, config.method = task, "gdsd"
        config.settings["gdsd"] = {"psi": 10.0, "beta": 1e-3, "views": 2}
        config.prompts_per_iteration, config.group_size, config.microbatch_rows = 8, 8, rows
        config.inner_updates = 4
        config.lora.rank = 64 if part == "lora" else 0
        config.optimizer.update(learning_rate=1e-5 if part == "lora" else 1e-6, warmup_updates=4)
        config.model.weights = weights
        if lion:
            config.optimizer.update(name="optax:lion", learning_rate=config.optimizer.learning_rate / 3)
            config.optimizer.settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.03}
        config.sampler.update(**family_of(architecture(config.checkpoint)).sampler)
    return config


def chosen(run: str, runs: Sequence[str]) -> list[str]:
    """Splits the word after the colon of `--config` at its underscore; raises UserError unless it is one of `runs`."""
    if run not in runs:
        raise UserError(f"{run!r} is not one of {', '.join(runs)}: change the word after the colon of --config")
    return run.split("_", 1)


def runs_of(slices: Iterable[str], tasks: Iterable[str]) -> tuple[str, ...]:
    """Returns the words SLICE_TASK that a pod config takes after the colon."""
    return tuple(f"{name}_{task}" for name in slices for task in tasks)


def on_slice(run: str, slices: dict[str, tuple[str, int, str]], recipes: dict[str, Any], *, prompts: int) -> ConfigDict:
    """Returns the recipe of the task in `run`, SLICE_TASK, with the sizes of its slice and `prompts` groups of 16."""
    name, task = chosen(run, runs_of(slices, recipes))
    config = recipes[task].get_config()
    config.prompts_per_iteration, config.group_size = prompts, 16
    _, config.microbatch_rows, config.model.remat = slices[name]
    return config


def embedded_sudoku(family: str = "llada") -> ConfigDict:
    """Returns GDSD on 4x4 Sudoku with the embedded 0.2M-parameter model: forty iterations of 64 x 8 completions.

    The first run makes the start by supervised training on careless demonstrations, in which a quarter of the empty
    cells hold a 1, right or wrong. It stops at 20 % of the validation puzzles, to leave something to learn.

    Args:
      family: name of a model family, which decides the format, the blocks of attention and the order of commits.
    """
    known = family_named(family)
    config = settings.default(checkpoint=f"runs/start{'' if family == 'llada' else '_' + family}/merged")
    with config.unlocked():
        config.tiny.family = family
        config.task.update(name="sudoku", train_rows=8192)
        # The tokenizer knows characters, so the puzzle is the whole prompt: 16 cells and two turn markers.
        config.task.settings = {"template": "{puzzle}"}
        config.prompt_buckets, config.overlong_prompts = (18,), "error"
        config.model.update(dtype="float32", remat="none", layer_unroll=3)
        config.sft.update(steps=2000, batch_rows=64, careless=0.25, until=0.2)
        config.sft.optimizer.update(learning_rate=2e-3, clip_norm=1.0, warmup_updates=50, schedule="constant")
        # One token per step, and all tokens above the threshold at once: the same completions in half the passes.
        config.sampler.update(completion_length=20, steps=20, block_length=20, temperature=1.0, threshold=0.9)
        if family != "llada":
            config.tiny.num_kv_heads = 2
        if known.sampler.get("strategy") == "entropy":
            config.sampler.update(strategy="entropy", threshold=None)
        if "block_size" in known.quirks:
            config.tiny.block_size = config.sampler.block_length = 4
            config.sampler.lead = known.sampler.get("lead", False)
        config.lora.update(rank=16, alpha=32.0, dropout=0.0)
        config.optimizer.update(clip_norm=0.02, weight_decay=0.0, warmup_updates=5, schedule="linear")
        # With one update per rollout the old and new policy are equal, so a trust region has nothing to clip.
        guidance = {"psi": 1.0, "beta": 0.0, "eps_low": 1.0, "eps_high": 1e9, "views": 1, "weighting": "plain"}
        # Few of the 128 tokens ever compete for a cell, so the 8 largest logits are enough for centring.
        config.settings = {"gdsd": guidance, "gdsd_tlc": {**guidance, "top_k": 8}}
        # Evaluations use the prompt and length of training, and one token per step.
        config.evaluation.update(every=10, steps=20, batch_rows=128, evaluation_prompt=False, lengths=(20,))
    config.iterations, config.save_every, config.seed = 40, 20, 0
    config.prompts_per_iteration, config.group_size = 64, 8
    config.inner_updates, config.microbatch_rows = 1, 128
    config.optimizer.learning_rate = 1e-3
    return config


def with_biased_start(config: ConfigDict) -> ConfigDict:
    """Gives `embedded_sudoku` a start that knows more of Sudoku and has a worse habit.

    In its demonstrations four in ten empty cells hold a 1. The model learns the rules from the other cells, and the
    reward corrects the habit. The rate falls to 0 over all steps; at a constant rate the accuracy jumps by ten points
    within fifty steps, so that where training stops depends on rounding.
    """
    config.checkpoint = "runs/start_biased/merged"
    config.sft.update(careless=0.4, until=0.0)
    config.sft.optimizer.schedule = "cosine"
    return config


# Settings of the other methods under GDSD's protocol: no KL to the reference (only DMPO needs the reference, for its
# weights), and one view or pair of views of each completion if the method has a choice.
COMPARED = {
    "gdsd_teacher": {"psi": 1.0, "beta": 0.0, "views": 1},
    "espo": {"beta": 0.0, "views": 1},
    # The exponent of the bound is SPG's own for Sudoku; the block is the sampler's.
    "spg": {"eubo_beta": 1.0, "num_t": 2, "block_length": 20},
    "diffu_grpo": {"beta": 0.0},
    "wd1": {},
    "coupled_grpo": {"beta": 0.0},
    "unigrpo": {"beta": 0.0},
    "dmpo": {"pairs": 1},
    "tracerl": {"beta": 0.0},
    "exact_pg": {},
    "just_grpo": {},
    "stable_drl": {"eubo_beta": 1.0, "num_t": 2, "block_length": 20},
    "agrpo": {"steps": 8},
    "egspo": {"beta": 0.0},
    "gdpo": {},
    "rspo": {"views": 1},
    "trafl": {"views": 1},
}

# Settings of compare_stability. GDSD's objectives have the paper's guidance, 10 for a sequence (here of 20 tokens).
# `REGIONS` adds their trust regions: none ("open"), or that of each objective's public recipe ("own").
STABILITY = {
    "gdsd": {"psi": 0.5},
    "gdsd_tlc": {"psi": 0.5},
    "gdsd_teacher": {"psi": 0.5},
    "exact_pg": {"steps": 4, "at_once": 4},
    "just_grpo": {"at_once": 20},
}
REGIONS = {
    "open": STABILITY,
    "own": STABILITY
    | {name: {"psi": 0.5, "eps_low": eps, "eps_high": eps} for name, eps in (("gdsd", 4e-4), ("gdsd_tlc", 0.2))},
}
