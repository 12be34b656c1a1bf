"""Implements the PyTorch side of the benches: Hugging Face's Llama with full attention, a sampler and an update.

The plain sampler does what the public trainers do: logits of all positions, Gumbel noise for each, a top-k for each
row. It leaves out their float64 noise, which is not needed here. The lean sampler has the changes that an expert in
PyTorch would make first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import peft
import torch
import transformers

from benchmarks.workloads import Workload, weights

NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(shape: Workload) -> transformers.LlamaForCausalLM:
    """Returns the frozen model with the weights of `workloads.weights`."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    config.is_causal = False
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    # The rotary frequencies are not weights, so the code below does not fill them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ours = weights(shape)
    tensors = {"model.embed_tokens.weight": ours["embedding"], "lm_head.weight": ours["head"]}
    tensors["model.norm.weight"] = ours["final_norm"]
    for n in range(shape.layers):
        block = f"model.layers.{n}"
        tensors[f"{block}.input_layernorm.weight"] = ours["layers"]["attn_norm"][n]
        tensors[f"{block}.post_attention_layernorm.weight"] = ours["layers"]["mlp_norm"][n]
        for name, theirs in NAMES.items():
            tensors[f"{block}.{theirs}.weight"] = ours["layers"][name]["weight"][n]
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model.requires_grad_(False).eval().to(DEVICE)


Noise = Callable[[torch.Tensor, float], torch.Tensor]
Proposal = Callable[[torch.nn.Module, torch.Tensor, slice, int, float], tuple[torch.Tensor, torch.Tensor]]


def gumbel(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Adds Gumbel noise, scaled by the temperature, to the logits."""
    return logits - temperature * torch.log(-torch.log(torch.rand_like(logits)))


def gumbel_in_float64(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns values whose largest is drawn like that of `gumbel`, computed in float64 as the public samplers do."""
    logits = logits.double()
    return logits.exp() / (-torch.log(torch.rand_like(logits))) ** temperature


def propose(
    model: torch.nn.Module, x: torch.Tensor, block: slice, mask_id: int, temperature: float, noisy: Noise = gumbel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns candidates and their probabilities in the active block; the plain way computes them at all positions."""
    logits = model(input_ids=x).logits
    logits[..., mask_id] = -torch.inf
    probs = torch.softmax(logits, dim=-1)
    candidates = torch.argmax(noisy(logits, temperature) if temperature > 0 else logits, dim=-1)
    return candidates[:, block], torch.gather(probs, -1, candidates[..., None])[:, block, 0]


def propose_leanly(
    model: torch.nn.Module, x: torch.Tensor, block: slice, mask_id: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same, with the head on the block alone and exponential noise, which takes a single logarithm each."""
    logits = model.lm_head(model.model(input_ids=x).last_hidden_state[:, block])
    logits[..., mask_id] = -torch.inf
    probs = torch.softmax(logits, dim=-1)
    if temperature > 0:
        noise = torch.rand_like(logits).log_().neg_()
        noise = noise if temperature == 1 else noise.pow_(temperature)
        candidates = torch.argmax(noise.reciprocal_().mul_(probs), dim=-1)
    else:
        candidates = torch.argmax(logits, dim=-1)
    return candidates, torch.gather(probs, -1, candidates[..., None])[..., 0]


@torch.inference_mode()
def sample(
    model: torch.nn.Module,
    propose: Proposal,
    prompts: torch.Tensor,
    shape: Workload,
    temperature: float,
    limit: int | None = None,
) -> torch.Tensor:
    """Samples `[B, P+L]` by low-confidence remasking in blocks, with a fixed number of tokens per step.

    Args:
      propose: `propose` or `propose_leanly`, compiled or not.
      limit: number of steps after which sampling stops unfinished.
    """
    rows, length = prompts.shape
    x = torch.full((rows, length + shape.completion), shape.mask_id, device=prompts.device)
    x[:, :length] = prompts
    blocks = shape.completion // shape.block
    steps = max(1, shape.steps // blocks)
    each, extra = divmod(shape.block, steps)
    for count, (block, step) in enumerate(itertools.product(range(blocks), range(steps))):
        if count == limit:
            break
        where = slice(length + block * shape.block, length + (block + 1) * shape.block)
        candidates, confidence = propose(model, x, where, shape.mask_id, temperature)
        active = x[:, where]
        confidence = torch.where(active == shape.mask_id, confidence, -torch.inf)
        for row in range(rows):
            chosen = torch.topk(confidence[row], k=each + (step < extra)).indices
            active[row, chosen] = candidates[row, chosen]
    return x


def adapted(shape: Workload, rank: int, targets: tuple[str, ...]) -> torch.nn.Module:
    """Returns the model with LoRA adapters."""
    names = [NAMES[target].rpartition(".")[2] for target in targets]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    return peft.get_peft_model(build(shape), settings)


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, advantages: torch.Tensor,
    shape: Workload, clip_norm: float, *, whole: bool = True,
) -> float:  # fmt: skip
    """Makes one GDSD update from one coupled pair of views, and returns the loss.

    Both views go through the head, and every token is read in the view that masks it.

    Args:
      whole: whether the prompt goes through the head too, as in the public trainers.
    """
    rows, length = tokens.shape[0], shape.completion
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    count = int(torch.randint(0, length + 1, ()))
    order = torch.rand(rows, length, device=tokens.device).argsort(dim=-1)
    masked[:, shape.prompt :] = order < count
    complement = ~masked
    complement[:, : shape.prompt] = False
    views = torch.cat([masked, complement])
    twice = torch.cat([tokens, tokens])
    kept = 0 if whole else length
    logits = model(input_ids=torch.where(views, shape.mask_id, twice), logits_to_keep=kept).logits[:, -length:]
    targets = twice[:, shape.prompt :]
    log_probs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    score = (log_probs.view_as(targets) * views[:, shape.prompt :]).sum(dim=-1).view(2, rows).sum(dim=0)
    loss = (((score - score.detach()) / length - advantages) ** 2).sum() / rows
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), clip_norm)
    optimizer.step()
    return loss.item()
