"""Values of `config.json` that no model can have are refused when it is read, before anything is computed with them.

In a process of its own: in this one, annotations are checked at every call, which would refuse wrong types in any case.
"""

import json
import subprocess
import sys

SCRIPT = """
import json, math, sys
from gdsd_jax import families
from gdsd_jax.runtime.errors import UserError

content = json.load(open(sys.argv[1]))
odd = (None, "a", [], {}, -1, 0, 1.5, math.nan, math.inf, 2**70, True)
accepted = {}
for key in sys.argv[2:]:
    assert families.read_config(content) and key in content
    accepted[key] = []
    for value in odd:
        try:
            families.read_config(content | {key: value})
        except UserError as error:
            assert str(error) and "\\n" not in str(error)
        else:
            accepted[key].append(value)
print(json.dumps(accepted))
"""
SIZES = ("n_layers", "n_heads", "d_model", "max_sequence_length")
RATES, TOKENS = ("rope_theta", "rms_norm_eps"), ("mask_token_id", "eos_token_id")


def test_odd_values_are_refused_in_one_line(golden):
    command = [sys.executable, "-c", SCRIPT, golden / "llada_tiny" / "config.json", *SIZES, *RATES, *TOKENS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accepted = json.loads(done.stdout)
    assert all(accepted[key] == [] for key in SIZES)
    assert all(accepted[key] == [1.5, 2**70, True] for key in RATES)
    assert all(accepted[key] == [0] for key in TOKENS)
