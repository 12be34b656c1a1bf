"""Dream-7B (arXiv 2508.15487) and the models that share its code and names: Dream-Coder and DiffuCoder."""

from __future__ import annotations

from gdsd_jax.denoiser import DenoiserConfig
from gdsd_jax.families import decoder
from gdsd_jax.families.family import Family

REPOSITORY = "Dream-org/Dream-v0-Instruct-7B"
CLASSES = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
# The raw logits at position i predict token i + 1.
QUIRKS = {"qkv_bias": True, "next_token_logits": True}

DREAM_7B = DenoiserConfig(
    family="dream",
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    intermediate_size=18944,
    max_length=131072,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tied_head=False,
    mask_token_id=151666,
    eos_token_id=151643,
    pad_token_id=151643,
    **QUIRKS,
)
_NAMES = (
    "Dream-v0-Instruct-7B",
    "Dream-v0-Base-7B",
    "Dream-Coder-v0-Instruct-7B",
    "Dream-Coder-v0-Base-7B",
    "DiffuCoder-7B-Base",
    "DiffuCoder-7B-Instruct",
    "DiffuCoder-7B-cpGRPO",
)
FAMILIES = (
    Family(
        name="dream",
        model_type="Dream",
        repository=REPOSITORY,
        rows=decoder.ROWS,
        read=lambda hf: decoder.read(hf, "dream", QUIRKS),
        write=lambda config: decoder.write(config, "Dream", REPOSITORY, CLASSES),
        quirks=QUIRKS,
        tokenizer_classes={"DreamTokenizer": "Qwen2Tokenizer"},
        # With CAUSAL_LM, PEFT takes prepare_inputs_for_generation from the model, which Dream's class does not have.
        task_type=None,
        sampler={"strategy": "entropy", "alg_temp": 0.0, "top_p": 0.95},
        published=dict.fromkeys(_NAMES, DREAM_7B),
    ),
)
