# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A walk through gdsd_jax
#
# This file is a script (`python examples/quickstart.py`), a test and a notebook (Jupyter opens it through jupytext).
# On two CPU cores it takes about two minutes. It loads a tiny masked denoiser, shows how it unmasks a completion,
# trains it with a loss that is written here, exports the result and loads the export again.

# %%
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from gdsd_jax import export, generate, hub, sft, train
from gdsd_jax.config import TrainConfig, freeze, read_config
from gdsd_jax.denoiser import denoise
from gdsd_jax.diffusion.sampler import replay
from gdsd_jax.evaluation.policy import load_policy
from gdsd_jax.methods import METHODS, Recipe
from gdsd_jax.telemetry.metrics import read_metrics

logging.set_verbosity(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")
places = [Path.cwd(), *Path.cwd().parents]
checkout = next(place for place in places if (place / "configs" / "tiny_sudoku.py").exists())
workdir = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The model
#
# A config holds every setting. This one makes a model with 0.2M parameters in LLaDA's format, and teaches it 4x4
# Sudoku by supervised training. Here that is kept short, so the model is poor at it. For a checkpoint of your own, set
# `config.checkpoint` to its directory and leave `embedded_start` out.

# %%
config = read_config(checkout / "configs" / "tiny_sudoku.py")
config.checkpoint = str(workdir / "start" / "merged")
config.sft.update(steps=250, until=0.0)
config.iterations, config.save_every = 10, 10
config.prompts_per_iteration, config.group_size = 32, 8
config.microbatch_rows = 128
config.optimizer.learning_rate = 2e-3
config.evaluation.update(every=0, count=64)

settings = freeze(TrainConfig, config)
sft.embedded_start(settings)
start = load_policy(settings, checkpoint=settings.checkpoint)
print(f"{sum(x.size for x in jax.tree.leaves(start.base)):,} parameters")

# %% [markdown]
# ## Unmasking, step by step
#
# The sampler starts from a completion of masks. Each step proposes a token for every masked position, and commits
# (writes) the one with the highest probability, together with every other token above 0.9, the config's `threshold`.
# `commit_step` records the step that wrote each token, so that every intermediate text can be shown afterwards. In the
# picture, each row is the completion after one more step: grey cells are still masked, orange ones were written in this
# step. The answer is the 16 cells between the `<answer>` tags.

# %%
shown = generate.run(settings, start, rows=1)
print("puzzle", shown.prompts[0], "  reward", float(shown.rewards["reward"][0]))
length = shown.rollout.commit_step.shape[1]
steps = np.unique(shown.rollout.commit_step[0])
texts = [np.asarray(replay(shown.rollout, start.model, step))[0, -length:] for step in (-1, *steps)]

figure, axes = plt.subplots(figsize=(9, 0.36 * len(texts)), layout="constrained")
before = texts[0]
for y, tokens in enumerate(texts):
    for x, (old, new) in enumerate(zip(before, tokens, strict=True)):
        masked = new == start.model.mask_token_id
        colour = "#dddddd" if masked else "white" if old == new else "#f6b26b"
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="#bbbbbb", linewidth=0.5))
        if not masked:
            end = new == start.model.eos_token_id
            text = "end" if end else start.tokenizer.decode_one(np.array([new]), special=False)
            axes.text(x, y, text, ha="center", va="center", fontsize=5 if len(text) > 1 else 10)
    before = tokens
axes.set(xlim=(-0.5, length - 0.5), ylim=(len(texts) - 0.5, -0.5), xlabel="position", ylabel="steps taken")
axes.set(xticks=range(length), yticks=range(len(texts)))
plt.show()

# %% [markdown]
# ## A loss of your own
#
# A method is a handful of pure functions. Here all of GDSD's are kept except the objective. They draw masks, score each
# completion `i` in a view and its complement (`S_i`, a sum of token log-probabilities), and compare rewards inside each
# group of completions (`A_i`). The new objective is the plain policy gradient on that score, for B completions of L
# tokens:
#
#     loss = - sum_i A_i S_i / (B L)
#
# `objective` returns one value for each completion; the trainer adds them up. The second dictionary holds metrics.

# %%
gdsd = METHODS["gdsd"]


def objective(new, constants):
    per_token = jnp.mean(new.guided, axis=1) / constants["length"]
    return {"objective": -constants["advantage"] * per_token / constants["rows"]}, {"log_prob": per_token}


def make(settings):
    return gdsd.make(settings)._replace(objective=objective, needs_reference=False)


GRADIENT = Recipe(gdsd.settings, make)

# %% [markdown]
# ## Ten iterations
#
# A config names your own method by `module:NAME`; `__main__` is this notebook. Each iteration draws 32 puzzles and
# samples 8 completions of each. The reward is the share of the empty cells that are right. Then the low-rank adapters
# are updated once.

# %%
config.method = "__main__:GRADIENT"
config.settings["__main__:GRADIENT"] = {"views": 1, "beta": 0.0}
settings = freeze(TrainConfig, config)
train.main(settings, workdir / "run")

# %%
entries = read_metrics(workdir / "run")
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axis, name, label in zip(axes, ("reward/mean", "policy/log_prob"), ("reward", "nats per token"), strict=True):
    axis.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], marker="o")
    axis.set(title=name, xlabel="iteration", ylabel=label)
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Ten iterations of 256 completions are a demonstration, not an experiment: rewards change more from one iteration to
# the next than they rise. `configs/tiny_sudoku.py`, unchanged, runs four times as many iterations with twice as many
# completions.
#
# ## Export, and load the export
#
# `export` writes a merged checkpoint in the model's own Hugging Face format, and a PEFT adapter. Loaded again, the
# merged weights give the trained policy's logits.

# %%
paths = export.run(settings, workdir / "run", workdir / "export")
print(sorted(path.name for path in paths["merged"].iterdir()))

trained = load_policy(settings, workdir / "run")
model, base = hub.load_checkpoint(paths["merged"])
completion = jnp.asarray(shown.rollout.tokens)
difference = jnp.abs(
    denoise(trained.model, trained.base, trained.lora, completion) - denoise(trained.model, base, None, completion)
)
print(f"largest difference of two logits: {float(difference.max()):.1e}")
assert difference.max() < 1e-4

# %% [markdown]
# ## On a TPU of Colab or Kaggle
#
# None of this has been run there. This is what would have to change:
#
# - Install the TPU's runtime with the package: `pip install "gdsd_jax[tpu] @ git+https://..."`, or
#   `pip install -r requirements-tpu.txt` in a checkout, and restart the kernel. `jax.devices()` must list TPU devices
#   before anything else runs.
# - The notebook needs the checkout for `configs/`; `%cd` into it.
# - Several chips form a mesh by default (`config.mesh`). `prompts_per_iteration * group_size` and `microbatch_rows`
#   must then be multiples of the number of chips; otherwise an error says so.
# - For a large model leave `config.model.dtype` at its default, `bfloat16`. This config sets `float32`, for which a TPU
#   multiplies in several passes.
# - A Kaggle or Colab session may end without warning. Put the workdir on a mounted drive; the same call then resumes.
