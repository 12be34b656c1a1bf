"""Chat template, prompts in length buckets, decoding up to EOS, and tokenizers that lack what diffusion needs."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdsd_jax import hub
from gdsd_jax.hub import templates, tiny
from gdsd_jax.hub.panics import panics_refused
from gdsd_jax.runtime import front
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.stderr import held_back


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny.build(directory, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return hub.load_tokenizer(checkpoint)


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@given(text=st.text(tiny.CHARACTERS))
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode([text])
    assert tokenizer.decode(ids) == [text]
    assert tokenizer.decode_one(ids[0]) == text


def test_one_token_per_character_and_per_tag(tokenizer):
    text = "<reasoning>\n1 + 2</reasoning><answer>3</answer>"
    (ids,) = tokenizer.encode([text])
    assert len(ids) == 4 + len("\n1 + 23")
    assert tokenizer.decode([ids]) == [text]
    assert tokenizer.decode(tokenizer.encode(["aéb"])) == ["ab"]
    assert tokenizer.decode_one(tokenizer.encode(["aéb"])[0]) == "a<|unk|>b"


def test_render(tokenizer):
    messages = [{"role": "user", "content": "1+1?"}]
    text = tokenizer.render(messages, assistant_prefix="<reasoning>")
    assert text == "<|user|>1+1?<|assistant|><reasoning>"
    assert len(tokenizer.encode([text])[0]) == 1 + 4 + 1 + 1
    turns = [*messages, {"role": "assistant", "content": "2"}, {"role": "user", "content": "+1?"}]
    assert tokenizer.render(turns) == "<|user|>1+1?<|assistant|>2<|eot|><|user|>+1?<|assistant|>"


def test_prompts_are_left_padded_to_the_smallest_bucket_that_holds_them(tokenizer):
    texts = ["12", "", "12345"]
    tokens, mask = tokenizer.prompts(texts, buckets=(16, 4, 8), overlong="error")
    assert tokens.shape == mask.shape == (3, 8)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [2, 0, 5]
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (tokens[~mask] == tokenizer.pad_token_id).all()
    assert [tokenizer.decode_one(row[real]) for row, real in zip(tokens, mask, strict=True)] == texts
    assert tokenizer.prompts(["1234"], buckets=(4, 8), overlong="error")[0].shape == (1, 4)


def test_overlong_prompts(tokenizer):
    with pytest.raises(UserError, match=r"prompt 1 has 6 tokens and the largest bucket 4.*config.prompt_buckets"):
        tokenizer.prompts(["1", "123456"], buckets=(2, 4), overlong="error")
    tokens, mask = tokenizer.prompts(["1", "123456"], buckets=(2, 4), overlong="keep_last")
    assert mask.sum(1).tolist() == [1, 4]
    assert tokenizer.decode(tokens) == ["1", "3456"]
    with pytest.raises(UserError, match="config.overlong"):
        tokenizer.prompts(["1"], buckets=(4,), overlong="drop")
    with pytest.raises(UserError, match="config.prompt_buckets"):
        tokenizer.prompts(["1"], buckets=(), overlong="error")


def test_decoding_stops_at_the_first_eos_and_drops_special_and_unknown_ids(tokenizer):
    eos, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    one, two = (tokenizer.encode([c])[0][0] for c in "12")
    rows = np.array([[one, eos, two, eos], [one, mask, two, 120], [eos, one, one, one]])
    assert tokenizer.decode(rows) == ["1", "12", ""]
    assert tokenizer.decode_one([one, mask, eos, two]) == "1<|mask|><|eos|>2"
    assert tokenizer.decode_one([one, mask, eos, two], special=False) == "12"


def test_every_id_that_ends_a_turn_ends_a_completion(copy):
    """The EOS, further ones of either file's list, and what the chat template writes after an answer."""
    tokenizer = hub.load_tokenizer(copy)
    (turn,) = tokenizer.encode(["<|eot|>"])[0]
    assert tokenizer.end_token_ids == (turn,)
    change_json(copy / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, 7, 1000])
    change_json(copy / "config.json", eos_token_id=[tokenizer.eos_token_id, 6])
    tokenizer = hub.load_tokenizer(copy)
    assert tokenizer.end_token_ids == (6, 7, turn)
    (one,) = tokenizer.encode(["1"])[0]
    assert tokenizer.decode([[one, end, one] for end in (6, 7, turn, tokenizer.eos_token_id)]) == ["1"] * 4
    assert hub.read_config(copy).eos_token_id == tokenizer.eos_token_id


