"""Writes the model cards of exported checkpoints and adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from gdsd_jax import families
from gdsd_jax.denoiser import DenoiserConfig, LoRA


def _facts(training: Mapping[str, Any] | None) -> str:
    if not training:
        return "No record of the training was given.\n"
    return "".join(f"- {name}: {value}\n" for name, value in training.items())


def _lora_line(lora: LoRA) -> str:
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def model_card(
    title: str,
    config: DenoiserConfig,
    lora: LoRA | None,
    source: epath.Path | None,
    training: Mapping[str, Any] | None,
) -> str:
    """Returns the model card of an exported checkpoint, as Markdown; `source` is the base, None for random weights."""
    base = "random weights" if source is None else source.resolve().name
    merged = "" if lora is None else f"A low-rank adapter ({_lora_line(lora)}) is merged into the weights.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- masked-diffusion
- gdsd-jax
---

# {title}

A masked diffusion language model ({families.family_of(config).model_type}, {config.num_layers} layers, width \
{config.hidden_size}), written by gdsd_jax.

Base model: {base}
{merged}
## Training

{_facts(training)}
## Loading

The directory has the layout of the base model, so whatever loads the base model also loads this checkpoint:

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```

In gdsd_jax: `gdsd_jax.hub.load_checkpoint(path)`. Text comes from iterative unmasking, not from left-to-right decoding.

## Licence

The terms of the base model apply; see its own model card.
"""


def adapter_card(title: str, lora: LoRA, source: str | os.PathLike | None, training: Mapping[str, Any] | None) -> str:
    """Returns the model card of an exported adapter, as Markdown."""
    return f"""---
library_name: peft
tags:
- masked-diffusion
- gdsd-jax
---

# {title}

A low-rank adapter ({_lora_line(lora)}) for a masked diffusion language model, written by gdsd_jax.

Base model: {"not recorded" if source is None else Path(source).name}

## Training

{_facts(training)}
## Loading

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, path)
```

In gdsd_jax: `gdsd_jax.hub.load_adapter(path, config)`.

## Licence

The terms of the base model apply; see its own model card.
"""
