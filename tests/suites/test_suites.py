"""The registry: names, users' own suites, data that is not there, mnist-seed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rlhf_ray.suites.images as images
from rlhf_ray.config import SearchConfig, check_observation, with_defaults
from rlhf_ray.digests import digest, tensor_digest
from rlhf_ray.errors import InputError
from rlhf_ray.levels import split_levels
from rlhf_ray.suites import SUITES, load_suite, suite_defaults
from rlhf_ray.suites.pretrain import make_cnn
from rlhf_ray.suites.seed import DEFAULTS, pooled_first
from rlhf_ray.tasks import SPLITS, Suite

OWN = """
import torch
from rlhf_ray.tasks import Suite, Task

x, y = torch.rand(8, 3), torch.tensor([0, 1] * 4)

def task(name):
    return Task(name=name, train=(x, y), val=(x, y), test=(x, y))

def shifts():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    return Suite(name="own", model=net, levels={"a": ["0"], "b": ["1"]},
                 train_tasks=[task("t")], val_tasks=[task("v")], test_tasks=[task("w")])

def raises():
    raise KeyError("sensor 7")

def leaves():
    raise SystemExit(3)

def wrong_type():
    return 3

def empty():
    return Suite(name="own", model=torch.nn.Linear(3, 2), levels={"a": [""]},
                 train_tasks=[], val_tasks=[], test_tasks=[])
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Path:
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    root = images.resolve_data_root(None)
    root = root if (root / "MNIST").exists() else beside
    if not (root / "MNIST").exists():
        pytest.skip("needs MNIST: set RLHF_RAY_DATA")
    return root


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_suites.py").write_text(OWN)
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("own_suites", "needs_more", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_suites"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def digits(store: Path) -> Suite:
    return load_suite("digits", storage_path=store, n_train_tasks=10)


def test_digits_has_the_tasks_asked_for(digits: Suite) -> None:
    assert [len(getattr(digits, f"{role}_tasks")) for role in SPLITS] == [10, 6, 8]
    assert isinstance(digits.source, torch.Tensor)
    assert digits.source.shape == (256, 1, 28, 28)
    assert split_levels(digits.model, digits.levels).unassigned == ()


def test_digits_knows_clean_images(digits: Suite) -> None:
    x, y = images.digits_pools(seed=0).test
    with torch.no_grad():
        assert (digits.model(x).argmax(1) == y).float().mean() > 0.94


def test_four_levels_split_the_same_model(digits: Suite, store: Path) -> None:
    four = load_suite(
        "digits-4", storage_path=store, n_train_tasks=1, n_val_tasks=1, n_test_tasks=1
    )
    assert list(four.levels) == ["conv1", "conv2", "dense", "head"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(four.model.parameters(), digits.model.parameters(), strict=True)
    )
    assert four.test_tasks[0].digest == digits.test_tasks[0].digest


def digests_of(suite: Suite) -> list[str]:
    return [tensor_digest(suite.model.state_dict()), *(task.digest for task in suite.tasks())]


def test_the_suite_is_the_one_of_the_tables(digits: Suite) -> None:
    """Other weights or tasks want the tables in `experiments` and the README made again."""
    known = "afa65dc0203fb723"
    assert digest(digests_of(digits))[:16] == known


def test_a_suite_is_the_same_on_every_processor(digits: Suite) -> None:
    """On this one with none of its vector instructions: no fused multiply-add, other sums."""
    script = (
        "import torch; from tests.suites.test_suites import digests_of, load_suite\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
        "print(*digests_of(load_suite('digits', n_train_tasks=10)))"
    )
    plain = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
             "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    capability, digests = run.stdout.splitlines()
    assert capability in ("DEFAULT", "NO AVX")
    assert digests.split() == digests_of(digits)


@pytest.mark.parametrize(("name", "near"), [("digit", "digits"), ("fashion", "fashion-mnist")])
def test_unknown_suite_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"suite='{name}'. Did you mean '{near}'"):
        load_suite(name)


