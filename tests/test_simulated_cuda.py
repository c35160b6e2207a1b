"""The simulated device refuses what a GPU refuses; otherwise tests on it would say nothing."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from simulated_cuda import Device, simulated_cuda
from torch import nn

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def device() -> Iterator[Device]:
    with simulated_cuda() as device:
        yield device


def test_modules_and_gradients_stay_where_they_were_put(device: Device) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 1, 5, 5)
    model(x)
    model.to("cuda")
    F.cross_entropy(model(x.cuda()), torch.arange(4, device="cuda") % 3).backward()
    for parameter in model.parameters():
        assert parameter.device == CUDA and parameter.is_cuda and parameter.grad is not None
        assert parameter.grad.device == CUDA
    assert model.cpu()(x).device.type == "cpu"
    assert device.n_transfers > 0


def test_memory_is_counted_while_it_is_held(device: Device) -> None:
    before = torch.cuda.memory_allocated()
    value = torch.zeros(100, device="cuda")
    assert torch.cuda.memory_allocated() == before + 400
    del value
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    "mixes",
    [
        lambda here, there: here + there,
        lambda here, there: F.linear(here, there),
        lambda here, there: there.index_select(0, torch.arange(2)),
        lambda here, there: torch.cat([here, there]),
    ],
    ids=["add", "linear", "index_select", "cat"],
)
def test_tensors_of_two_devices_do_not_mix(mixes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixes(torch.randn(3, 3), torch.randn(3, 3, device="cuda"))


def test_a_number_and_an_index_of_the_cpu_go_with_everything() -> None:
    there = torch.arange(6.0, device="cuda")
    assert (there * torch.tensor(2.0)).device == CUDA
    assert there[torch.tensor([1, 2])].tolist() == [1.0, 2.0]
    assert there[torch.tensor([1, 2])].device == CUDA


def test_numpy_wants_the_cpu() -> None:
    with pytest.raises(TypeError, match="can't convert a cuda:0 tensor to numpy"):
        torch.zeros(2, device="cuda").numpy()
    assert torch.zeros(2, device="cuda").cpu().numpy().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "waits",
    [torch.Tensor.cpu, torch.Tensor.item, torch.nonzero, lambda value: value[value > 0]],
    ids=["cpu", "item", "nonzero", "mask"],
)
def test_waits_can_be_forbidden(waits) -> None:  # type: ignore[no-untyped-def]
    value = torch.ones(1, device="cuda")
    waits(value)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        waits(value)


def test_gradients_do_not_pass_recurrent_layers_in_eval_mode() -> None:
    layer, x = nn.LSTM(3, 2).to("cuda").eval(), torch.randn(4, 1, 3, device="cuda")
    with torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="can only be called in training mode"):
        layer(x)
    layer.train()(x)[0].sum().backward()


def test_a_graph_does_again_what_was_met_and_its_capture_nothing() -> None:
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    batch, buffer = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ((weight - batch) ** 2).sum()
        loss.backward()
        with torch.no_grad():
            assert weight.grad is not None
            weight.sub_(weight.grad, alpha=0.25)
            buffer.add_(1)
    assert weight.tolist() == [0.0, 0.0, 0.0] and buffer.item() == 0
    graph.replay()
    assert weight.tolist() == [0.5, 0.5, 0.5] and loss.item() == 3.0
    batch.copy_(torch.full((3,), 2.0, device="cuda"))
    graph.replay()
    assert weight.tolist() == [1.25, 1.25, 1.25] and buffer.item() == 2


def test_a_capture_cannot_wait() -> None:
    value = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        value.sum().item()
