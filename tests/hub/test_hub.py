"""Checkpoints and adapters: what is read, what is written, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from gdsd_jax import hub
from gdsd_jax.denoiser import TARGETS, DenoiserConfig, denoise, init_base, init_lora
from gdsd_jax.families import FAMILIES as KNOWN
from gdsd_jax.hub import names, save, tiny
from gdsd_jax.hub.files import read_json
from gdsd_jax.runtime.errors import UserError

GOLDEN = Path()


@pytest.fixture(autouse=True, scope="module")
def recorded(golden):
    """The recorded checkpoints, the sharded twin included."""
    global GOLDEN
    GOLDEN = golden


CHECKPOINTS = ("llada_tiny", "llada_tiny_gqa", "llada_tiny_sharded", "dream_tiny", "dream_tiny_sharded")
FAMILIES = {"llada": "llada_tiny", "dream": "dream_tiny"}
compute = jax.jit(denoise, static_argnums=0)


def stored(directory):
    tensors = {}
    for file in sorted(Path(directory).glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bytes(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert tensor.tobytes() == right[name].tobytes(), name


def random_lora(config, targets, rank=3, dropout=0.0):
    lora = init_lora(config, jax.random.key(1), rank=rank, alpha=2.0 * rank, targets=targets, dropout=dropout)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        tree, [0.1 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def small_config(family, **changes):
    qwen_like = family == "dream"
    config = DenoiserConfig(
        family, 64, 16, 2, 4, 2, 24, 32, 1e4, 1e-5, qwen_like, False, qwen_like, mask_token_id=3, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


# --- the name table


@given(
    family=st.sampled_from(sorted(KNOWN)),
    layers=st.integers(1, 13),
    qkv_bias=st.booleans(),
    tied_head=st.booleans(),
    qk_norm=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_names_are_one_to_one_and_cover_the_parameters(family, layers, qkv_bias, tied_head, qk_norm):
    config = small_config(family, num_layers=layers, qkv_bias=qkv_bias, tied_head=tied_head)
    if "q_norm" in {row.path[-1] for row in KNOWN[family].rows}:
        config = dataclasses.replace(config, qk_norm=qk_norm, head_size=6)
    slots = names.slots(config)
    assert len({(slot.path, slot.layer) for slot in slots.values()}) == len(slots)
    base = jax.eval_shape(lambda key: init_base(config, key), jax.random.key(0))
    shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(base)}
    by_path = names.parameters(config)
    assert by_path.keys() == shapes.keys()
    for path, tensors in by_path.items():
        slot = slots[tensors[0]]
        assert shapes[path] == (slot.shape if slot.layer is None else (layers, *slot.shape))
        assert [slots[name].layer for name in tensors] == ([None] if slot.layer is None else list(range(layers)))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_names_are_those_of_the_golden_checkpoints(checkpoint):
    config, _ = hub.load_checkpoint(GOLDEN / checkpoint)
    expected = {name: slot.shape for name, slot in names.slots(config).items()}
    assert {name: tensor.shape for name, tensor in stored(GOLDEN / checkpoint).items()} == expected


# --- reading


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_load_keeps_every_number_and_dtype(checkpoint):
    config, base = hub.load_checkpoint(GOLDEN / checkpoint)
    slots = names.slots(config)
    for name, tensor in stored(GOLDEN / checkpoint).items():
        slot = slots[name]
        held = names.at(base, slot.path)
        layer = held if slot.layer is None else held[slot.layer]
        assert held.dtype == tensor.dtype
        np.testing.assert_array_equal(np.asarray(layer), tensor)


def test_parameters_on_a_mesh_of_jax_have_axes_that_need_no_further_statements():
    """Under the Explicit axes of `jax.make_mesh`, the first lookup in the embedding would be refused."""
    _, base = hub.load_checkpoint(GOLDEN / "llada_tiny", mesh=jax.make_mesh((1,), ("fsdp",)))
    for leaf in jax.tree.leaves(base):
        assert leaf.sharding.mesh.axis_names == ("fsdp",) and leaf.sharding.mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize("dtype", ["int8", "float23", jnp.int32])
def test_a_dtype_that_is_no_float_type_is_refused(dtype, tmp_path):
    with pytest.raises(UserError, match="is no float type: give one such as 'bfloat16'"):
        hub.load_checkpoint(GOLDEN / "llada_tiny", dtype=dtype)
    with pytest.raises(UserError, match="is no float type"):
        hub.export_checkpoint(tmp_path / "out", None, {}, dtype=dtype)


def test_sharded_equals_single():
    (config, base), (other_config, other) = (
        hub.load_checkpoint(GOLDEN / name) for name in ("llada_tiny", "llada_tiny_sharded")
    )
    assert config == other_config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, other))


def test_load_casts():
    _, base = hub.load_checkpoint(GOLDEN / "dream_tiny_sharded", dtype="float32")
    _, plain = hub.load_checkpoint(GOLDEN / "dream_tiny_sharded")
    for got, wanted in zip(jax.tree.leaves(base), jax.tree.leaves(plain), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted, np.float32))


def test_logits_of_a_loaded_checkpoint_match_the_reference():
    for checkpoint, logits in (("llada_tiny", "logits"), ("dream_tiny", "logits_shifted")):
        config, base = hub.load_checkpoint(GOLDEN / checkpoint)
        with np.load(GOLDEN / checkpoint / "inputs_nopad.npz") as inputs:
            tokens = inputs["input_ids"]
        with np.load(GOLDEN / checkpoint / "logits_nopad.npz") as expected:
            wanted = expected[logits]
        np.testing.assert_allclose(compute(config, base, None, jnp.asarray(tokens)), wanted, atol=1e-4)


def test_fingerprint_is_of_the_content(tmp_path):
    shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") == hub.fingerprint(GOLDEN / "llada_tiny")
    tensors = stored(tmp_path / "copy")
    save_file({name: tensor * np.float32(1.5) for name, tensor in tensors.items()}, tmp_path / "copy/model.safetensors")
    assert hub.fingerprint(tmp_path / "copy") != hub.fingerprint(GOLDEN / "llada_tiny")


# --- what reading refuses


def edit_tensors(change):
    def edit(directory):
        tensors = stored(directory)
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


def edit_header(change):
    def edit(directory):
        path = directory / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + length])
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

    return edit


def cut(size):
    def edit(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return edit


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def wrong_range(header):
    parsed = json.loads(header)
    parsed["model.transformer.ln_f.weight"]["data_offsets"][1] += 4
    return json.dumps(parsed).encode()


def repeat_key(header):
    name = b'"model.transformer.ln_f.weight":'
    return header.rstrip().removesuffix(b"}") + b"," + name + b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


HEAD, NORM = "model.transformer.ff_out.weight", "model.transformer.ln_f.weight"
BROKEN = {
    "missing tensor": (edit_tensors(lambda t: t.pop(HEAD)), rf"no head {HEAD}.*tie"),
    "unknown tensor": (edit_tensors(lambda t: t.update(stray=np.zeros(2))), "holds the unknown tensor stray"),
    "wrong shape": (edit_tensors(lambda t: t.update({NORM: np.zeros(3, "f4")})), rf"{NORM}.*\(3,\), not \(64,\)"),
    "integer tensor": (edit_tensors(lambda t: t.update({NORM: np.zeros(64, "i4")})), rf"{NORM}.*stored as I32"),
    "mixed dtypes": (
        edit_tensors(lambda t: t.update({name: t[name].astype("f2") for name in t if "blocks.1." in name})),
        "stores the layers of layers/attn_norm",
    ),
    "cut in the data": (cut(-100), "model.safetensors is truncated: "),
    "cut in the header": (cut(900), "model.safetensors is truncated within its header"),
    "empty file": (cut(0), "truncated within its header"),
    "trailing bytes": (lambda d: write("model.safetensors", stored_bytes(d) + b"xx")(d), "2 bytes after its last"),
    "header is not JSON": (edit_header(lambda h: b"{" + h[2:]), "corrupt header"),
    "header is a list": (edit_header(lambda h: b"[]"), "corrupt header"),
    "wrong byte range": (edit_header(wrong_range), "corrupt header .byte range of model.transformer"),
    "tensor twice in a file": (edit_header(repeat_key), rf"holds {NORM} twice"),
    "unknown dtype": (edit_header(lambda h: h.replace(b'"F32"', b'"X32"')), "unknown dtype 'X32'"),
    "no safetensors file": (write("model.safetensors", b"PK" * 2000), "is no safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "single and index": (write("model.safetensors.index.json", b"{}"), "both model.safetensors and"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config is not JSON": (write("config.json", b"{"), "config.json cannot be read as JSON"),
    "config is a list": (write("config.json", b"[]"), "config.json holds no JSON object"),
    "unknown model": (edit_config(model_type="gpt2"), "unknown model_type 'gpt2'"),
    "a list of models": (edit_config(model_type=["llada"]), "unknown model_type .*llada"),
    "other sizes": (edit_config(d_model=32), r"has shape .*not .*config.json"),
    "more layers": (edit_config(n_layers=4), r"lacks tensor model.transformer.blocks.3.* \(and 8 more\)"),
}


def stored_bytes(directory):
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", BROKEN)
def test_load_refuses(case, tmp_path):
    edit, message = BROKEN[case]
    shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "broken")
    edit(tmp_path / "broken")
    with pytest.raises(UserError, match=message) as caught:
        hub.load_checkpoint(tmp_path / "broken")
    assert "\n" not in str(caught.value)


SECOND = "model-00002-of-00003.safetensors"


def edit_index(change):
    def edit(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def grown(name):
    """Returns an edit that makes a file of 50 GB, of which the disk holds next to nothing."""
    return lambda directory: os.truncate(directory / name, 50 << 30)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_config.json"])
def test_a_file_that_no_memory_holds_is_refused_before_it_is_read(name, tmp_path):
    (tmp_path / name).write_text("{}")
    grown(name)(tmp_path)
    with pytest.raises(UserError, match=f"{name} has 53687091200 bytes, more than"):
        read_json(tmp_path / name)


def test_a_configuration_is_small_a_tokenizer_may_be_large(tmp_path):
    """Five megabytes of nested brackets would take a second and 175 MB, a hundred 3.5 GB."""
    source = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    for name in ("config.json", "tokenizer_config.json"):
        (source / name).write_text(json.dumps(content | {"x": "x" * 5_000_000}))
    with pytest.raises(UserError, match=r"config\.json has 5\d{6} bytes, more than the 4000000"):
        hub.read_config(source)
    (source / "config.json").write_text(json.dumps(content))
    hub.read_config(source)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.model", "modeling_x.py", "README.md"])
def test_a_side_file_that_no_memory_holds_is_not_copied(name, tmp_path):
    source = shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "source")
    (source / name).touch()
    grown(name)(source)
    config, base = hub.load_checkpoint(source)
    with pytest.raises(UserError, match=f"{name} has 53687091200 bytes"):
        hub.export_checkpoint(tmp_path / "out", config, base, source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def repeat_in_second_shard(directory):
    save_file(load_file(directory / SECOND) | {NORM: np.ones(64, np.float32)}, directory / SECOND)


BROKEN_SHARDS = {
    "absent shard": (lambda d: (d / SECOND).unlink(), rf"index.json names the shard {SECOND}"),
    "tensor in two shards": (repeat_in_second_shard, rf"tensor {NORM} is in .*(again in|but the index)"),
    "index names another shard": (edit_index(lambda m: m.update({NORM: SECOND})), rf"{NORM} is in .*index puts it in"),
    "index lacks a tensor": (edit_index(lambda m: m.pop(NORM)), rf"{NORM} is in .*puts it in no shard"),
    "index has one more": (edit_index(lambda m: m.update(stray=SECOND)), rf"stray is not in .*{SECOND}, where"),
    "shard outside the index": (
        lambda d: save_file({"stray": np.ones(1)}, d / "model-00004-of-00004.safetensors"),
        "model-00004-of-00004.safetensors is not named in",
    ),
    "index without a map": (write("model.safetensors.index.json", b"{}"), "has no weight_map"),
    "shard of another directory": (
        edit_index(lambda m: m.update({NORM: "../other/model.safetensors"})),
        "a file outside its own directory",
    ),
    "shard anywhere": (edit_index(lambda m: m.update({NORM: "/etc/passwd"})), "a file outside its own directory"),
    "endless index": (grown("model.safetensors.index.json"), "more than the 50000000 that are read"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_load_refuses_shards(case, tmp_path):
    edit, message = BROKEN_SHARDS[case]
    shutil.copytree(GOLDEN / "llada_tiny_sharded", tmp_path / "broken")
    edit(tmp_path / "broken")
    with pytest.raises(UserError, match=message):
        hub.load_checkpoint(tmp_path / "broken")


def test_load_refuses_an_absent_directory(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        hub.load_checkpoint(tmp_path / "nowhere")


# --- writing


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_untouched_round_trip_is_exact(checkpoint, tmp_path):
    source = GOLDEN / checkpoint
    config, base = hub.load_checkpoint(source)
    hub.export_checkpoint(tmp_path / "out", config, base, source=source)
    same_bytes(stored(tmp_path / "out"), stored(source))
    for file in source.glob("*config.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    again, reloaded = hub.load_checkpoint(tmp_path / "out")
    assert again == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, reloaded))


def test_single_file_is_the_one_that_the_safetensors_library_writes(tmp_path):
    source = GOLDEN / "llada_tiny"
    config, base = hub.load_checkpoint(source)
    hub.export_checkpoint(tmp_path / "out", config, base, source=source)
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)


def test_shards_and_cast(tmp_path):
    source = GOLDEN / "dream_tiny"
    config, base = hub.load_checkpoint(source)
    hub.export_checkpoint(tmp_path / "out", config, base, source=source, dtype="bfloat16", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 100_000 for file in files)
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in stored(source).items()}
    same_bytes(tensors, rounded)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    hub.load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [pytest.param(("q", "v"), marks=pytest.mark.slow), TARGETS])
def test_merged_export_computes_what_the_adapter_computes(family, targets, tmp_path):
    source = GOLDEN / FAMILIES[family]
    config, base = hub.load_checkpoint(source)
    lora = random_lora(config, targets)
    tokens = jax.random.randint(jax.random.key(0), (2, 11), 0, config.vocab_size)
    wanted = compute(config, base, lora, tokens)
    hub.export_checkpoint(tmp_path / "out", config, base, lora=lora, source=source)
    merged_config, merged = hub.load_checkpoint(tmp_path / "out")
    assert merged_config == config
    np.testing.assert_allclose(compute(config, merged, None, tokens), wanted, atol=1e-4)
    assert float(jnp.abs(compute(config, base, None, tokens) - wanted).max()) > 0.1
    tensors, original = stored(tmp_path / "out"), stored(source)
    touched = {f"{names.module(config, t, n)}.weight" for t in targets for n in range(config.num_layers)}
    assert {name for name in tensors if tensors[name].tobytes() != original[name].tobytes()} == touched


def test_merge_into_bfloat16_rounds_once(tmp_path):
    source = GOLDEN / "dream_tiny_sharded"
    config, base = hub.load_checkpoint(source)
    lora = random_lora(config, ("q", "down"))
    hub.export_checkpoint(tmp_path / "out", config, base, lora=lora, source=source)
    merged = stored(tmp_path / "out")
    for target in ("q", "down"):
        factors = lora.weights["layers"][target]
        for layer in range(config.num_layers):
            name = f"{names.module(config, target, layer)}.weight"
            exact = np.asarray(base["layers"][target]["weight"][layer], np.float64)
            exact = exact + 2.0 * (np.asarray(factors["a"][layer], np.float64) @ np.asarray(factors["b"][layer])).T
            assert merged[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_allclose(merged[name].astype(np.float64), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(
    "family, code",
    [
        ("llada", "GSAI-ML/LLaDA-8B-Instruct--modeling_llada"),
        ("dream", "Dream-org/Dream-v0-Instruct-7B--modeling_dream"),
    ],
)
def test_trained_export_keeps_the_configuration_and_points_at_the_hub_code(family, code, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / FAMILIES[family], source)
    edit_config(an_unknown_key={"kept": [1, None]})(source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config, base = hub.load_checkpoint(source)
    lora = random_lora(config, ("q",))
    training = {"method": "gdsd", "steps": 12}
    hub.export_checkpoint(tmp_path / "out", config, base, lora=lora, source=source, training=training)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    auto_map = after.pop("auto_map")
    assert set(before.pop("auto_map")) == set(auto_map)
    assert before == after
    assert auto_map["AutoModel"].startswith(f"{code}.")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "- method: gdsd\n- steps: 12\n" in card and "rank 3, alpha 6, on q" in card
    # With the code beside the weights, the reference stays local and the code comes along.
    for module in {reference.partition("--")[2].partition(".")[0] for reference in auto_map.values()}:
        (source / f"{module}.py").write_text("")
    hub.export_checkpoint(tmp_path / "with_code", config, base, lora=lora, source=source)
    kept = json.loads((tmp_path / "with_code/config.json").read_text())["auto_map"]
    assert all((tmp_path / "with_code" / f"{ref.partition('.')[0]}.py").is_file() for ref in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_export_without_a_source_writes_every_key_of_the_family(family, tmp_path):
    config, base = hub.load_checkpoint(GOLDEN / FAMILIES[family])
    hub.export_checkpoint(tmp_path / "out", config, base)
    assert hub.load_checkpoint(tmp_path / "out")[0] == config
    keys = set(json.loads((GOLDEN / FAMILIES[family] / "config.json").read_text())) - {"torch_dtype"}
    assert keys == set(json.loads((tmp_path / "out/config.json").read_text()))


def test_export_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    config, base = hub.load_checkpoint(GOLDEN / "llada_tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(UserError, match="full exists and is not empty"):
        hub.export_checkpoint(tmp_path / "full", config, base)
    with pytest.raises(UserError, match="other shapes"):
        hub.export_checkpoint(tmp_path / "out", config, base, source=GOLDEN / "llada_tiny_gqa")
    with pytest.raises(UserError, match="parameters lack head"):
        hub.export_checkpoint(tmp_path / "out", config, {k: v for k, v in base.items() if k != "head"})
    with pytest.raises(UserError, match="parameter final_norm has shape"):
        hub.export_checkpoint(tmp_path / "out", config, base | {"final_norm": np.zeros(3, np.float32)})
    other = dataclasses.replace(config, intermediate_size=8)
    with pytest.raises(UserError, match="adapter weight down/a"):
        hub.export_checkpoint(tmp_path / "out", config, base, lora=random_lora(other, ("q", "down")))
    with monkeypatch.context() as patch:
        patch.setattr(save.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"not enough disk space .*\d+ bytes needed, 1000 free"):
            hub.export_checkpoint(tmp_path / "out", config, base)
    with monkeypatch.context() as patch:

        def full_disk(descriptor):
            raise OSError(28, "No space left on device")

        patch.setattr(save.os, "fsync", full_disk)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            hub.export_checkpoint(tmp_path / "out", config, base)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    hub.export_checkpoint(tmp_path / "empty", config, base)
    assert hub.load_checkpoint(tmp_path / "empty")[0] == config


# --- adapters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("v", "q"), ("q", "k", "v", "o", "gate", "up"), ("down",), TARGETS])
def test_adapter_round_trip_is_exact(family, targets, tmp_path):
    config, _ = hub.load_checkpoint(GOLDEN / FAMILIES[family])
    lora = random_lora(config, targets, dropout=0.05)
    hub.export_adapter(tmp_path / "out", config, lora, source="some/base")
    again = hub.load_adapter(tmp_path / "out", config)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, again, lora))


def test_adapter_names_and_targets(tmp_path):
    expected = {
        "llada": ("model.transformer.blocks.1.ff_out", "model.transformer.blocks.1.q_proj"),
        "dream": ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
    }
    for family, (down, q) in expected.items():
        config, _ = hub.load_checkpoint(GOLDEN / FAMILIES[family])
        lora = random_lora(config, ("q", "down"))
        hub.export_adapter(tmp_path / family, config, lora, source="some/base")
        tensors = load_file(tmp_path / family / "adapter_model.safetensors")
        assert len(tensors) == 2 * 2 * config.num_layers
        assert tensors[f"base_model.model.{down}.lora_A.weight"].shape == (3, config.intermediate_size)
        assert tensors[f"base_model.model.{q}.lora_B.weight"].shape == (config.hidden_size, 3)
        peft = json.loads((tmp_path / family / "adapter_config.json").read_text())
        assert (peft["r"], peft["lora_alpha"], peft["peft_type"]) == (3, 6, "LORA")
        assert peft["base_model_name_or_path"] == "some/base"
        assert peft["target_modules"] == names.target_modules(config, ("q", "down"))
        assert names.matched_targets(config, peft["target_modules"]) == ("q", "down")
    config = small_config("llada")
    assert names.target_modules(config, ("q", "o")) == ["q_proj", "attn_out"]
    anchored = names.target_modules(config, ("down", "q"))
    assert anchored == r"model\.transformer\.blocks\.\d+\.(?:ff_out|q_proj)"
    assert names.target_modules(small_config("dream"), ("down", "q")) == ["down_proj", "q_proj"]
    # PEFT's usual list reaches only four of the seven matrices here.
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert names.matched_targets(config, usual) == ("q", "k", "v", "up")
    assert names.matched_targets(small_config("dream"), "all-linear") == TARGETS


def test_adapter_from_elsewhere_in_half_precision(tmp_path):
    config, _ = hub.load_checkpoint(GOLDEN / "dream_tiny")
    lora = random_lora(config, ("q", "v"))
    hub.export_adapter(tmp_path / "out", config, lora, source=None)
    file = tmp_path / "out/adapter_model.safetensors"
    save_file({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(file).items()}, file)
    again = hub.load_adapter(tmp_path / "out", config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), lora)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, rounded))


def drop_one(tensors):
    del tensors[min(tensors)]


def edit_adapter(change=None, **changes):
    def edit(directory):
        file, peft = directory / "adapter_model.safetensors", directory / "adapter_config.json"
        if change is not None:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)
        peft.write_text(json.dumps(json.loads(peft.read_text()) | changes))

    return edit


BROKEN_ADAPTERS = {
    "missing tensor": (edit_adapter(drop_one), r"lacks tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
    "unknown tensor": (edit_adapter(lambda t: t.update(stray=np.zeros(1))), "holds the unknown tensor stray"),
    "other rank": (edit_adapter(r=5), r"has shape \(.*3.*\), not \(.*5.*\)"),
    "another target": (edit_adapter(target_modules=["q_proj", "o_proj"]), "lacks tensor .*o_proj"),
    "no target": (edit_adapter(target_modules=["c_attn"]), "names no module of this model"),
    "other scale": (edit_adapter(use_rslora=True), "sets use_rslora to True"),
    "not LoRA": (edit_adapter(peft_type="IA3"), "sets peft_type to 'IA3'"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does not exist"),
    "truncated": (
        lambda d: write("adapter_model.safetensors", (d / "adapter_model.safetensors").read_bytes()[:-9])(d),
        "adapter_model.safetensors is truncated",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_load_adapter_refuses(case, tmp_path):
    edit, message = BROKEN_ADAPTERS[case]
    config, _ = hub.load_checkpoint(GOLDEN / "dream_tiny")
    hub.export_adapter(tmp_path / "out", config, random_lora(config, ("q", "v")), source=None)
    edit(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        hub.load_adapter(tmp_path / "out", config)


def test_adapter_of_another_model_is_refused(tmp_path):
    llada, _ = hub.load_checkpoint(GOLDEN / "llada_tiny")
    gqa, _ = hub.load_checkpoint(GOLDEN / "llada_tiny_gqa")
    hub.export_adapter(tmp_path / "out", llada, random_lora(llada, ("q",)), source=None)
    with pytest.raises(UserError, match=r"unknown tensor .*blocks\.2\."):
        hub.load_adapter(tmp_path / "out", gqa)
    with pytest.raises(UserError, match="adapter weight q/a has shape"):
        hub.export_adapter(tmp_path / "other", gqa, random_lora(llada, ("q",)), source=None)


# --- the small checkpoint made here


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_checkpoint_is_complete(family, tmp_path):
    tiny.build(tmp_path / "out", family=family, hidden_size=32, num_layers=2, num_kv_heads=2, intermediate_size=48)
    config, base = hub.load_checkpoint(tmp_path / "out")
    assert (config.family, config.num_kv_heads, config.vocab_size) == (family, 2, 128)
    tokenizer = hub.load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size <= config.vocab_size
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(config, name)
    tokens, mask = tokenizer.prompts(["1+2", "3"], buckets=(8,), overlong="error")
    logits = compute(config, base, None, jnp.asarray(tokens), prompt_mask=jnp.asarray(mask))
    assert logits.shape == (2, 8, 128) and bool(jnp.isfinite(logits).all())


def test_tiny_checkpoint_follows_its_seed(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny.build(tmp_path / name, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, seed=seed)
    one, same, other = (hub.fingerprint(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
