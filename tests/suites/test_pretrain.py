"""Pretraining: once, the same every time, and never from a damaged file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rlhf_ray.suites.pretrain as pretrain
from rlhf_ray.errors import InputError
from rlhf_ray.suites.images import Images


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    torch.set_num_threads(1)
    monkeypatch.setitem(pretrain.RECIPES, "digits", pretrain.Recipe(epochs=2, batch_size=32))
    rng = torch.Generator().manual_seed(0)
    return torch.rand((64, 1, 28, 28), generator=rng), torch.randint(10, (64,), generator=rng)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def lines_of(images: Images, store: Path | None, seed: int = 0) -> tuple[Tensor, list[str]]:
    lines: list[str] = []
    model = pretrain.pretrained_cnn(
        "digits", images, seed=seed, storage_path=store, progress=lines.append
    )
    assert not model.training
    return weights(model), lines


def test_pretraining_is_deterministic_and_leaves_global_state(images: Images) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, lines = lines_of(images, None)
    torch.manual_seed(5)
    torch.rand(3)
    second, _ = lines_of(images, None)
    assert torch.equal(first, second)
    assert lines[-1].startswith("pretraining digits: epoch 2/2, accuracy 0.")
    assert not torch.equal(first, lines_of(images, None, seed=1)[0])
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)


def test_pretraining_does_not_touch_the_global_generator(images: Images) -> None:
    state = torch.get_rng_state()
    lines_of(images, None)
    assert torch.equal(state, torch.get_rng_state())


def test_pretrained_weights_are_read_the_second_time(images: Images, tmp_path: Path) -> None:
    first, lines = lines_of(images, tmp_path)
    second, none = lines_of(images, tmp_path)
    assert lines and not none
    assert torch.equal(first, second)
    assert [path.suffix for path in (tmp_path / "pretrained").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "altered", "header", "another model"])
def test_damaged_file_is_made_anew(images: Images, tmp_path: Path, damage: str) -> None:
    first, _ = lines_of(images, tmp_path)
    (path,) = (tmp_path / "pretrained").iterdir()
    whole = path.read_bytes()
    if damage == "another model":
        path.write_bytes(pretrain._packed(nn.Linear(2, 2)))
    else:
        path.write_bytes(
            {
                "cut": whole[:-100],
                "emptied": b"",
                "altered": whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:],
                "header": whole[:20] + b"\xff" + whole[21:],
            }[damage]
        )
    again, lines = lines_of(images, tmp_path)
    assert lines
    assert torch.equal(first, again)
    assert path.read_bytes() == whole


def test_other_data_and_seeds_are_kept_apart(images: Images, tmp_path: Path) -> None:
    lines_of(images, tmp_path)
    lines_of((images[0] / 2, images[1]), tmp_path)
    lines_of(images, tmp_path, seed=1)
    assert len(list((tmp_path / "pretrained").iterdir())) == 3


def test_storage_path_that_is_a_file_is_refused(images: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Give another storage path"):
        lines_of(images, tmp_path / "file")
