"""The description of a masked denoiser: its sizes, token ids and quirks, which `gdsd_jax.families` reads from files.

All denoisers are Llama-like decoders. They differ in biases, in norms of queries and keys, in grouped heads, in which
tokens attend to which, and in whether the logits at position `i` predict token `i` or token `i + 1`.
"""

from __future__ import annotations

import dataclasses

from gdsd_jax.runtime import ranges
from gdsd_jax.runtime.errors import UserError
from gdsd_jax.runtime.ranges import Count, Positive

REMAT_POLICIES = ("none", "full", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
BLOCK_ORIGINS = ("sequence", "column")
ATTENTION = ("auto", "plain", "splash", "cudnn")
WEIGHTS = ("stored", "int8")


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes, ids and numerics of a denoiser. Hashable, so it can be a static argument of a compiled function.

    Attributes:
      family: name of the checkpoint format in `gdsd_jax.families`; nothing in the denoiser reads it.
      vocab_size: rows of the embedding and of the head.
      next_token_logits: the raw logits at position `i` predict token `i + 1`. The denoiser shifts them, so that
        everything above it sees target-aligned logits.
      mask_token_id, eos_token_id, pad_token_id: always those of the checkpoint.
      end_token_ids: further ids that end a completion, such as that of an end of turn.
      known_tokens: number of ids that the tokenizer knows. The ids from this number on only fill up the embedding and
        are never proposed. None: every row of the embedding is a token.
      head_size: size of a head; None: `hidden_size / num_heads`.
      qk_norm: queries and keys of each head pass an RMSNorm of their own before they are rotated.
      block_size: tokens per block of block-causal attention: a token attends to its own block and to the blocks before
        it, and text is written block after block. None: every token attends to every other.
      block_origin: where the blocks are counted from. "sequence": the first real token, so that a prompt may share a
        block with its completion; "column": the first column, pads or not, of prompts padded to a multiple of the
        block size, so that every completion begins with a block.
      blind_pads: the attention output of a pad is zero, instead of a mean over the tokens that others attend to. This
        matters only where a pad's state is read, that is, where the denoiser wrote a pad and predicts the next token.
      dtype: compute dtype of activations and matmuls, "float32" or "bfloat16". Norms, RoPE, softmax and
        log-normalisers are float32 in either case, and "float32" asks for full-precision matmuls on every platform.
      weights: "stored" keeps the dtype in which the matrices of the base come; "int8" holds the matrices of the layers
        in 8 bits, as `gdsd_jax.denoiser.quantise` rounds them, and cannot train them.
      remat: "none" keeps all activations for the backward pass, "dots" keeps matmul outputs, "full" keeps only the
        residual stream between layers; the backward pass recomputes the rest.
      attention: "plain" is `ops.attention`, "splash" the kernel for TPUs, "cudnn" the one for NVIDIA GPUs; "auto"
        chooses by the devices, see `gdsd_jax.denoiser.attention.chosen`.
      layer_unroll: layers per iteration of the scan over layers. 1 compiles fastest and is right for deep models;
        `num_layers` removes the loop, which small models on a CPU like best.
    """

    family: str
    vocab_size: Count
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    intermediate_size: Count
    max_length: Count
    rope_theta: Positive
    rms_norm_eps: Positive
    qkv_bias: bool
    tied_head: bool
    next_token_logits: bool
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    head_size: Count | None = None
    qk_norm: bool = False
    block_size: int | None = None
    block_origin: str = "sequence"
    blind_pads: bool = False
    end_token_ids: tuple[int, ...] = ()
    known_tokens: int | None = None
    dtype: str = "float32"
    weights: str = "stored"
    remat: str = "none"
    attention: str = "auto"
    layer_unroll: Count = 1

    def __post_init__(self):
        if self.dtype not in COMPUTE_DTYPES:
            raise UserError(f"compute dtype {self.dtype!r} is not one of {COMPUTE_DTYPES}: change config.model.dtype")
        if self.remat not in REMAT_POLICIES:
            known = ", ".join(REMAT_POLICIES)
            raise UserError(
                f"remat policy {self.remat!r} is not one of {known}: set config.model.remat to one of them, or to auto"
            )
        if self.weights not in WEIGHTS:
            raise UserError(f"weights {self.weights!r} is not one of {WEIGHTS}: change config.model.weights")
        if self.attention not in ATTENTION:
            raise UserError(f"attention {self.attention!r} is not one of {ATTENTION}: change config.model.attention")
        if self.block_origin not in BLOCK_ORIGINS:
            raise UserError(f"block origin {self.block_origin!r} is not one of {BLOCK_ORIGINS}")
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size < 1):
            raise UserError(f"the block size in config.json is {self.block_size!r}, it must be an integer above 0")
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise UserError(f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads are not a multiple of the {self.num_kv_heads} key/value heads")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if type(value) is not int:
                raise UserError(f"{name} in config.json is {value!r}, it must be an integer")
            if not 0 <= value < self.vocab_size:
                raise UserError(f"{name} {value} lies outside the vocabulary of {self.vocab_size}: see config.json")
        ranges.check(self, "model")

    @property
    def ends(self) -> tuple[int, ...]:
        """Returns all ids that end a completion; the EOS comes first."""
        return (self.eos_token_id, *self.end_token_ids)

    @property
    def padding_tokens(self) -> tuple[int, ...]:
        """Returns the ids that no tokenizer knows; they only fill up the embedding."""
        return () if self.known_tokens is None else tuple(range(self.known_tokens, self.vocab_size))

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads
