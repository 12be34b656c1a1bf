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
import os
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

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
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
# The sampler starts from masks alone. Each step proposes a token for every masked position. It commits the one of which
# the model is surest, and with it every token of more than 0.9, the config's `threshold`. `commit_step` records when
# that was, so every intermediate text can be shown afterwards. Time goes down in the picture; a grey cell is still
# masked, an orange one was committed in this step. The completion holds the 16 cells between `<answer>` tags.

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
# ## A loss of one's own
#
# A method is a handful of pure functions. Most of GDSD's are kept here: it draws masks, scores each completion `i` in
# a view and its complement (`S_i`, a sum of token log-probabilities), and compares rewards inside each group of
# completions (`A_i`). The objective is ours: the plain policy gradient on that score,
#
# $$\mathrm{loss} = -\frac{1}{BL} \sum_i A_i S_i .$$
#
# It returns one value per row; the trainer adds them up. The second dictionary holds metrics.

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
# A config names a method of one's own by `module:NAME`; `__main__` is this notebook. Each iteration draws 32 puzzles,
# samples 8 completions of each, rewards the share of the empty cells that are right, and updates the low-rank adapters
# once.

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
# Ten iterations of 256 completions are a demonstration, not an experiment: rewards differ from one iteration to the
# next by more than they rise. `configs/tiny_sudoku.py` as it is trains four times as long on twice as many.
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
# None of this has been run there. What would have to change:
#
# - Install the TPU's runtime with the package: `pip install "gdsd_jax[tpu] @ git+https://..."`, or
#   `requirements-tpu.txt` from a checkout, and restart the kernel. `jax.devices()` must list TPU devices before
#   anything else runs.
# - The notebook needs the checkout for `configs/`; `%cd` into it.
# - Several chips form a mesh by themselves (`config.mesh`); `prompts_per_iteration * group_size` and `microbatch_rows`
#   must be multiples of their number, which the error says otherwise.
# - For a large model leave `config.model.dtype` at its default, `bfloat16`; this config sets `float32`, with which a
#   TPU multiplies in several passes.
# - A Kaggle or Colab session ends without warning: put `--workdir` on a mounted drive, and the same call resumes.
