# shellcheck shell=bash
# The environment of every command on a TPU worker, sourced from the root of the checkout by run_all.sh and the container.

[[ ! -d .venv-tpu ]] || export PATH="$PWD/.venv-tpu/bin:$PATH"

# Programs of real size compile for minutes, and a restart after a preemption would compile them again. A gs:// path
# survives the VM.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/gdsd_jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1

# Gives fused kernels more on-chip memory, and gathers weights while the previous layer computes.
tpu_flags=(
  --xla_tpu_scoped_vmem_limit_kib=98304
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
export LIBTPU_INIT_ARGS="${tpu_flags[*]} ${LIBTPU_INIT_ARGS:-}"
