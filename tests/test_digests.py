import argparse
import gc
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlhf_ray.digests import derive_seed, digest, source_digest, tensor_digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_digest_is_a_function_of_the_content(value: object) -> None:
    assert digest(value) == digest(value) and len(digest(value)) == 64
    assert digest(value) != digest(value, None)


def test_digest_refuses_what_has_no_one_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        digest(object())


@given(st.lists(st.integers() | st.text()))
def test_seeds_fit_every_generator(parts: list[object]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_digests_hold_across_processes() -> None:
    code = "from rlhf_ray.digests import derive_seed; print(derive_seed(0, 'episode', 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed(0, "episode", 3)


def test_tensor_digest_sees_names_types_shapes_and_values() -> None:
    x = torch.arange(6.0)
    others = [
        {"y": x}, {"x": x.double()}, {"x": x.view(2, 3)}, {"x": x + 1}, {"x": x.bfloat16()}, {},
    ]  # fmt: skip
    assert len({tensor_digest(t) for t in ({"x": x}, *others)}) == 7
    image = torch.randn(2, 3, 4, 4)
    channels_last = image.to(memory_format=torch.channels_last)
    assert tensor_digest({"x": image}) == tensor_digest({"x": channels_last})
    assert tensor_digest({"a": x, "b": x}) == tensor_digest({"b": x, "a": x})


def test_source_of_library_code_is_its_name_of_users_its_text() -> None:
    def first(x: int) -> int:
        return x + 1

    kept = source_digest(first)

    def first(x: int) -> int:
        return x + 2

    assert source_digest(first) != kept
    assert source_digest(nn.Linear) == "torch.nn.modules.linear.Linear"
    assert source_digest(len) == source_digest(len)  # there is no source to read


def weighed(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: float) -> float:
        return x * self.factor

    def method(self, x: float) -> float:
        return x + self.factor


@dataclass(frozen=True, slots=True)
class Slotted:
    factor: float

    def __call__(self, x: float) -> float:
        return x * self.factor


class Named(NamedTuple):
    factor: float

    def __call__(self, x: float) -> float:
        return x * self.factor


def closed(factor: float) -> type:
    class Closed:
        def __call__(self, x: float) -> float:
            return x * factor

    return Closed


def dressed(factor: float) -> Callable[[float], float]:
    def own(x: float) -> float:
        return x

    @wraps(own)
    def inner(x: float) -> float:
        return factor * own(x)

    return inner


def without_source(factor: float) -> Callable[[float], float]:
    found: dict[str, Any] = {"__name__": "notebook"}
    exec(f"def loss(x): return {factor} * x", found)
    return found["loss"]


@pytest.mark.parametrize(
    "make",
    [
        Slotted,
        Named,
        lambda f: partial(map, Named(f)),
        closed,
        lambda f: closed(f)(),
        dressed,
        without_source,
        lambda f: Scaled(np.float32(f)),  # type: ignore[arg-type]
        lambda f: partial(F.cross_entropy, label_smoothing=f),
        lambda f: nn.CrossEntropyLoss(label_smoothing=f),
        lambda f: nn.CrossEntropyLoss(weight=torch.tensor([f, 1.0])),
        weighed,
        Scaled,
        lambda f: Scaled(f).method,
        lambda f: partial(weighed(1.0), f),
        lambda f: weighed(weighed(f)),  # type: ignore[arg-type]
        lambda f: Scaled([{"a": (f, None)}]),  # type: ignore[arg-type]
    ],
)
def test_what_a_callable_carries_counts(make: Callable[[float], Any]) -> None:
    assert source_digest(make(0.1)) == source_digest(make(0.1)) != source_digest(make(0.2))


USERS_CODE = """
import logging
import torch

WEIGHTS = [1.0, {weight}]
LOG = logging.getLogger(__name__)
calls = 0

class Base(torch.nn.Module):
    def forward(self, x):
        return scaled(x)

class Net(Base):
    pass

def scaled(x):
    return x * {factor}

def loss(outputs, targets):
    global calls
    calls += 1
    LOG.info("called")
    return ((outputs - scaled(targets)) * torch.tensor(WEIGHTS)).sum()
"""


def users_module(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: float) -> ModuleType:
    """A module of a user's, as if edited: one name, another file."""
    file = folder / f"{len(list(folder.iterdir()))}.py"
    file.write_text(USERS_CODE.format(**{"weight": 1.0, "factor": 2.0, **values}))
    spec = importlib.util.spec_from_file_location("users_code", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "users_code", module)
    spec.loader.exec_module(module)
    return module


def test_what_users_code_names_of_its_module_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(**values: float) -> tuple[str, str]:
        module = users_module(tmp_path, monkeypatch, **values)
        return source_digest(module.loss), source_digest(module.Net)

    loss, net = digests()
    assert digests() == (loss, net)
    assert digests(weight=50.0)[0] != loss and digests(weight=50.0)[1] == net
    other_loss, other_net = digests(factor=3.0)  # in a function that both call
    assert other_loss != loss and other_net != net


def test_lambdas_that_share_a_line_differ() -> None:
    one, other, again = lambda x: 1.0 * x, lambda x: 2.0 * x, lambda x: 1.0 * x
    assert source_digest(one) == source_digest(again) != source_digest(other)


def test_a_decorators_own_code_counts() -> None:
    def plain(x: float) -> float:
        return x

    @wraps(plain)
    def doubled(x: float) -> float:
        return 2 * plain(x)

    @wraps(plain)
    def tripled(x: float) -> float:
        return 3 * plain(x)

    assert len({source_digest(each) for each in (plain, doubled, tripled)}) == 3


def test_what_users_code_names_of_other_modules_of_theirs_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(**values: float) -> tuple[str, str]:
        helper = users_module(tmp_path, monkeypatch, **values)
        found: dict[str, Any] = {"__name__": "users_suite", "helper": helper}
        exec("def loss(o, y): return helper.loss(o, y)", found)
        exec("class Loss:\n  def __call__(self, o, y): return helper.loss(o, y)", found)
        return source_digest(found["loss"]), source_digest(found["Loss"]())

    before = digests()
    assert digests() == before
    for values in ({"weight": 50.0}, {"factor": 3.0}):
        assert all(a != b for a, b in zip(digests(**values), before, strict=True))


def test_a_functions_digest_does_not_keep_what_it_closes_over() -> None:
    held = torch.ones(3)
    alive = weakref.ref(held)
    source_digest(weighed(held))  # type: ignore[arg-type]
    del held
    gc.collect()
    assert alive() is None


def test_what_users_code_writes_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = users_module(tmp_path, monkeypatch)
    before = source_digest(module.loss)
    module.loss(torch.ones(2), torch.ones(2))
    assert module.calls == 1 and source_digest(module.loss) == before


def test_arrays_count_by_their_content() -> None:
    few, many = np.zeros((40, 40)), np.zeros((40, 40))
    many[20, 20] = 1.0  # where their text is cut
    assert source_digest(partial(max, few)) != source_digest(partial(max, many))


def test_what_refers_to_itself_has_a_digest() -> None:
    def recursive(n: int) -> int:
        return n and recursive(n - 1)

    scaled = Scaled(1.0)
    scaled.factor = scaled  # type: ignore[assignment]
    for thing in (recursive, scaled):
        assert source_digest(thing) == source_digest(thing)


def test_carried_values_hold_across_processes() -> None:
    code = (
        "import torch, functools; from rlhf_ray.digests import source_digest\n"
        "f = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)\n"
        "print(source_digest(f), source_digest(torch.nn.CrossEntropyLoss(label_smoothing=0.1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    function = partial(F.cross_entropy, label_smoothing=0.1)
    expected = [source_digest(function), source_digest(nn.CrossEntropyLoss(label_smoothing=0.1))]
    assert done.stdout.split() == expected


def test_source_may_be_asked_for_by_many_threads_at_once() -> None:
    # classes of one large module: to find each, Python parses the whole of it
    kinds = [kind for kind in vars(argparse).values() if isinstance(kind, type)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(source_digest, kinds * 4))
    assert found == [source_digest(kind) for kind in kinds] * 4
