"""Memory that is used again."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from excise.recipes.common.memory import keep_freed_memory
if {keep} and not keep_freed_memory():
    print("cannot")
    raise SystemExit
tensor = lambda megabytes={megabytes}: torch.zeros(megabytes << 18)
for megabytes in range(4, 64, 4):
    tensor(megabytes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    tensor()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(keep, megabytes):
    script = FAULTS.format(keep=keep, megabytes=megabytes)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    if said == "cannot":
        pytest.skip("this C library cannot be told")
    return int(said)


def test_a_freed_tensors_pages_serve_the_next_one_up_to_a_size():
    # Ten tensors of 40 MB have 102,400 pages of 4 KB, or 200 of 2 MB.
    kept, returned, larger = _faults(True, 40), _faults(False, 40), _faults(True, 80)
    assert kept < 100 < returned and larger > 100
