"""A model family of one's own, as docs/new_family.md writes it: names and keys that no other family has."""

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families.family import Family, Row, refuse, rope_theta

# Fields of DenoiserConfig that are the same in every checkpoint.
QUIRKS = {"qkv_bias": True, "next_token_logits": False, "block_origin": "sequence"}
PROJECTIONS = {"q": "Q", "k": "K", "v": "K"}
ROWS = (
    Row("wte.weight", ("embedding",), "VD"),
    Row("ln_f.weight", ("final_norm",), "D"),
    Row("head.weight", ("head",), "VD"),
    Row("h.{n}.ln_1.weight", ("layers", "attn_norm"), "D"),
    Row("h.{n}.ln_2.weight", ("layers", "mlp_norm"), "D"),
    *(Row(f"h.{{n}}.attn.{x}.weight", ("layers", x, "weight"), f"{axis}D") for x, axis in PROJECTIONS.items()),
    *(Row(f"h.{{n}}.attn.{x}.bias", ("layers", x, "bias"), axis) for x, axis in PROJECTIONS.items()),
    Row("h.{n}.attn.out.weight", ("layers", "o", "weight"), "DQ"),
    Row("h.{n}.mlp.w1.weight", ("layers", "gate", "weight"), "FD"),
    Row("h.{n}.mlp.w2.weight", ("layers", "down", "weight"), "DF"),
    Row("h.{n}.mlp.w3.weight", ("layers", "up", "weight"), "FD"),
)
# Key of config.json -> field of DenoiserConfig.
KEYS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "depth": "num_layers",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "mlp": "intermediate_size",
    "context": "max_length",
    "epsilon": "rms_norm_eps",
    "tied": "tied_head",
    "block": "block_size",
} | {name: name for name in ("mask_token_id", "eos_token_id", "pad_token_id")}


def read(hf):
    refuse(hf, {"activation": ("silu",)})
    fields = {field: hf[key] for key, field in KEYS.items()}
    return DenoiserConfig(family="example", rope_theta=rope_theta(hf), **fields, **QUIRKS)


def write(config):
    fixed = {"model_type": "example", "architectures": ["ExampleModel"], "activation": "silu"}
    return fixed | {key: getattr(config, field) for key, field in KEYS.items()} | {"rope_theta": config.rope_theta}


FAMILIES = (
    Family(
        name="example",
        model_type="example",
        repository="someone/example-1B",
        rows=ROWS,
        read=read,
        write=write,
        quirks=QUIRKS | {"block_size": 4},
        tokens={"mask_token_id": "<|mask|>"},
        sampler={"strategy": "low_confidence", "block_length": 4, "threshold": 0.9},
    ),
)
