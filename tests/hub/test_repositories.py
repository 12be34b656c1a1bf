"""What repositories hold beside plain weights: stored tied heads, buffers, other dtypes, tokenizer ids, adapters."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gdsd_jax import families, hub
from gdsd_jax.denoiser import init_lora
from gdsd_jax.runtime.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
A2D, LLADA = GOLDEN / "models2" / "a2d_qwen3_tiny", GOLDEN / "llada_tiny"
IDS = {"mask_token_id": 309}


def changed(source, directory, *, config=None, tensors=None):
    """Returns a copy of a checkpoint with other configuration keys (None removes one) and other tensors."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.npz"))
    hf = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
    if tensors:
        stored = load_file(directory / "model.safetensors")
        save_file(tensors(stored), directory / "model.safetensors")
    return directory


def qwen(**changes):
    return json.loads((A2D / "config.json").read_text()) | IDS | changes


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_base_of_the_positions(rope):
    assert families.read_config(qwen(**rope)).rope_theta == 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_parameters.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.*factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "disagree"),
        (
            {"rope_theta": None, "rope_parameters": {"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 1e4}}},
            "disagree",
        ),
        ({"rope_theta": None}, "lacks the key 'rope_theta'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"mask_token_id": None}, r"mask_token_id.*config\.checkpoint_overrides\.mask_token_id"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config.*config\.model\.weights=int8"),
        ({"num_experts": 8}, "num_experts"),
        ({"model_type": "llada2_moe"}, "llada2_moe.*mixture of experts"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    hf = {key: value for key, value in qwen(**changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        families.read_config(hf)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("llada_tiny", {"clip_qkv": 8.0}, "clip_qkv"),
        ("models2/illada_tiny", {"layer_norm_eps": 1e-5, "mask_token_id": 5}, "layer_norm_eps"),
        ("models2/illada_tiny", {"attention_bias": True, "mask_token_id": 5}, "attention_bias"),
    ],
)
def test_options_of_single_families_are_refused(source, changes, message):
    with pytest.raises(UserError, match=message):
        families.read_config(json.loads((GOLDEN / source / "config.json").read_text()) | changes)


def test_a_stored_head_that_repeats_the_tied_embedding_is_left_out(tmp_path):
    def repeat(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    def differ(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    plain, base = hub.load_checkpoint(A2D, overrides=IDS)
    config, found = hub.load_checkpoint(changed(A2D, tmp_path / "same", tensors=repeat), overrides=IDS)
    assert config == plain
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), base, found))
    with pytest.raises(UserError, match="head lm_head.weight that differs"):
        hub.load_checkpoint(changed(A2D, tmp_path / "other", tensors=differ), overrides=IDS)


def test_a_head_that_is_neither_stored_nor_tied_names_the_key(tmp_path):
    directory = changed(A2D, tmp_path / "untied", config={"tie_word_embeddings": False})
    with pytest.raises(UserError, match="no head lm_head.weight.*set tie_word_embeddings"):
        hub.load_checkpoint(directory, overrides=IDS)


def test_buffers_that_follow_from_the_configuration_are_left_out(tmp_path):
    config, _ = hub.load_checkpoint(A2D, overrides=IDS)
    frequencies = (config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)).astype(np.float32)
    angles = np.concatenate([np.arange(32)[:, None] * frequencies] * 2, axis=1)
    buffers = {
        "model.rotary_emb.inv_freq": frequencies,
        "model.layers.0.self_attn.rotary_emb.cos_cached": np.cos(angles)[None, None].astype(np.float32),
        "model.layers.0.self_attn.rotary_emb.sin_cached": np.sin(angles)[None, None].astype(np.float32),
    }
    hub.load_checkpoint(changed(A2D, tmp_path / "right", tensors=lambda t: t | buffers), overrides=IDS)
    wrong = {"model.rotary_emb.inv_freq": frequencies / 2}
    with pytest.raises(UserError, match="inv_freq that does not follow"):
        hub.load_checkpoint(changed(A2D, tmp_path / "wrong", tensors=lambda t: t | wrong), overrides=IDS)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read(dtype, tmp_path):
    cast = lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()}  # noqa: E731
    directory = changed(A2D, tmp_path / dtype, tensors=cast)
    _, base = hub.load_checkpoint(directory, overrides=IDS)
    _, plain = hub.load_checkpoint(A2D, overrides=IDS)
    for found, wanted in zip(jax.tree.leaves(base), jax.tree.leaves(plain), strict=True):
        assert found.dtype == ("float16" if dtype == "float16" else "float32")
        np.testing.assert_array_equal(found, np.asarray(wanted).astype(dtype).astype(found.dtype))


def test_ids_are_found_where_they_are_declared(tmp_path):
    directory = changed(A2D, tmp_path / "bare")
    with pytest.raises(UserError, match="checkpoint_overrides.mask_token_id"):
        hub.read_config(directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<|mask|>": 309, "<|im_end|>": 1, "<|endoftext|>": 303}))
    found = hub.read_config(directory)
    # What config.json says goes before the tokenizer's files, and what the run sets before both.
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (309, 305, 303)
    assert hub.read_config(directory, {"mask_token_id": 7, "block_size": 4}).mask_token_id == 7
    assert hub.read_config(directory, {"block_size": 4}).block_size == 4


def test_ids_that_only_the_other_files_declare(tmp_path):
    """The tokenizer's names of its tokens, where it lacks the family's; then generation_config.json; -1 is no id."""
    directory = changed(A2D, tmp_path / "bare", config={"eos_token_id": None, "pad_token_id": -1})
    added = {"7": {"content": "[M]", "special": True}, "8": {"content": "[E]", "special": True}}
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({"added_tokens_decoder": added, "mask_token": "[M]", "eos_token": {"content": "[E]"}}))
    found = hub.read_config(directory)
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (7, 8, 8)
    file.unlink()
    generation = {"mask_token_id": 9, "eos_token_id": [10, 11]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    found = hub.read_config(directory)
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (9, 10, 10)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"init_lora_weights": "lora_ga"}, "changes the base"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens.*plain adapter"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(peft, message, tmp_path):
    config, _ = hub.load_checkpoint(LLADA)
    lora = init_lora(config, jax.random.key(0), rank=2, alpha=4.0, targets=("q",))
    hub.export_adapter(tmp_path, config, lora, source="base")
    file = tmp_path / "adapter_config.json"
    plain = json.loads(file.read_text())
    for harmless in (True, "gaussian", "eva"):
        file.write_text(json.dumps(plain | {"init_lora_weights": harmless}))
        hub.load_adapter(tmp_path, config)
    file.write_text(json.dumps(plain | peft))
    with pytest.raises(UserError, match=message):
        hub.load_adapter(tmp_path, config)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (GOLDEN / "models2").glob("*/config.json")))
def test_untouched_round_trip_is_exact(name, tmp_path):
    source = GOLDEN / "models2" / name
    config, base = hub.load_checkpoint(source, overrides={"mask_token_id": 5})
    hub.export_checkpoint(tmp_path / "out", config, base, source=source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    one, other = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(one[key].tobytes() == other[key].tobytes() and one[key].dtype == other[key].dtype for key in one)
