"""Our adapter directory in the hands of PEFT itself, on PyTorch modules named like those of each family."""

import dataclasses

import jax
import numpy as np
import pytest

from gdsd_jax import hub
from gdsd_jax.denoiser import TARGETS, DenoiserConfig, init_base, init_lora
from gdsd_jax.families import FAMILIES
from gdsd_jax.hub import names
from gdsd_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow


def make_config(family):
    quirks = {"qkv_bias": False, "next_token_logits": False} | FAMILIES[family].quirks
    return DenoiserConfig(
        family=family, vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24,
        max_length=32, rope_theta=1e4, rms_norm_eps=1e-5, tied_head=False, mask_token_id=3, eos_token_id=1,
        pad_token_id=0, **quirks,
    )  # fmt: skip


def torch_model(config, base):
    """Nested modules under the stored names, with the weights of `base`; every matrix but the embedding is a Linear."""
    import torch

    class Config(dict):
        model_type = config.family

        def to_dict(self):
            return dict(self)

    root = torch.nn.Module()
    root.config = Config(model_type=config.family)
    if FAMILIES[config.family].task_type == "CAUSAL_LM":
        # PEFT wraps causal language models through this method, which not every family's class has.
        root.prepare_inputs_for_generation = lambda *args, **kwargs: kwargs
    slots = names.slots(config)
    for name, slot in slots.items():
        path, _, kind = name.rpartition(".")
        held = names.at(base, slot.path)
        held = np.asarray(held if slot.layer is None else held[slot.layer])
        weight = torch.tensor(held)
        if kind == "bias":
            root.get_submodule(path).bias.data = weight
            continue
        if len(slot.shape) == 1:
            module = torch.nn.RMSNorm(slot.shape[0])
        elif slot.path == ("embedding",):
            module = torch.nn.Embedding(*slot.shape)
        else:
            module = torch.nn.Linear(slot.shape[1], slot.shape[0], bias=f"{path}.bias" in slots)
        module.weight.data = weight
        parent = root
        *parts, leaf = path.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, module)
    return root


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("targets", [("q", "v", "gate"), ("down",), TARGETS])
def test_peft_loads_our_adapter_into_the_blocks_alone(family, targets, tmp_path):
    import peft
    import torch

    config = make_config(family)
    base = init_base(config, jax.random.key(0))
    lora = init_lora(config, jax.random.key(1), rank=3, alpha=12.0, targets=targets)
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), lora)
    hub.export_adapter(tmp_path / "adapter", config, lora, source="some/base")

    plain = torch_model(config, base)
    wrapped = peft.PeftModel.from_pretrained(torch_model(config, base), str(tmp_path / "adapter")).eval()
    again = wrapped.load_adapter(str(tmp_path / "adapter"), adapter_name="again")
    assert not again.unexpected_keys
    assert not [key for key in again.missing_keys if "lora_" in key and ".again." in key]

    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in wrapped.named_modules() if name.endswith("A.default")
    }
    expected = {names.module(config, t, n) for t in targets for n in range(config.num_layers)}
    assert adapted == {f"base_model.model.{name}" for name in expected}

    rng = np.random.default_rng(0)
    for target in targets:
        factors = lora.weights["layers"][target]
        for layer in range(config.num_layers):
            name = names.module(config, target, layer)
            a, b = np.asarray(factors["a"][layer]), np.asarray(factors["b"][layer])
            x = rng.standard_normal((5, a.shape[0]), np.float32)
            with torch.no_grad():
                difference = wrapped.get_submodule(f"base_model.model.{name}")(torch.tensor(x))
                difference -= plain.get_submodule(name)(torch.tensor(x))
            np.testing.assert_allclose(difference.numpy(), 4.0 * x @ a @ b, rtol=1e-4, atol=1e-3)


def test_we_load_what_peft_saves(tmp_path):
    import peft
    import torch

    config = make_config("llada")
    targets = ("q", "up", "down")
    settings = peft.LoraConfig(
        r=2, lora_alpha=8, lora_dropout=0.1, target_modules=names.target_modules(config, targets), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_model(config, init_base(config, jax.random.key(0))), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    lora = hub.load_adapter(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (2, 8.0, 0.1, targets)
    for target in targets:
        module = model.get_submodule(f"base_model.model.{names.module(config, target, 1)}")
        for factor, linear in (("a", module.lora_A.default), ("b", module.lora_B.default)):
            np.testing.assert_array_equal(lora.weights["layers"][target][factor][1], linear.weight.detach().numpy().T)
    with pytest.raises(UserError, match="lacks tensor"):
        hub.load_adapter(tmp_path / "adapter", dataclasses.replace(config, num_layers=3))
