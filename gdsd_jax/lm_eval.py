"""Runs the tasks of lm-evaluation-harness on a masked diffusion model, with this package's sampler and likelihoods.

    python -m gdsd_jax.lm_eval --model gdsd_jax --model_args checkpoint=DIR,adapter=DIR --tasks gsm8k --batch_size 32
    python -m gdsd_jax.lm_eval --model gdsd_jax --model_args checkpoint=DIR --tasks mmlu --apply_chat_template ...

    python -m gdsd_jax.lm_eval judge results/MODEL/samples_humaneval_DATE.jsonl

The command registers the model "gdsd_jax" and then is lm-eval's own command line. `--model_args` are the arguments of
`MaskedDiffusion`. It needs lm-eval, which is an optional install: `pip install -r requirements-lm-eval.txt`.

A completion is sampled at a fixed length: `length`, or else the task's `max_gen_toks`, rounded up to whole blocks. Its
text ends at the model's EOS or before the task's first stop string. Likelihoods are Monte-Carlo estimates of the
evidence lower bound (`gdsd_jax.diffusion.likelihood`), not the likelihood itself: rankings of answers are comparable
with those published for masked diffusion models, and perplexities are upper bounds.

Do not let lm-eval run generated programs: let it only generate them (`--predict_only --log_samples`). `judge FILE ...`
then runs the answers, as lm-eval's filters left them, against the tests in the samples, in the sandbox of the task
"code" (`--task` names another task). It writes the result beside each file, as `FILE.judged.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gdsd_jax import hub
from gdsd_jax.config import ModelConfig, TrainConfig
from gdsd_jax.config.flags import enable_compilation_cache
from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.diffusion.likelihood import is_greedy, lower_bound
from gdsd_jax.evaluation.completions import complete
from gdsd_jax.evaluation.policy import require_base
from gdsd_jax.evaluation.samples import judge
from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import PackageError, UserError
from gdsd_jax.runtime.files import require_writable, write_json
from gdsd_jax.runtime.ranges import Count, Seed, convert
from gdsd_jax.runtime.streams import Stream, stream_key
from gdsd_jax.runtime.transfer import fetch, put
from gdsd_jax.tasks import resolve
from gdsd_jax.telemetry.progress import Progress
from gdsd_jax.training.rollout import Prompts
from gdsd_jax.training.setup import with_compute, with_tokens

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise PackageError("gdsd_jax.lm_eval needs lm-eval: pip install -r requirements-lm-eval.txt") from error

SHORTEST_BUCKET = 32


def bucket(length: int, shortest: int, longest: int) -> int:
    """Returns the least power of two that is at least `length`, kept between two bounds, to compile few programs."""
    return min(max(shortest, 1 << max(length - 1, 0).bit_length()), longest)


@register_model("gdsd_jax")
class MaskedDiffusion(TemplateLM):
    """A checkpoint, with or without an adapter, in the form that lm-eval calls.

    Args:
      checkpoint, adapter: directories.
      dtype: dtype of the computation.
      length: tokens of a completion; None: the task's `max_gen_toks`.
      steps: denoising steps of a completion; None: one for every two tokens.
      block_length, strategy: see `gdsd_jax.diffusion.SamplerConfig`; a block_length of 0 means no blocks.
      draws: number of masked views per likelihood.
      seed: seed of the sampling and of the draws.
      adapter_base: what happens to an adapter of another base, see `config.adapter_base`.
      add_bos_token: whether to put the tokenizer's BOS before every text that does not begin with it.
      batch_size: rows that are computed together, lm-eval's `--batch_size`.
      max_batch_size, device: ignored; lm-eval passes them to every model, and JAX chooses its own devices.

    Raises:
      UserError: a directory cannot be loaded, or the settings do not fit together.
    """

    def __init__(
        self,
        checkpoint: str = "",
        adapter: str | None = None,
        dtype: str = "bfloat16",
        length: int | None = None,
        steps: int | None = None,
        block_length: int = 32,
        strategy: str = "low_confidence",
        draws: int = 128,
        seed: int = 0,
        adapter_base: str = TrainConfig.adapter_base,
        add_bos_token: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size} is not a positive number, which it must be for gdsd_jax")
        for name, kind, value in (
            ("length", Count | None, length), ("steps", Count | None, steps), ("block_length", int, block_length),
            ("draws", Count, draws), ("seed", Seed, seed), ("checkpoint", str, checkpoint),
            ("adapter", str | None, adapter), ("dtype", str, dtype), ("strategy", str, strategy),
            ("adapter_base", str, adapter_base), ("add_bos_token", bool, add_bos_token),
        ):  # fmt: skip
            convert(kind, value, f"{name} of --model_args")
        if not checkpoint.strip():
            raise UserError("no model is named: give --model_args checkpoint=DIRECTORY")
        self.batch_rows = int(batch_size)
        self.tokenizer = hub.load_tokenizer(checkpoint)
        model, self.base = hub.load_checkpoint(checkpoint)
        self.model = with_compute(with_tokens(model, self.tokenizer), ModelConfig(dtype=dtype, remat="none"))
        if add_bos_token and self.tokenizer.bos_token_id is None:
            raise UserError(f"{checkpoint} has no BOS token: leave add_bos_token out of --model_args")
        self.add_bos_token = add_bos_token
        self.lora = None
        if adapter is not None:
            require_base(adapter, checkpoint, adapter_base, "adapter_base of --model_args")
            self.lora = hub.load_adapter(adapter, self.model)
        self.length, self.steps, self.draws = length, steps, draws
        self.block_length, self.strategy = block_length, strategy
        self.key = jax.random.key(seed)
        self.source = os.path.abspath(checkpoint)

    # ------------------------------------------------------------------------------------------------ text and tokens

    @property
    def tokenizer_name(self) -> str:
        """Returns the name under which lm-eval caches requests."""
        return self.source

    @property
    def eot_token_id(self) -> int:
        """Returns the id that lm-eval conditions on where a text has no context."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns a text's ids. Special tokens in it are recognised; only `add_bos_token` adds one."""
        return self.tokenizer.encode([string], add_bos=self.add_bos_token)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt of a chat; without `add_generation_prompt`, its last message begins the answer."""
        if add_generation_prompt:
            return self.tokenizer.render(chat_history)
        return self.tokenizer.render(chat_history[:-1], chat_history[-1]["content"])

    # ----------------------------------------------------------------------------------------------------- generation

    def sampler(self, wanted: int, temperature: float) -> SamplerConfig:
        """Returns the sampler for completions of `self.length` or else `wanted` tokens, rounded up to whole blocks."""
        length = self.length or wanted
        block = self.block_length or length
        length = -(-length // block) * block
        return SamplerConfig(
            completion_length=length,
            steps=self.steps or max(1, length // 2),
            block_length=block,
            strategy=self.strategy,
            temperature=temperature,
        )

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Returns a completion of each request's `(context, gen_kwargs)`, cut before the first stop string."""
        groups: dict[tuple[SamplerConfig, int], list[int]] = {}
        stops = []
        for index, request in enumerate(requests):
            context, settings = request.args
            settings = normalize_gen_kwargs(settings)
            stops.append(settings["until"])
            # As in transformers, the default temperature of sampling is 1.
            temperature = settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0)
            sampler = self.sampler(settings["max_gen_toks"], float(temperature))
            room = self.model.max_length - sampler.completion_length
            if room < 1:
                raise UserError(
                    f"completions of {sampler.completion_length} tokens leave no room for a prompt in the model's "
                    f"{self.model.max_length}: give --model_args length=..."
                )
            size = bucket(len(self.tok_encode(context)), SHORTEST_BUCKET, room)
            groups.setdefault((sampler, size), []).append(index)
        found = [""] * len(requests)
        total = sum(-(-len(indices) // self.batch_rows) for indices in groups.values())
        done = 0
        with Progress(total, label="generate", enabled=not disable_tqdm) as progress:
            for (sampler, size), indices in groups.items():
                contexts = [requests[index].args[0] for index in indices]
                tokens, mask = self.tokenizer.prompts(
                    contexts, buckets=(size,), overlong="keep_last", add_bos=self.add_bos_token
                )
                left = iter(indices)
                for batch in complete(
                    self.model, self.base, self.lora, Prompts(tokens, mask, [{}] * len(indices)), sampler,
                    self.tokenizer, batch_rows=self.batch_rows, key=stream_key(self.key, Stream.GENERATION, done),
                    divergence=False,
                ):  # fmt: skip
                    for text in batch.texts:
                        index = next(left)
                        found[index] = postprocess_generated_text(text, stops[index], None)
                        self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                    done += 1
                    progress.update(done)
        return found

    # ----------------------------------------------------------------------------------------------------- likelihood

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, greedy: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns two values for each request, which is `(strings, context ids, continuation ids)`.

        The first is the lower bound of the continuation's log-likelihood in nats. The second is whether greedy
        unmasking writes the continuation; it is False if `greedy` is.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        batches = list(self._batches(pairs))
        with Progress(len(batches), label="likelihood", enabled=not disable_tqdm) as progress:
            for done, (indices, tokens, real, width) in enumerate(batches, start=1):
                arrays = put((tokens, real))
                # A continuation of a single token has only one masked view.
                draws = self.draws if width > 1 else 1
                bound = lower_bound(self.model, self.base, self.lora, *arrays, self.key, width=width, draws=draws)
                same = is_greedy(self.model, self.base, self.lora, *arrays, width=width) if greedy else None
                bound, same = fetch((bound, same))
                for row, index in enumerate(indices):
                    found[index] = (float(bound[row]), bool(same[row]) if greedy else False)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                progress.update(done)
        return found

    def _batches(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, int]]:
        """Yields batches in few shapes: indices of pairs, tokens `[B, P + width]`, their mask, and the width.

        B is `batch_rows`; the mask is True on real tokens; the continuation is in the last `width` tokens.
        """
        longest = self.model.max_length
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not 0 < len(continuation) < longest:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens; it must have at least 1, and fewer than the "
                    f"{longest} that the model holds"
                )
            width = bucket(len(continuation), 1, longest - 1)
            size = bucket(len(context), SHORTEST_BUCKET, longest - width)
            groups.setdefault((size, width), []).append(index)
        for (size, width), members in groups.items():
            for start in range(0, len(members), self.batch_rows):
                indices = members[start : start + self.batch_rows]
                tokens = np.full((self.batch_rows, size + width), self.model.pad_token_id, np.int32)
                real = np.zeros(tokens.shape, bool)
                for row in range(self.batch_rows):
                    # Copies of its first row fill up the last batch.
                    context, continuation = pairs[indices[row] if row < len(indices) else indices[0]]
                    context = context[-size:]
                    first, last = size - len(context), size + len(continuation)
                    tokens[row, first:last] = context + continuation
                    real[row, first:last] = True
                yield indices, tokens, real, width

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Returns lower bounds of the log-likelihoods of whole texts, in nats.

        They are sums over windows of half the model's length, each conditioned on the window before it.
        """
        window = self.model.max_length // 2
        pieces, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), window):
                pieces.append((None, ids[max(0, start - window) : start], ids[start : start + window]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm, greedy=False)
        for owner, (bound, _) in zip(owners, found, strict=True):
            totals[owner] += bound
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def judge_files(arguments: list[str]) -> None:
    """Runs the command `judge`."""
    parser = argparse.ArgumentParser(prog="python -m gdsd_jax.lm_eval judge")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--task", default="code")
    given = parser.parse_args(arguments)
    task = resolve(given.task)
    results = [path.with_name(f"{path.name}.judged.json") for path in given.files]
    for written in results:
        require_writable(written, "the place of the samples", file=True)
    for path, written in zip(given.files, results, strict=True):
        found = judge(path, task)
        write_json(written, found)
        values = (f"{name} {value['mean']:.3f} ± {value['error']:.3f}" for name, value in found["metrics"].items())
        print(f"{path.name}: {found['documents']} documents, {', '.join(values)}")


def main() -> None:
    """Runs `judge`, or else lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    enable_compilation_cache()
    if sys.argv[1:2] == ["judge"]:
        judge_files(sys.argv[2:])
    else:
        cli_evaluate()


if __name__ == "__main__":
    front.run(main)
