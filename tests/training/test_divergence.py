"""The batch on which training diverged is saved in a form that others can read."""

import jax.numpy as jnp
import numpy as np

from gdsd_jax.diffusion import SamplerConfig
from gdsd_jax.hub.tokenizer import Tokenizer
from gdsd_jax.methods import Batch
from gdsd_jax.training.divergence import diverged
from gdsd_jax.training.rollout import Rewarded


def test_a_diverged_batch_is_saved_as_plain_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "__init__", lambda self: None)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, completions: [str(row[0]) for row in completions])
    batch = Batch(
        tokens=jnp.arange(10).reshape(2, 5), prompt_mask=None, completion_mask=jnp.ones((2, 3)),
        rewards=jnp.array([1.0, 3e38]), component_weights=(("right", 1.0),), group_size=2,
        sampler=SamplerConfig(3, 3, 3, "low_confidence"),
    )  # fmt: skip
    components = {"right": np.array([1.0, np.nan], np.float32)}
    rewarded = Rewarded(batch, np.arange(6).reshape(2, 3), np.array([1, 0], np.float32), components, {})
    error = diverged(tmp_path, 3, rewarded, Tokenizer(), None)
    assert "there is no checkpoint yet" in str(error) and str(tmp_path / "diverged" / "3.npz") in str(error)
    # Loading refuses pickled objects, as the static fields of a batch would be.
    with np.load(tmp_path / "diverged" / "3.npz", allow_pickle=False) as saved:
        assert set(saved) == {"tokens", "completion_mask", "rewards"}
        for name in saved:
            np.testing.assert_array_equal(saved[name], getattr(batch, name))
