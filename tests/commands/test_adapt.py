"""From a causal checkpoint to a masked denoiser: a mask token is added, SFT adapts it, its own class loads it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surroundings import surroundings  # noqa: F401  (a fixture that acts by itself)

from gdsd_jax import hub, sft
from gdsd_jax.config.flags import parse
from gdsd_jax.denoiser import denoise
from gdsd_jax.hub import tiny
from gdsd_jax.runtime.errors import UserError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny_sudoku.py"


def autoregressive(directory):
    """Makes a small causal Qwen3 checkpoint whose tokenizer has no mask token."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
    tiny.build(directory, family="a2d-qwen3", **sizes)
    hf = json.loads((directory / "config.json").read_text())
    hf |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
    del hf["mask_token_id"]
    (directory / "config.json").write_text(json.dumps(hf))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (directory / file).is_file():
            text = (directory / file).read_text().replace("<|mask|>", "<|spare|>")
            (directory / file).write_text(text.replace('"mask_token"', '"sep_token"'))
    return directory


@pytest.mark.slow
def test_a_causal_model_becomes_a_denoiser_that_learns(tmp_path):
    source = autoregressive(tmp_path / "qwen3")
    with pytest.raises(UserError, match="unknown model_type 'qwen3'"):
        hub.read_config(source)
    config, _, _ = parse(
        [
            "test", f"--config={CONFIG}:a2d-qwen3", f"--config.checkpoint={source}", "--config.tiny.family=",
            "--config.sft.steps=60", "--config.sft.until=0.0", "--config.evaluation.count=8",
            "--config.task.train_rows=256", "--config.model.layer_unroll=1",
        ],
        {},
    )  # fmt: skip
    merged = sft.run(config, tmp_path / "sft", log_every=10)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]

    model, base = hub.load_checkpoint(merged)
    tokenizer = hub.load_tokenizer(merged)
    assert model.family == "a2d-qwen3"
    assert model.mask_token_id == tokenizer.mask_token_id
    assert hub.load_tokenizer(tmp_path / "sft" / "adapted").mask_token_id == tokenizer.mask_token_id

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf = json.loads((merged / "config.json").read_text())
    assert (hf["model_type"], hf["architectures"]) == ("a2d-qwen3", ["A2DQwen3LMHeadModel"])
    kept = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    # The family's class is the causal one without its causal mask.
    causal = transformers.Qwen3ForCausalLM.from_pretrained(merged, config=transformers.Qwen3Config(**kept)).eval()
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 12), 0, model.vocab_size))
    with torch.no_grad():
        everything = torch.zeros(2, 1, 12, 12)
        theirs = causal(torch.tensor(tokens), attention_mask=everything).logits.numpy()
    np.testing.assert_allclose(denoise(model, base, None, jnp.asarray(tokens)), theirs, atol=1e-4)


def test_a_row_is_appended_where_the_embedding_has_none(tmp_path):
    source = autoregressive(tmp_path / "qwen3")
    tokenizer = tiny.make_tokenizer()
    config, base = hub.load_checkpoint(source, overrides={"model_type": "a2d-qwen3", "mask_token_id": 0})
    cut = {name: base[name][: len(tokenizer)] for name in ("embedding", "head")}
    small = tmp_path / "small"
    hub.export_checkpoint(small, dataclasses.replace(config, vocab_size=len(tokenizer)), base | cut)
    for path in source.iterdir():
        if path.name.startswith(("token", "special", "added", "chat")):
            (small / path.name).write_bytes(path.read_bytes())
    hf = json.loads((small / "config.json").read_text()) | {"model_type": "qwen3"}
    del hf["mask_token_id"]
    (small / "config.json").write_text(json.dumps(hf))
    hub.adapt(small, tmp_path / "adapted")
    found, grown = hub.load_checkpoint(tmp_path / "adapted")
    assert found.mask_token_id == len(tokenizer) < found.vocab_size
    np.testing.assert_array_equal(grown["embedding"][: len(tokenizer)], cut["embedding"])
    mean = np.asarray(cut["embedding"], np.float32).mean(axis=0)
    np.testing.assert_allclose(grown["embedding"][found.mask_token_id], mean, atol=1e-6)
