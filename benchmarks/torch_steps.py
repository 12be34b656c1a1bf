"""Measures PyTorch (SDPA, PEFT) at the 8B shape of `benchmarks.accelerator`: the lean sampler step and the update.

    python -m benchmarks.torch_steps [--tiny] [--rows 32]

It prints a JSON row for each part as it is measured: a step without adapters and one with LoRA, each with eager and
with compiled layers, and an update of one coupled pair of views with the KL to the base, with compiled layers and
recomputation. Prompts have no pads here, so that PyTorch needs no mask. It is the part `torch` of
`benchmarks.accelerator`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import transformers

from benchmarks.arguments import number, parser_of
from benchmarks.reference import DEVICE, NAMES, propose_leanly
from gdsd_jax.runtime import ranges

# Sizes of the published model, and those of `accelerator_parts.TINY`.
REAL = {"vocabulary": 126464, "width": 4096, "feed_forward": 12288, "layers": 32, "heads": 32, "rank": 128}
TINY = {"vocabulary": 512, "width": 64, "feed_forward": 128, "layers": 2, "heads": 4, "rank": 4}
LENGTHS = {False: (400, 256, 32), True: (16, 16, 8)}


def build(sizes: dict[str, int]) -> torch.nn.Module:
    """Returns a frozen model in bfloat16 with full attention, whose random weights are drawn on the device."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["width"], intermediate_size=sizes["feed_forward"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["heads"],
        max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    config.is_causal = False
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=DEVICE)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)
    for weight in model.parameters():
        torch.nn.init.ones_(weight) if weight.ndim == 1 else torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model.requires_grad_(False).eval()


def timed(work: Callable[[], Any], turns: int) -> dict[str, Any]:
    """Returns the seconds of the first call, which compiles, and the median of `turns` later ones, or the error."""
    taken = []
    try:
        for _ in range(turns + 1):
            start = time.perf_counter()
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    return {"first_seconds": taken[0], "seconds": statistics.median(taken[1:])}


def parts(tiny: bool, rows: int, update_rows: int, turns: int) -> Iterator[dict[str, Any]]:
    """Measures all parts, and yields a row of results for each."""
    sizes, (prompt, completion, block) = TINY if tiny else REAL, LENGTHS[tiny]
    model = build(sizes)
    layers = list(model.model.layers)
    tokens = torch.randint(0, sizes["vocabulary"], (rows, prompt + completion), device=DEVICE)
    where = slice(prompt + block, prompt + 2 * block)

    def step(model: torch.nn.Module) -> Callable[[], Any]:
        def work() -> Any:
            with torch.inference_mode():
                return propose_leanly(model, tokens, where, 3, 1.0)

        return work

    def compiled(yes: bool) -> None:
        for layer in layers:
            layer._compiled_call_impl = None
            if yes and DEVICE == "cuda":
                layer.compile()

    for kind in ("eager", "compiled"):
        compiled(kind == "compiled")
        yield {"part": f"torch step, {kind}", "rows": rows} | timed(step(model), turns)
    compiled(False)
    names = [name.rpartition(".")[2] for name in NAMES.values()]
    settings = peft.LoraConfig(r=sizes["rank"], lora_alpha=sizes["rank"] // 2, target_modules=names)
    adapted = peft.get_peft_model(model, settings)
    for weight in adapted.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    for kind in ("eager", "compiled"):
        compiled(kind == "compiled")
        yield {"part": f"torch step with LoRA, {kind}", "rows": rows} | timed(step(model), turns)
    yield {"part": "torch update", "rows": update_rows} | timed(updater(adapted, tokens[:update_rows], prompt), turns)


def updater(model: peft.PeftModel, tokens: torch.Tensor, prompt: int) -> Callable[[], None]:
    """Returns GDSD's update from one coupled pair of views, with a quadratic estimate of the KL to the base."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(trained, lr=3e-6)
    rows, length = tokens.shape[0], tokens.shape[1] - prompt
    advantages = torch.arange(rows, device=DEVICE) % 2 - 0.5

    def score(views: torch.Tensor, twice: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities of the completion tokens, `[2B, L]`."""
        inputs = torch.where(views, 3, twice)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(input_ids=inputs, logits_to_keep=length).logits
        targets = twice[:, prompt:]
        return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            targets
        )

    def work() -> None:
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, prompt:] = torch.rand(rows, length, device=DEVICE) < torch.rand(rows, 1, device=DEVICE)
        other = ~masked
        other[:, :prompt] = False
        views, twice = torch.cat([masked, other]), torch.cat([tokens, tokens])
        read = views[:, prompt:]
        with torch.no_grad(), model.disable_adapter():
            base = score(views, twice)
        found = score(views, twice)
        total = (found * read).sum(dim=-1).view(2, rows).sum(dim=0)
        loss = (((total - total.detach()) / length - advantages) ** 2).sum() / rows
        loss = loss + 1e-3 * (((found - base) * read) ** 2).sum() / read.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.2)
        optimizer.step()

    return work


def main(argv: list[str] | None = None) -> None:
    parser, count = parser_of(__doc__), number(ranges.Count)
    parser.add_argument("--tiny", action="store_true", help="runs in small, also on a CPU")
    parser.add_argument("--rows", type=count, help="rows of a sampler step (default: 32, or 2 with --tiny)")
    parser.add_argument("--turns", type=count, default=3, help="turns, of which the median is taken")
    flags = parser.parse_args(argv)
    torch._dynamo.config.recompile_limit = 64
    for row in parts(flags.tiny, flags.rows or (2 if flags.tiny else 32), 2 if flags.tiny else 8, flags.turns):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
