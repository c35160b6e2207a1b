import json
import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated_cuda import cuda_device

from rlhf_ray.engine.allocation import in_own_block, to_keep

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


def channels_last(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(600, 500),
        torch.randn(500, 600).t(),
        channels_last(64, 16, 20, 20),
        channels_last(700, 1, 20, 20).as_strided((700, 1, 20, 20), (400, 1, 20, 1)),
        torch.randn(600, 1).expand(600, 500),
        torch.rand(1200, 1000) < 0.5,
        torch.randint(9, (400, 400)),
    ],
    ids=lambda tensor: f"{tuple(tensor.stride())}",
)
def test_a_block_of_its_own_holds_the_same_in_the_same_order(tensor):
    own = in_own_block(tensor)
    assert own.data_ptr() % mmap.PAGESIZE == 0
    assert own.data_ptr() != tensor.data_ptr()
    assert torch.equal(own, tensor)
    assert own.dtype == tensor.dtype
    if 0 not in tensor.stride():
        assert own.stride() == tensor.stride()


def test_small_tensors_stay_where_they_are():
    small = torch.randn(1000)
    assert in_own_block(small) is small
    last = torch.randn(8, 100, 4)[:, -1]  # of a recurrent layer, say: it would keep all steps
    own = in_own_block(last)
    assert torch.equal(own, last) and own.untyped_storage().nbytes() == 8 * 4 * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_block_of_its_own_goes_back_when_it_is_dropped():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    own = in_own_block(torch.ones(32 << 20, dtype=torch.uint8))
    before = resident()
    del own
    assert before - resident() > 30 << 20


def test_what_leaves_a_gpu_is_the_same_each_with_memory_of_its_own():
    values = {
        "large": torch.randn(300, 70),
        "conv": channels_last(8, 4, 3, 3),
        "count": torch.tensor(3),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.empty(0, 4),
        "part": torch.randn(6, 6)[:, 2],
    }
    with cuda_device():
        kept = to_keep({name: value.to("cuda") for name, value in values.items()})
    assert list(kept) == list(values)
    assert len({value.untyped_storage().data_ptr() for value in kept.values()}) == len(values)
    for name, value in kept.items():
        assert value.device.type == "cpu" and value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        torch.testing.assert_close(value, values[name], rtol=0, atol=0)