def test_templates_of_which_none_is_the_default(copy):
    (copy / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": "{{ messages[0].content }}"} for name in ("rag", "tools")]
    change_json(copy / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match="chat templates rag, tools and none named default.*tokenizer_config.json"):
        hub.load_tokenizer(copy).render([{"role": "user", "content": "1"}])
    change_json(copy / "tokenizer_config.json", chat_template=[*templates, {"name": "default", "template": "2"}])
    assert hub.load_tokenizer(copy).render([{"role": "user", "content": "1"}]) == "2"


def test_bos_is_added_where_it_is_asked_for_and_once(tokenizer):
    plain, twice = tokenizer.encode(["1", "<|bos|>1"], add_bos=True)
    assert plain == twice == [tokenizer.bos_token_id, *tokenizer.encode(["1"])[0]]
    tokens, _ = tokenizer.prompts(["1"], buckets=(4,), overlong="error", add_bos=True)
    assert tokens[0, -2:].tolist() == plain


def test_mask_token_named_only_in_the_model_config(copy):
    change_json(copy / "tokenizer_config.json", mask_token=None)
    assert hub.load_tokenizer(copy).mask_token_id == 4


def test_no_mask_token(copy):
    change_json(copy / "tokenizer_config.json", mask_token=None)
    for named in (None, 127, -1, "4"):
        change_json(copy / "config.json", mask_token_id=named)
        with pytest.raises(UserError, match="has no mask_token and no token of id"):
            hub.load_tokenizer(copy)


def test_a_pad_that_no_file_declares_is_the_eos(copy):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        change_json(copy / file, pad_token=None, pad_token_id=None)
    tokenizer, config = hub.load_tokenizer(copy), hub.read_config(copy)
    assert tokenizer.pad_token_id == config.pad_token_id == tokenizer.eos_token_id


def test_tokenizer_class_that_is_code_of_the_checkpoint(copy):
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    change_json(copy / "tokenizer_config.json", **own)
    with pytest.raises(UserError, match="class OwnTokenizer, which is code.*PreTrainedTokenizerFast"):
        hub.load_tokenizer(copy)


def test_mask_tokens_that_disagree(copy):
    change_json(copy / "config.json", mask_token_id=5)
    with pytest.raises(UserError, match="mask_token_id is 5 in config.json but 4 in the tokenizer"):
        hub.load_tokenizer(copy)


def test_no_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    tokenizer = hub.load_tokenizer(copy)
    with pytest.raises(UserError, match="has no chat template: add chat_template.jinja"):
        tokenizer.render([{"role": "user", "content": "1"}])


def test_template_that_refuses(copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('user turns only') }}")
    with pytest.raises(UserError, match="refuses the messages: user turns only"):
        hub.load_tokenizer(copy).render([{"role": "system", "content": "1"}])


def test_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        hub.load_tokenizer(copy)


def test_corrupt_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        hub.load_tokenizer(copy)


