import json
import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, json, resource
from rlhf_ray.engine.allocation import keep_freed_memory

def faults(n_bytes=4 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        for block in [bytearray(n_bytes) for _ in range(4)]:
            block[::4096] = bytes(n_bytes // 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
taken = keep_freed_memory()
faults()
print(json.dumps([plain, taken, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_memory_is_not_paged_in_again():
    # in a process of its own: the settings stay
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    plain, taken, kept = json.loads(done.stdout)
    assert taken
    assert kept < plain / 20
