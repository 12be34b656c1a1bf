"""Measures how far 8-bit weights move a model's distributions, by the mean KL on masked tokens of a task's answers.

    python -m benchmarks.quantised --config configs/tiny_sudoku.py --checkpoint DIR [--rows 128]

Half of the tokens of each reference answer are masked. The command prints the mean KL in nats per masked token, and the
share of these tokens whose most probable candidate stays the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import number, parser_of
from gdsd_jax import hub
from gdsd_jax.config import TrainConfig, freeze, read_config
from gdsd_jax.denoiser import denoise
from gdsd_jax.denoiser.quantise import quantised
from gdsd_jax.runtime import ranges
from gdsd_jax.training.setup import encoded_rows, resolve_task, task_rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="config file of the task")
    parser.add_argument("--checkpoint", required=True, help="directory of the model")
    parser.add_argument("--rows", type=number(ranges.Count), default=128, help="test rows whose answers are masked")
    flags = parser.parse_args()
    config = dataclasses.replace(freeze(TrainConfig, read_config(flags.config)), checkpoint=flags.checkpoint)
    model, base = hub.load_checkpoint(config.checkpoint, dtype="float32")
    tokenizer, task = hub.load_tokenizer(config.checkpoint), resolve_task(config)
    rows = task_rows(config.task, task, "test", count=flags.rows)
    prompts, length = encoded_rows(config, task, tokenizer, rows), config.sampler.completion_length
    texts = tokenizer.encode_text([task.answer(row) for row in rows])
    answers = jnp.array([(ids + [model.eos_token_id] * length)[:length] for ids in texts])
    masked = jax.random.bernoulli(jax.random.key(0), 0.5, answers.shape)
    tokens = jnp.concatenate([prompts.tokens, jnp.where(masked, model.mask_token_id, answers)], axis=1)

    def log_prob(dtype: str, weights: str) -> jax.Array:
        """Returns the log-probabilities of all candidates at the masked tokens, `[masked, V]`."""
        numerics = dataclasses.replace(model, dtype=dtype, weights=weights)
        stored = jax.tree.map(lambda x: x.astype(dtype), base)
        run = jax.jit(lambda base: denoise(numerics, base, None, tokens, prompt_mask=prompts.mask))
        logits = run(quantised(base) if weights == "int8" else stored)
        return jax.nn.log_softmax(logits[:, -length:])[masked]

    def compare(name: str, one: Any, two: Any) -> None:
        kl = jnp.mean(jnp.sum(jnp.exp(one) * (one - two), axis=-1))
        same = jnp.mean(one.argmax(-1) == two.argmax(-1))
        print(f"{name}: KL {float(kl):.2e}, same candidate {float(same):.2%}")

    print(f"{int(masked.sum())} masked tokens")
    exact, half = log_prob("float32", "stored"), log_prob("bfloat16", "stored")
    compare("float32 to bfloat16", exact, half)
    compare("float32 to int8", exact, log_prob("float32", "int8"))
    compare("bfloat16 to int8", half, log_prob("bfloat16", "int8"))


if __name__ == "__main__":
    main()
