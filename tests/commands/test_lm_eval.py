"""lm-evaluation-harness by its own command line, on tasks and rows that are made here, without a network.

For some rows, the right answer is the one that this package computes without lm-eval, so that the scores are known.
"""

import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.denoiser import init_lora
from gdsd_jax.diffusion import SamplerConfig, sample
from gdsd_jax.diffusion.likelihood import lower_bound
from gdsd_jax.hub import tiny
from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.tasks import countdown
from gdsd_jax.training.setup import with_tokens

pytestmark = pytest.mark.slow

ROWS, RIGHT = 6, 4

GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [{until}], max_gen_toks: {length}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("lm_eval")
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "max_length": 128}
    tiny.build(directory / "base", **sizes)
    return directory


def generated(directory: Path, questions: list[str], length: int, until: str) -> list[str]:
    """Returns the completions of the sampler, one row at a time, cut before the stop string."""
    tokenizer = hub.load_tokenizer(directory / "base")
    config, base = hub.load_checkpoint(directory / "base")
    config = with_tokens(config, tokenizer)
    sampler = SamplerConfig(length, length // 2, 4, "low_confidence")
    texts = []
    for question in questions:
        tokens, mask = tokenizer.prompts([question], buckets=(32,), overlong="error")
        rollout = sample(config, base, None, tokens, mask, jax.random.key(0), sampler)
        texts += [text.split(until)[0] for text in tokenizer.decode(np.asarray(rollout.tokens)[:, 32:])]
    return texts


def likeliest(directory: Path, question: str, choices: list[str]) -> int:
    """Returns the index of the choice with the largest lower bound."""
    tokenizer = hub.load_tokenizer(directory / "base")
    config, base = hub.load_checkpoint(directory / "base")
    (prompt,) = tokenizer.encode([question])
    bounds = []
    for choice in choices:
        (answer,) = tokenizer.encode([" " + choice])
        tokens = jnp.asarray([prompt + answer], jnp.int32)
        real, key = jnp.ones(tokens.shape, bool), jax.random.key(0)
        bounds.append(float(lower_bound(config, base, None, tokens, real, key, width=len(answer), draws=16)[0]))
    return int(np.argmax(bounds))


def rows_file(directory: Path, name: str, rows: list[dict]) -> Path:
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(directory: Path) -> None:
    for name, length, until in (("tiny_lines", 8, "e"), ("tiny_words", 14, "0")):
        questions = [f"{name} {n} asks{' more' * (n % 3)}:" for n in range(ROWS)]
        answers = generated(directory, questions, -(-length // 4) * 4, until)
        rows = [
            {"question": question, "answer": answer if n < RIGHT else answer + "!"}
            for n, (question, answer) in enumerate(zip(questions, answers, strict=True))
        ]
        file = rows_file(directory, name, rows)
        text = GENERATION.format(name=name, file=file, until=json.dumps(until), length=length)
        (directory / f"{name}.yaml").write_text(text)
    # Choices of one width, four tokens with the space before them: a batch of their own and ours read the same views.
    choices = ["abc", "xyz", "012"]
    rows = []
    for n in range(ROWS):
        question = f"Which is it, {n}?"
        best = likeliest(directory, question, choices)
        rows.append({"question": question, "choices": choices, "answer": best if n < RIGHT else (best + 1) % 3})
    (directory / "tiny_choice.yaml").write_text(CHOICE.format(file=rows_file(directory, "tiny_choice", rows)))


def test_two_generation_tasks_and_one_of_likelihoods(directory):
    write_tasks(directory)
    line = [
        *(sys.executable, "-m", "gdsd_jax.lm_eval", "--model", "gdsd_jax", "--batch_size", "4"),
        *("--model_args", f"checkpoint={directory / 'base'},dtype=float32,block_length=4,draws=16"),
        *("--tasks", "tiny_lines,tiny_words,tiny_choice", "--include_path", str(directory)),
        *("--output_path", str(directory / "out"), "--log_samples"),
    ]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=os.environ | offline, cwd=directory)
    assert done.returncode == 0, done.stderr
    (file,) = (directory / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    share = RIGHT / ROWS
    assert results["tiny_lines"]["exact_match,none"] == pytest.approx(share)
    assert results["tiny_words"]["exact_match,none"] == pytest.approx(share)
    assert results["tiny_choice"]["acc,none"] == pytest.approx(share)
    (samples,) = (directory / "out").rglob("samples_tiny_lines_*.jsonl")
    texts = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(set(texts)) > 1 and not any("e" in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "checkpoint=DIRECTORY"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"batch_size": "auto"}, "--batch_size auto"),
        ({"draws": 0}, "draws of --model_args is 0, it must be at least 1"),
        ({"length": "long"}, "length of --model_args is 'long', not of type int"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named, directory, monkeypatch, capsys):
    import lm_eval.__main__

    from gdsd_jax.lm_eval import MaskedDiffusion, main

    given = {"checkpoint": str(directory / "base")} | arguments if arguments else {}
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: MaskedDiffusion(**given))
    with pytest.raises(SystemExit) as stop:
        front.run(main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(directory):
    from gdsd_jax.lm_eval import MaskedDiffusion

    return MaskedDiffusion(str(directory / "base"), dtype="float32", block_length=4, draws=16, batch_size=2)


def test_likelihoods_do_not_depend_on_the_batch(model):
    pairs = [("2 + 2 =", " 4"), ("", "alone"), ("a longer question, with more words in it:", " yes, certainly")]
    together = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for pair, found in zip(pairs, together, strict=True):
        ((bound, greedy),) = model.loglikelihood([Request(*pair)], disable_tqdm=True)
        assert (bound, greedy) == (pytest.approx(found[0], rel=1e-5), found[1])
        assert bound < 0


def test_rolling_sums_windows(model):
    text = "x" * 100
    (whole,) = model.loglikelihood_rolling([Request(text)], disable_tqdm=True)
    pieces = model.loglikelihood([Request("", "x" * 64), Request("x" * 64, "x" * 36)], disable_tqdm=True)
    # The first window is given the EOS where lm-eval scores a text without context.
    alone = model._loglikelihood_tokens([(None, [], model.tok_encode("x" * 64))], disable_tqdm=True, greedy=False)
    assert whole == pytest.approx(alone[0][0] + pieces[1][0], rel=1e-5)


def test_bos_and_several_ends_of_a_turn(model, directory, tmp_path):
    """`add_bos_token` begins every text with the BOS, once; any of the tokens that end a turn ends a completion."""
    from gdsd_jax.lm_eval import MaskedDiffusion

    settings = {"dtype": "float32", "block_length": 4, "length": 24, "steps": 6, "batch_size": 20}
    requests = [Request(f"question {n}:", {"until": [], "max_gen_toks": 24}) for n in range(20)]
    plain = MaskedDiffusion(str(directory / "base"), add_bos_token=True, **settings)
    assert plain.tok_encode("1") == [*model.tok_encode("<|bos|>"), *model.tok_encode("1")]
    assert plain.tok_encode("<|bos|>1") == plain.tok_encode("1")
    # The character that it writes most, of those that no name of a special token has.
    written = collections.Counter("".join(plain.generate_until(requests, disable_tqdm=True)))
    often = max((c for c in written if c not in "<|>systemuserassistantbopk"), key=written.__getitem__)

    base = shutil.copytree(directory / "base", tmp_path / "base")
    turn, letter = (model.tok_encode(text)[0] for text in ("<|eot|>", often))
    ends = json.loads((base / "generation_config.json").read_text()) | {"eos_token_id": [model.eot_token_id, letter]}
    (base / "generation_config.json").write_text(json.dumps(ends))
    other = MaskedDiffusion(str(base), add_bos_token=True, **settings)
    assert set(other.model.end_token_ids) == {letter, turn}
    assert not any(often in text for text in other.generate_until(requests, disable_tqdm=True))


def test_an_adapter_of_another_base_is_refused_by_default(model, directory, tmp_path):
    from gdsd_jax.lm_eval import MaskedDiffusion

    tiny.build(tmp_path / "other", seed=1, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    lora = init_lora(model.model, jax.random.key(0), rank=2, alpha=4.0, targets=("q",))
    hub.export_adapter(tmp_path / "adapter", model.model, lora, source=tmp_path / "other")
    arguments = {"checkpoint": str(directory / "base"), "adapter": str(tmp_path / "adapter")}
    with pytest.raises(UserError, match="trained on a base with fingerprint.*adapter_base of --model_args to any"):
        MaskedDiffusion(**arguments)
    assert MaskedDiffusion(**arguments, adapter_base="any").lora is not None


def test_chat_prompts(model):
    history = [{"role": "user", "content": "hello"}]
    assert model.apply_chat_template(history) == "<|user|>hello<|assistant|>"
    opened = [*history, {"role": "assistant", "content": "<answer>"}]
    assert model.apply_chat_template(opened, add_generation_prompt=False) == "<|user|>hello<|assistant|><answer>"
    assert model.chat_template(True) == model.tokenizer.chat_template


def _measure(completion: str, row: dict) -> dict[str, float]:
    return {"passed": float(completion == row["expression"])}


# A task that lets the judge be tested without running a program: right is what the document says.
TASK = dataclasses.replace(countdown.TASK, name="said", measure=_measure, metrics_named=("passed",), read=lambda path: [
    json.loads(line) for line in path.read_text().splitlines()
])  # fmt: skip


def test_judge_reads_what_the_filters_made_of_the_answers(tmp_path, monkeypatch, capsys):
    from gdsd_jax.lm_eval import main

    samples = [
        {"doc": {"expression": "a"}, "resps": [["x", "y"]], "filtered_resps": [["a", "b"]]},
        {"doc": {"expression": "b"}, "resps": [["x", "y"]], "filtered_resps": ["b", "b"]},
    ]
    file = tmp_path / "samples_said.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "judge", str(file), "--task", "test_lm_eval:TASK"])
    main()
    found = json.loads((tmp_path / "samples_said.jsonl.judged.json").read_text())
    assert (found["documents"], found["answers"]) == (2, 4)
    assert found["metrics"]["passed"] == {"mean": 0.75, "error": pytest.approx(0.25)}
    assert "2 documents, passed 0.750" in capsys.readouterr().out
    file.write_text("{}\n")
    with pytest.raises(SystemExit):
        front.run(main)
    assert "name a samples file of lm-eval" in capsys.readouterr().err
