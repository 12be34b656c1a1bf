"""Checks that the workers of a pod see all its chips; it waits for all workers, so each of them must run it.

python launch/check_devices.py CHIPS
"""

import sys

import jax

if __name__ == "__main__":
    jax.distributed.initialize()
    found, wanted = jax.device_count(), int(sys.argv[1])
    print(f"process {jax.process_index()} of {jax.process_count()}: {found} devices")
    if found != wanted:
        sys.exit(f"{found} devices where {wanted} are expected: is every worker of the pod set up?")
