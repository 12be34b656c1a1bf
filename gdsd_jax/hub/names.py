"""One table per family: tensor name in a Hugging Face checkpoint <-> place in our parameters. Used in both directions.

PyTorch's `Linear` stores `[out, in]`; our kernels are `[in, out]` with the layers stacked in front, so a stored tensor
is one layer of a parameter, transposed if it is a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gdsd_jax.denoiser import TARGETS, DenoiserConfig
from gdsd_jax.errors import UserError


class Row(NamedTuple):
    """A line of the table: stored name (`{n}` is the layer), path in the base, symbols of the stored axes."""

    name: str
    path: tuple[str, ...]
    axes: str


class Slot(NamedTuple):
    """Where one stored tensor lives: a path in the base, a layer of it (None: not stacked), and its stored shape."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"


class Family(NamedTuple):
    """A checkpoint format: `model_type`, the hub repository that carries its modelling code, its name table."""

    model_type: str
    repository: str
    rows: tuple[Row, ...]


# Axes: V vocabulary, D model, F feed-forward, Q all query heads, K all key/value heads.
FAMILIES = {
    "llada": Family(
        "llada",
        "GSAI-ML/LLaDA-8B-Instruct",
        (
            Row("model.transformer.wte.weight", ("embedding",), "VD"),
            Row("model.transformer.ln_f.weight", ("final_norm",), "D"),
            Row("model.transformer.ff_out.weight", ("head",), "VD"),
            Row("model.transformer.blocks.{n}.attn_norm.weight", ("layers", "attn_norm"), "D"),
            Row("model.transformer.blocks.{n}.ff_norm.weight", ("layers", "mlp_norm"), "D"),
            Row("model.transformer.blocks.{n}.q_proj.weight", ("layers", "q", "kernel"), "QD"),
            Row("model.transformer.blocks.{n}.q_proj.bias", ("layers", "q", "bias"), "Q"),
            Row("model.transformer.blocks.{n}.k_proj.weight", ("layers", "k", "kernel"), "KD"),
            Row("model.transformer.blocks.{n}.k_proj.bias", ("layers", "k", "bias"), "K"),
            Row("model.transformer.blocks.{n}.v_proj.weight", ("layers", "v", "kernel"), "KD"),
            Row("model.transformer.blocks.{n}.v_proj.bias", ("layers", "v", "bias"), "K"),
            Row("model.transformer.blocks.{n}.attn_out.weight", ("layers", "o", "kernel"), "DQ"),
            Row("model.transformer.blocks.{n}.ff_proj.weight", ("layers", "gate", "kernel"), "FD"),
            Row("model.transformer.blocks.{n}.up_proj.weight", ("layers", "up", "kernel"), "FD"),
            Row("model.transformer.blocks.{n}.ff_out.weight", ("layers", "down", "kernel"), "DF"),
        ),
    ),
    "dream": Family(
        "Dream",
        "Dream-org/Dream-v0-Instruct-7B",
        (
            Row("model.embed_tokens.weight", ("embedding",), "VD"),
            Row("model.norm.weight", ("final_norm",), "D"),
            Row("lm_head.weight", ("head",), "VD"),
            Row("model.layers.{n}.input_layernorm.weight", ("layers", "attn_norm"), "D"),
            Row("model.layers.{n}.post_attention_layernorm.weight", ("layers", "mlp_norm"), "D"),
            Row("model.layers.{n}.self_attn.q_proj.weight", ("layers", "q", "kernel"), "QD"),
            Row("model.layers.{n}.self_attn.q_proj.bias", ("layers", "q", "bias"), "Q"),
            Row("model.layers.{n}.self_attn.k_proj.weight", ("layers", "k", "kernel"), "KD"),
            Row("model.layers.{n}.self_attn.k_proj.bias", ("layers", "k", "bias"), "K"),
            Row("model.layers.{n}.self_attn.v_proj.weight", ("layers", "v", "kernel"), "KD"),
            Row("model.layers.{n}.self_attn.v_proj.bias", ("layers", "v", "bias"), "K"),
            Row("model.layers.{n}.self_attn.o_proj.weight", ("layers", "o", "kernel"), "DQ"),
            Row("model.layers.{n}.mlp.gate_proj.weight", ("layers", "gate", "kernel"), "FD"),
            Row("model.layers.{n}.mlp.up_proj.weight", ("layers", "up", "kernel"), "FD"),
            Row("model.layers.{n}.mlp.down_proj.weight", ("layers", "down", "kernel"), "DF"),
        ),
    ),
}