def test_tokenizer_class_that_only_the_checkpoint_knows(copy):
    """The layout of the Dream checkpoints: byte-level BPE in two files, a class in a Python file that is never run."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        (copy / name).unlink()
    characters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "12"]
    (copy / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(characters)}))
    (copy / "merges.txt").write_text("#version: 0.2\n1 2\n")
    added = {len(characters) + i: token for i, token in enumerate(("<|endoftext|>", "<|im_end|>", "<|mask|>"))}
    (copy / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in added.items()},
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
                "tokenizer_class": "DreamTokenizer",
            }
        )
    )
    (copy / "tokenization_dream.py").write_text("raise RuntimeError('never run')")
    change_json(copy / "config.json", mask_token_id=len(characters) + 2)
    tokenizer = hub.load_tokenizer(copy)
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (len(characters), len(characters) + 2)
    text = tokenizer.render([{"role": "user", "content": "ab \n1"}])
    (ids,) = tokenizer.encode([text])
    assert [added.get(i, characters[i] if i < len(characters) else None) for i in ids] == [
        "a", "b", "Ġ", "Ċ", "1", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode([ids]) == ["ab \n1"]


# ----------------------------------------------------------------------------------------------------------------------
# What users and checkpoints must not do


def test_special_tokens_in_the_text_of_a_user_are_text(copy):
    tokenizer = hub.load_tokenizer(copy)
    honest = [{"role": "user", "content": "a + b"}]
    mask = tokenizer._tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id)
    eos = tokenizer._tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    for forged in (f"a{mask}b", f"{eos}x", f"{mask[:-1]}{mask}{eos}", mask * 3, f"a{chr(0xFDD0)}{mask}"):
        ids = tokenizer.encode([tokenizer.render([{"role": "user", "content": forged}])])[0]
        plain = tokenizer.encode([tokenizer.render(honest)])[0]
        special = set(tokenizer._tokenizer.all_special_ids) - {tokenizer._tokenizer.unk_token_id}
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert not special & set(tokenizer.encode_text([forged])[0])
    assert tokenizer.mask_token_id in tokenizer.encode([mask])[0]
    tokenizer.special_in_text = True
    text = tokenizer.render([{"role": "user", "content": f"a{mask}b"}])
    assert tokenizer.mask_token_id in tokenizer.encode([text])[0]
    assert tokenizer.mask_token_id in tokenizer.encode_text([mask])[0]


def test_half_of_a_surrogate_pair_is_a_question_mark(copy):
    """An argument of the command line that is no UTF-8 has such characters."""
    tokenizer = hub.load_tokenizer(copy)
    assert tokenizer.encode_text(["1\udcff2ü"]) == tokenizer.encode_text(["1?2ü"])


def test_one_process_renders_for_all_tokenizers_and_is_replaced(copy):
    first, second = hub.load_tokenizer(copy), hub.load_tokenizer(copy)
    second._renderer._template = "{{ messages[0].content }}{{ bos_token }}!"
    chat = [{"role": "user", "content": "a"}]
    before = first.render(chat), second.render(chat)
    assert before[0] != before[1] and before[1].endswith("!")
    process = templates._worker._process
    assert b"HOME=" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert (first.render(chat), second.render(chat)) == before and templates._worker._process is process
    process.kill()
    process.wait()
    assert (first.render(chat), second.render(chat)) == before and templates._worker._process is not process


def test_templates_that_loop_or_grow_are_ended(copy, monkeypatch):
    monkeypatch.setattr("gdsd_jax.hub.templates._SECONDS", 1.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    double = "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    for template, said in ((loop, "takes more than 1 s"), (double, "memory|MemoryError|characters|more than 1 s")):
        (copy / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=said):
            hub.load_tokenizer(copy).render([{"role": "user", "content": "a"}])


def sequence(kind, *steps):
    return {"type": "Sequence", kind: list(steps)}


def replace(old, new, kind="String"):
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


GROWING = {
    "doubled": {"normalizer": sequence("normalizers", *[replace("e", "ee")] * 26)},
    "nested": {"normalizer": sequence("normalizers", *[sequence("normalizers", *[replace("e", "ee")] * 5)] * 5)},
    "matches nothing": {"normalizer": sequence("normalizers", *[replace("(?=e)", "e", "Regex")] * 26)},
    "empty": {"decoder": sequence("decoders", *[replace("", "1")] * 28)},
    "decoded": {"decoder": sequence("decoders", *[replace("1", "11")] * 28)},
    "no type": {"normalizer": {"normalizers": [{"pattern": {"String": "e"}, "content": "ee"}] * 26}},
    "list": {"normalizer": sequence("normalizers", [{"String": "e"}, "ee"])},
    "bytes": {"pre_tokenizer": sequence("pretokenizers", *[{"type": "ByteLevel"}] * 26)},
    "spaces": {"decoder": sequence("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 26)},
    "front": {"normalizer": {"type": "Prepend", "prepend": "e" * 2000}},
    "table": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(bytes(4) + b"e" * 2000 + b"\0").decode(),
        }
    },
    "many": {"normalizer": sequence("normalizers", *[{"type": "Lowercase"}] * 300)},
}


@pytest.mark.parametrize("case", GROWING)
def test_steps_that_make_a_text_endless_are_refused(case, copy):
    change_json(copy / "tokenizer.json", **GROWING[case])
    with pytest.raises(UserError, match=f"its {next(iter(GROWING[case]))} has .* times as long"):
        hub.load_tokenizer(copy)


def test_steps_of_published_tokenizers_are_taken(copy):
    """Those of XLNet and ALBERT, which have most, of Llama 2, and of byte-level tokenizers."""
    quotes = [replace("``", '"'), replace("''", '"'), replace(" {2,}", " ", "Regex")]
    forms = [{"type": kind} for kind in ("NFKD", "StripAccents", "Lowercase", "NFC")]
    space = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
    back = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    change_json(
        copy / "tokenizer.json",
        normalizer=sequence("normalizers", *quotes, *forms, *space),
        pre_tokenizer=sequence("pretokenizers", digits, level),
        decoder=sequence("decoders", *back),
    )
    assert hub.load_tokenizer(copy).encode(["see"])[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_more_added_tokens_than_can_be_loaded_are_refused(name, copy):
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {f"<x{index}>": 1000 + index for index in range(20_001)}
    full = [token | {"id": index, "content": text} for text, index in added.items()]
    changes = {
        "tokenizer.json": {"added_tokens": full},
        "added_tokens.json": added,
        "tokenizer_config.json": {"added_tokens_decoder": {one["id"]: one for one in full}},
    }
    (copy / "added_tokens.json").write_text("{}")
    change_json(copy / name, **changes[name])
    with pytest.raises(UserError, match=f"{name} adds 20001 tokens"):
        hub.load_tokenizer(copy)


def test_a_pattern_that_takes_too_many_steps_is_one_line(copy, capfd):
    """The library panics, and what it writes to stderr itself does not appear."""
    split = {"type": "Split", "pattern": {"Regex": r"(\w|\w\w)+$"}, "behavior": "Isolated", "invert": False}
    decoder = sequence("decoders", {"type": "Fuse"}, replace(r"(\w|\w\w)+$", "", "Regex"))
    change_json(copy / "tokenizer.json", pre_tokenizer=split, decoder=decoder)
    tokenizer = hub.load_tokenizer(copy)
    for text in ("a" * 60 + "?", "a" * 60 + "<|mask|>" + "a" * 60 + "?"):
        with pytest.raises(UserError, match=r"its tokenizer\.json fails at a text \(Onig: .*published checkpoint"):
            tokenizer.encode_text([text])
    ids = tokenizer.encode(["a"])[0] * 60 + tokenizer.encode(["?"])[0]
    with pytest.raises(UserError, match=r"its tokenizer\.json fails at a text"):
        tokenizer.decode([ids])
    assert "panicked" not in capfd.readouterr().err


def test_what_is_written_to_stderr_beside_the_tokenizer_appears(capfd):
    with panics_refused("directory", "fails", "remedy"):
        os.write(2, b"first\n")
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('second\\n')"], check=True)
        assert not capfd.readouterr().err
    with pytest.raises(KeyError), panics_refused("directory", "fails", "remedy"):
        os.write(2, b"third\n")
        raise KeyError
    os.write(2, b"fourth\n")
    assert capfd.readouterr().err == "first\nsecond\nthird\nfourth\n"


def test_a_command_that_ends_while_stderr_is_held_back_says_why(capfd):
    with held_back():
        os.write(2, b"before\n")
        with held_back():  # as in a signal handler
            front.say("the reason")
        assert capfd.readouterr().err == "before\nthe reason\n"
    assert not capfd.readouterr().err


def test_a_closed_stderr_stops_no_tokenizer(copy):
    code = (
        "import os, sys; os.close(2); from gdsd_jax import hub; "
        "print(hub.load_tokenizer(sys.argv[1]).encode(['a', 'b']) != [])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_a_panic_while_a_tokenizer_is_loaded_is_one_line(copy, capfd):
    """A token that is added is put through the normalizer when it is loaded."""
    content = json.loads((copy / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"].append(added | {"id": 1000, "content": "a" * 60 + "?"})
    change_json(copy / "tokenizer.json", **content | {"normalizer": replace(r"(\w|\w\w)+$", "", "Regex")})
    with pytest.raises(UserError, match="its tokenizer does not load .Onig"):
        hub.load_tokenizer(copy)
    assert "panicked" not in capfd.readouterr().err


def test_another_file_than_the_one_that_was_checked_is_not_loaded(copy):
    (copy / "tokenizer.4.0.0.json").write_text("{}")
    change_json(copy / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    with pytest.raises(UserError, match=r"fast_tokenizer_files names files that are not read: remove it"):
        hub.load_tokenizer(copy)


def test_an_id_beyond_the_embedding_is_refused(copy):
    tokenizer = hub.load_tokenizer(copy)
    tokenizer.embedded = 3
    with pytest.raises(UserError, match="the embedding has 3 rows"):
        tokenizer.prompts(["a + b"], buckets=(64,), overlong="error")


def test_pipes_devices_and_links_out_of_the_directory_are_refused(copy):
    (copy / "vocab.json").unlink(missing_ok=True)
    os.mkfifo(copy / "vocab.json")
    with pytest.raises(UserError, match=r"vocab\.json is no regular file"):
        hub.load_tokenizer(copy)
    (copy / "vocab.json").unlink()
    (copy / "merges.txt").unlink(missing_ok=True)
    (copy / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"merges\.txt is a link out of its directory"):
        hub.load_tokenizer(copy)
    (copy / "merges.txt").unlink()
    (copy / "chat_template.jinja").touch()
    os.truncate(copy / "chat_template.jinja", 50 << 30)
    with pytest.raises(UserError, match=r"chat_template\.jinja has 53687091200 bytes"):
        hub.load_tokenizer(copy)