@pytest.mark.parametrize(
    ("number", "match"),
    [
        ({"n_val_tasks": 0}, "n_val_tasks must be at least 1, got n_val_tasks=0"),
        ({"n_train_tasks": 2.5}, "n_train_tasks must be a whole number, got n_train_tasks=2.5"),
        ({"seed": -1}, "seed must be at least 0, got seed=-1"),
        ({"fold": 3}, "fold=3"),
    ],
)
def test_numbers_out_of_range_are_refused(number: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_suite("digits", **number)


def test_defaults_are_known_before_a_suite_is_loaded(digits: Suite) -> None:
    assert suite_defaults("digits") == digits.defaults == {}
    assert set(suite_defaults("mnist-4") or ()) == {"learning_rates"}
    assert (suite_defaults("mnist-seed") or {})["algorithm"] == "q-learning"
    assert suite_defaults("package.module:function") is None


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist-4", "mnist-seed"])
def test_missing_data_is_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    from torchvision import datasets

    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="Give --data-root or set RLHF_RAY_DATA") as caught:
        load_suite(name, data_root=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert "\n" not in str(caught.value)


def test_data_root_comes_from_argument_environment_or_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RLHF_RAY_DATA", raising=False)
    assert images.resolve_data_root(None) == Path("data")
    monkeypatch.setenv("RLHF_RAY_DATA", "elsewhere")
    assert images.resolve_data_root(None) == Path("elsewhere")
    assert images.resolve_data_root("given") == Path("given")


def test_own_suite_is_found_in_the_current_folder(own_module: str) -> None:
    assert load_suite(f"{own_module}:shifts").name == "own"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no_such_module:shifts", "no module 'no_such_module'"),
        ("own_suites.inner:shifts", "no module 'own_suites.inner'"),
        ("needs_more:shifts", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("broken:shifts", "'broken' must be importable, got ZeroDivisionError"),
        ("own_suites:shift", "Did you mean 'shifts'"),
        ("own_suites:raises", r"must return a suite, got KeyError: 'sensor 7' \(own_suites.py, li"),
        ("own_suites:leaves", "must return a suite, got SystemExit: 3"),
        ("own_suites:wrong_type", "got a int from 'own_suites:wrong_type'"),
        ("own_suites:empty", "must have train tasks"),
        (":shifts", "package.module:function"),
        ("own_suites:", "package.module:function"),
        ("own_suites.py:shifts", "Write own_suites:shifts"),
        ("own_suites", "Write own_suites:FUNCTION"),
        ("./own_suites.py", "Write own_suites:FUNCTION"),
        ("./own_suites.py:shifts", "Write own_suites:shifts"),
    ],
)
def test_own_suite_that_cannot_be_had_says_why(own_module: str, name: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_suite(name)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist-4"])
def test_torchvision_pools_have_their_sizes(name: str, data_root: Path) -> None:
    pools = images.SOURCES[name.removesuffix("-4")](data_root=data_root)
    sizes = [len(getattr(pools, pool)[1]) for pool in ("pretrain", "train", "val", "test")]
    assert sizes == [10_000, 10_000, 5_000, 10_000]
    assert pools.train[0].dtype == torch.float32
    assert pools.train[0].min() >= 0 and pools.train[0].max() <= 1


def test_mnist_suite_loads(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_ray.suites.pretrain as pretrain

    short = pretrain.Recipe(epochs=1, batch_size=256)
    monkeypatch.setitem(pretrain.RECIPES, "mnist", short)
    suite = load_suite("mnist", data_root=data_root, n_train_tasks=8)
    assert [len(task.test[1]) for task in (suite.train_tasks[0], suite.test_tasks[0])] == [
        256,
        1000,
    ]


def test_mnist_seed_is_literal(data_root: Path) -> None:
    suite = load_suite("mnist-seed", data_root=data_root)
    tasks = list(suite.tasks())
    assert len(suite.train_tasks) == 10
    assert len({id(task.train[0]) for task in tasks}) == 1
    assert len({task.digest for task in tasks}) == 1
    assert tasks[0].val is tasks[0].test
    assert len({task.name for task in tasks}) == 30
    known = {task.known_as for task in suite.train_tasks}  # a table judges what it learned on
    assert {task.known_as for task in tasks} == known and len(known) == 10
    assert [len(tasks[0].split(split)[1]) for split in SPLITS] == [60_000, 10_000, 10_000]
    again = load_suite("mnist-seed", data_root=data_root)
    head, same = suite.model.get_submodule("head"), again.model.get_submodule("head")
    assert isinstance(head, nn.Linear) and torch.equal(head.weight, same.get_parameter("weight"))


def test_mnist_seed_pools_before_it_rectifies_without_a_difference() -> None:
    plain, pooled = make_cnn(0), pooled_first(make_cnn(0))
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 0.5
    outputs = [model(x) for model in (plain, pooled)]
    for output in outputs:
        output.logsumexp(1).sum().backward()
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for ours, theirs in zip(pooled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_mnist_seed_defaults_are_settings_of_a_search() -> None:
    config = with_defaults(SearchConfig(), DEFAULTS)
    assert (config.steps, config.batch_size, config.horizon) == (None, 32, 10)
    assert config.switch_cost_weight == (1.0,)
    assert (config.algorithm, config.alpha) == ("q-learning", 0.1)
    assert [operation.name for operation in config.operations()] == ["train_mid", "stop"]
    check_observation(config)


def test_every_suite_has_a_line_of_description() -> None:
    assert set(SUITES) >= {*images.SOURCES, "digits-4", "mnist-4", "fashion-mnist-4", "mnist-seed"}
    assert all(SUITES.values())