def family(config: DenoiserConfig) -> Family:
    """The table of `config.family`.

    Raises:
      UserError: no such family.
    """
    if config.family not in FAMILIES:
        raise UserError(f"unknown model family {config.family!r}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def slots(config: DenoiserConfig) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this configuration has, by its stored name. One to one in both directions."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
    }
    table = {}
    for row in family(config).rows:
        if row.path == ("head",) and config.tied_head or row.path[-1] == "bias" and not config.qkv_bias:
            continue
        shape = tuple(sizes[axis] for axis in row.axes)
        for layer in range(config.num_layers) if row.path[0] == "layers" else (None,):
            table[row.name.format(n=layer)] = Slot(row.path, layer, shape)
    return table


def parameters(config: DenoiserConfig) -> dict[tuple[str, ...], list[str]]:
    """The same table read the other way: path in the base -> its stored names, in the order of the layers."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, slot in slots(config).items():
        names.setdefault(slot.path, []).append(name)
    return names


def at(tree: Any, path: Sequence[str]) -> Any:
    """The leaf of a nested dictionary at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: dict, path: Sequence[str], value: Any) -> None:
    """Sets the leaf at `path`, making the dictionaries on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def module(config: DenoiserConfig, target: str, layer: int | str = "{n}") -> str:
    """Name of the PyTorch module that holds the kernel of an adapter target (our name) in a layer."""
    path = ("layers", target, "kernel")
    return next(row.name for row in family(config).rows if row.path == path).removesuffix(".weight").format(n=layer)


def target_modules(config: DenoiserConfig, targets: Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules` for adapter targets in our names, in their order.

    A list of the last parts of the module names, which PEFT matches as suffixes; but where one of them also ends the
    name of a module that is not a target (the head of one family is called like its down projection), one regular
    expression over whole names, anchored in the blocks.
    """
    wanted = [module(config, target) for target in targets]
    leaves = [name.rpartition(".")[2] for name in wanted]
    others = {row.name.removesuffix(".weight") for row in family(config).rows} - set(wanted)
    if not any(other.rpartition(".")[2] in leaves for other in others):
        return leaves
    prefix = wanted[0].partition("{n}.")[0]
    inner = "|".join(re.escape(name.partition("{n}.")[2]) for name in wanted)
    return rf"{re.escape(prefix)}\d+\.(?:{inner})"


def matched_targets(config: DenoiserConfig, spec: Sequence[str] | str) -> tuple[str, ...]:
    """Our names of the block matrices that PEFT's `target_modules` selects, in the order in which it names them."""
    modules = {target: module(config, target, 0) for target in TARGETS}
    if spec == "all-linear":
        return TARGETS
    if isinstance(spec, str):
        chosen = [target for target, name in modules.items() if re.fullmatch(spec, name)]
        order = spec
    else:
        chosen = [t for t, name in modules.items() if any(name == s or name.endswith(f".{s}") for s in spec)]
        order = "|".join(spec)
    return tuple(sorted(chosen, key=lambda target: order.find(modules[target].rpartition(".")[2])))


def adapter_names(config: DenoiserConfig, targets: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """PEFT tensor name -> (target, "a" or "b", layer). Stored A is `[r, in]`, B is `[out, r]`: both transposed."""
    return {
        f"base_model.model.{module(config, target, layer)}.lora_{factor.upper()}.weight": (target, factor, layer)
        for target in targets
        for layer in range(config.num_layers)
        for factor in ("a", "b")
    }


def hf_config(config: DenoiserConfig) -> dict[str, Any]:
    """A complete `config.json` in the keys of the family, for parameters that come from no checkpoint.

    `auto_map` points at the family's modelling code on the hub.
    """
    repository = family(config).repository
    return {"llada": _llada_config, "dream": _dream_config}[config.family](config, f"{repository}--")


def _llada_config(config: DenoiserConfig, code: str) -> dict[str, Any]:
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": f"{code}configuration_llada.LLaDAConfig",
            "AutoModel": f"{code}modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": f"{code}modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": config.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_token_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": config.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied_head,
    }


def _dream_config(config: DenoiserConfig, code: str) -> dict[str, Any]:
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": f"{code}configuration_dream.DreamConfig",
            "AutoModel": f"{code}modeling_dream.DreamModel",
        },
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_length,
        "max_window_layers": config.num_layers,
        "model_type": "Dream",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_head,
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
