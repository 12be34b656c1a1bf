"""Rows of several demonstrations: how they are packed, and that each is computed as if it were alone."""

import dataclasses
import functools
import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from gdsd_jax import sft
from gdsd_jax.config import TrainConfig, freeze
from gdsd_jax.denoiser import DenoiserConfig, attention, hidden_states, init_base, logits_from_hidden, splash
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.training.demonstrations import Encoded, pack
from gdsd_jax.training.supervised import MIN_RATIO, completion_tokens, draw_views, token_log_probs

EOS, MASK, LENGTH = 1, 3, 24
CONFIG = DenoiserConfig(
    family="llada", vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64,
    max_length=256, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=True, next_token_logits=False,
    mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS, dtype="float32",
)  # fmt: skip


def demonstrations(count: int = 9) -> Encoded:
    """Prompts of 1 to 8 tokens, padded on the left, and answers of 0 to 6, ended and padded by EOS."""
    draws = np.random.default_rng(0)
    tokens, real = draws.integers(4, 32, (count, 15), dtype=np.int32), np.ones((count, 8), bool)
    for row in range(count):
        real[row, : draws.integers(8)] = False
        tokens[row, 8 + draws.integers(7) :] = EOS
    return Encoded(tokens, real)


def texts_of(rows: Encoded) -> list[list[int]]:
    out = []
    for tokens, real in zip(rows.tokens, rows.prompt_mask, strict=True):
        answer = tokens[8:].tolist()
        out.append(tokens[:8][real].tolist() + answer[: answer.index(EOS) + 1])
    return out


def test_every_demonstration_is_in_one_row_once():
    rows = demonstrations()
    packed = pack(rows, LENGTH, EOS)
    found, answers = [], 0
    for tokens, texts, answer in zip(*packed, strict=True):
        assert (np.diff(texts[texts > 0]) >= 0).all() and (texts > 0).sum() <= LENGTH
        for number in range(1, texts.max() + 1):
            text = tokens[texts == number]
            found.append(text.tolist())
            assert text[-1] == EOS and not answer[texts == number][0]
        answers += answer.sum()
    assert sorted(found) == sorted(texts_of(rows))
    assert answers == sum(tokens[8:].tolist().index(EOS) + 1 for tokens in rows.tokens)
    # No two rows would fit into one.
    used = sorted((packed.texts > 0).sum(axis=1))
    assert used[0] + used[1] > LENGTH
    with pytest.raises(UserError, match="config.sft.packed_length 8"):
        pack(rows, 8, EOS)
    empty = pack(Encoded(rows.tokens[:0], rows.prompt_mask[:0]), LENGTH, EOS)
    assert empty.tokens.shape == (0, LENGTH)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["plain", pytest.param("cudnn", marks=SLOW), pytest.param("splash", marks=SLOW)])
@pytest.mark.parametrize("shifted", [False, pytest.param(True, marks=SLOW)])
def test_a_packed_text_is_computed_as_if_it_were_alone(monkeypatch, kind, shifted):
    monkeypatch.setattr(attention, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(splash, "attention", functools.partial(splash.attention, interpret=True))
    # Splash requires heads of 128.
    width = 256 if kind == "splash" else CONFIG.hidden_size
    config = dataclasses.replace(CONFIG, next_token_logits=shifted, attention=kind, hidden_size=width)
    base, packed = init_base(config, jax.random.key(0)), pack(demonstrations(), LENGTH, EOS)
    together = jax.jit(lambda tokens, texts: hidden_states(config, base, None, tokens, texts=texts))
    alone = jax.jit(
        lambda tokens, real: hidden_states(
            dataclasses.replace(config, attention="plain"), base, None, tokens, prompt_mask=real
        )
    )
    found = np.asarray(together(packed.tokens, packed.texts))
    for row, texts in enumerate(packed.texts):
        for number in range(1, texts.max() + 1):
            own = texts == number
            expected = np.asarray(alone(packed.tokens[row][None], own[None]))[0]
            # The first token of a text is part of a prompt; shifted, it would be predicted by the text before it.
            places = np.flatnonzero(own)[1:]
            np.testing.assert_allclose(found[row, places], expected[places], atol=1e-5)


def test_masks_and_weights_of_packed_rows():
    """Ratios are spread evenly over the texts, only answers are masked, and the weights are those of Eq. 5."""
    packed = jax.tree.map(jnp.asarray, pack(demonstrations(), LENGTH, EOS))
    draw = jax.jit(lambda key: draw_views(key, packed))
    views = [draw(key) for key in jax.random.split(jax.random.key(0), 200)]
    answers = np.asarray(completion_tokens(packed))
    for view in views[:5]:
        masked, weights = np.asarray(view.masked[0]), np.asarray(view.weights[0])
        assert not masked[~answers].any() and (weights[~masked] == 0).all()
        ratios = 1 / (weights[masked] * answers.sum())
        assert (ratios >= MIN_RATIO * 0.999).all() and (ratios <= 1.001).all()
        numbers = np.asarray(packed.texts)[masked] + 100 * np.nonzero(masked)[0]
        assert all(np.ptp(ratios[numbers == number]) < 1e-4 for number in set(numbers.tolist()))
    share = np.mean([np.asarray(view.masked[0])[answers].mean() for view in views])
    np.testing.assert_allclose(share, 0.5, atol=0.03)


@SLOW
def test_log_probabilities_are_those_of_the_masked_rows():
    base, packed = init_base(CONFIG, jax.random.key(0)), jax.tree.map(jnp.asarray, pack(demonstrations(), LENGTH, EOS))
    views = draw_views(jax.random.key(1), packed)
    found = token_log_probs(CONFIG, base, None, packed, views, chunk=16)[0]
    noisy = jnp.where(views.masked[0], MASK, packed.tokens)
    logits = logits_from_hidden(CONFIG, base, hidden_states(CONFIG, base, None, noisy, texts=packed.texts))
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), packed.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@SLOW
def test_supervised_training_on_packed_rows(tmp_path):
    """The loss falls, that of the held-out share too, and rows that are too short are refused before training."""
    run = runpy.run_path(str(tiny_run.build(tmp_path)))["get_config"]()
    file = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{n}{n}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with run.unlocked():
        run.sampler.update(completion_length=48, steps=48, block_length=48)
        run.sft.update(steps=24, batch_rows=4, path=str(file), held_out=0.3, packed_length=48, check_every=12)
    sft.run(freeze(TrainConfig, run), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    for length, message in ((4, "exceeds config.sft.packed_length 4"), (10**6, "exceeds the model's")):
        with run.unlocked():
            run.sft.packed_length = length
        with pytest.raises(UserError, match=message):
            sft.run(freeze(TrainConfig, run), tmp_path / f"refused{length}")
