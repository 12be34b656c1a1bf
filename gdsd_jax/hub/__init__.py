"""Reads and writes Hugging Face directories: configurations, parameters, adapters and tokenizers."""

import os

from gdsd_jax.hub.adapt import adapt, family_for
from gdsd_jax.hub.declared import read_config
from gdsd_jax.hub.files import Reader
from gdsd_jax.hub.load import another_base, fingerprint, load_adapter, load_checkpoint
from gdsd_jax.hub.published import architecture
from gdsd_jax.hub.save import export_adapter, export_checkpoint
from gdsd_jax.hub.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Reader",
    "Tokenizer",
    "adapt",
    "another_base",
    "architecture",
    "export_adapter",
    "export_checkpoint",
    "family_for",
    "fingerprint",
    "load_adapter",
    "load_checkpoint",
    "load_tokenizer",
    "read_config",
]

# transformers is imported where a tokenizer is read or made, and reads this variable then. Without it, transformers
# would report that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
