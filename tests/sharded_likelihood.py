"""Log-probabilities of rollouts and their gradient on eight forced host devices, against those on one.

    python tests/sharded_likelihood.py

Prints the largest differences as JSON; that of the gradient is divided by the largest entry of the gradient.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from gdsd_jax.denoiser import DenoiserConfig, init_base, init_lora, logical_axes  # noqa: E402
from gdsd_jax.diffusion import SamplerConfig, sample, trajectory_log_prob  # noqa: E402
from gdsd_jax.runtime import sharding  # noqa: E402

CONFIG = DenoiserConfig(
    family="llada", vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=32,
    max_length=64, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False, tied_head=False, next_token_logits=False,
    mask_token_id=31, eos_token_id=0, pad_token_id=0, dtype="float32",
)  # fmt: skip
SAMPLER = SamplerConfig(8, 4, 4, "low_confidence", temperature=1.2, top_k=20)
ROWS = 8


def main() -> None:
    base = init_base(CONFIG, jax.random.key(0))
    base = base | {"embedding": 50 * base["embedding"], "head": 30 * base["head"]}
    lora = init_lora(CONFIG, jax.random.key(1), rank=4, alpha=8.0, targets=("q", "down"))
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    prompts, mask = np.tile(np.arange(4, dtype=np.int32), (ROWS, 1)), np.ones((ROWS, 4), bool)
    rollout = sample(CONFIG, base, lora, prompts, mask, jax.random.key(2), SAMPLER)

    def value(lora, base, rollout, mask):
        found = trajectory_log_prob(CONFIG, base, lora, rollout, mask, SAMPLER, chunk=8)
        return jnp.sum(jnp.sin(found)), found

    gradient = jax.jit(jax.grad(value, has_aux=True))
    whole, found = jax.device_get(gradient(lora, base, rollout, mask))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    by_rows = lambda x: jax.device_put(x, sharding.named_sharding(mesh, ("rows", "tokens"), x.shape))  # noqa: E731
    axes = lora.replace(weights=logical_axes(CONFIG, lora))
    put = lambda tree, axes: jax.tree.map(jax.device_put, tree, sharding.shardings(mesh, axes, tree))  # noqa: E731
    placed = lora.replace(weights=put(lora.weights, axes.weights)), put(base, logical_axes(CONFIG))
    with jax.set_mesh(mesh):
        arrays = jax.tree.map(by_rows, jax.device_get((rollout, mask)))
        cut, again = jax.device_get(gradient(*placed, *arrays))
    furthest = lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y))))  # noqa: E731
    differences = jax.tree.leaves(jax.tree.map(furthest, whole.weights, cut.weights))
    largest = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(whole.weights))
    result = {"log_prob": furthest(found, again), "gradient": max(differences) / largest, "largest_gradient": largest}
    print(json.dumps(result | {"devices": jax.device_count(), "finite": bool(np.isfinite(found).all())}))


if __name__ == "__main__":
    main()
