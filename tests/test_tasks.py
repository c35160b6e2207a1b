import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.errors import InputError
from rlhf_ray.tasks import (
    SPLITS,
    Metric,
    Suite,
    Task,
    accuracy,
    input_tensors,
    loss_on,
    map_inputs,
    n_examples,
)

X, Y = torch.zeros(8, 4), torch.arange(8) % 3


def task(name: str = "a", **changes: object) -> Task:
    return Task(name=name, **{"train": (X, Y), "val": (X, Y), "test": (X, Y), **changes})  # type: ignore[arg-type]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))


def suite(**changes: object) -> Suite:
    settings = {
        "name": "s", "model": model(), "levels": {"low": ["0"], "head": ["2"]},
        "train_tasks": [task("a")], "val_tasks": [task("b")], "test_tasks": [task("c")],
    }  # fmt: skip
    return Suite(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": ""}, "name must be a non-empty string"),
        ({"train": X}, r"'a', train: data must be a pair \(x, y\).*got a Tensor"),
        ({"train": (X, Y, Y)}, "got a tuple of 3"),
        ({"val": (X, Y.tolist())}, "'a', val: data must be a pair.* tuple of 2 whose y is a list"),
        ({"val": (X, Y.numpy())}, "with a tensor y, got a tuple of 2 whose y is a ndarray"),
        ({"val": ([1.0], Y)}, "x must be a tensor, tuple or dict of tensors, got a list"),
        ({"val": ({}, Y)}, "x must be a tensor, tuple or dict"),
        ({"val": ((X, 3), Y)}, "x/1 must be a tensor with a batch dimension, got a int"),
        ({"test": (torch.tensor(1.0), Y)}, "test: x must be a tensor with a batch dimension"),
        ({"test": (X[:0], Y[:0])}, "data must not be empty, got x of shape"),
        ({"test": (X[:5], Y)}, "as many examples, got x with 5 and y with 8"),
        ({"test": ({"a": X, "b": X[:2]}, Y)}, "got x/b with 2"),
        ({"train": (X.index_fill(0, torch.tensor([1]), torch.nan), Y)}, "finite, got NaN or inf"),
        ({"train": (X, Y.float().div(0))}, "finite, got NaN or infinity in y"),
    ],
)
def test_bad_data_names_task_split_and_tensor(change: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        task(**{"name": "a", **change})  # type: ignore[arg-type]


def test_digest_is_of_the_content() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * 2

    same = task("another name", train=(X.clone(), Y.clone()))
    assert same.digest == task("a").digest
    others = [
        task(train=(X + 1, Y)),
        task(test=(X, Y.flip(0))),
        task(train=({"x": X}, Y), val=({"x": X}, Y)).digest and task(val=(X.double(), Y)),
        task(loss=loss),
        task(metric=Metric(name="loss", function=F.cross_entropy, higher_is_better=False)),
    ]
    assert len({task("a").digest, *(other.digest for other in others)}) == 6


def test_a_metric_has_a_name_of_its_own() -> None:
    def cost(outputs: Tensor, y: Tensor) -> float:
        return float((outputs.argmax(1) != y).float().mean())

    with pytest.raises(InputError, match=r"another figure of reports .*, got name='cost'\. Give"):
        task(metric=cost)


def test_plain_function_counts_as_a_metric_of_which_more_is_better() -> None:
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.max()

    metric = task(metric=margin).metric
    assert isinstance(metric, Metric) and (metric.name, metric.higher_is_better) == ("margin", True)


def test_the_tensors_of_a_loss_go_where_the_outputs_are_and_the_loss_stays_as_it_is() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    moved = loss_on(torch.device("meta"), task(loss=weighted))
    assert isinstance(moved, nn.CrossEntropyLoss) and moved.weight is not None
    assert moved.weight.device.type == "meta"
    assert weighted.weight is not None and weighted.weight.device.type == "cpu"
    assert loss_on(torch.device("meta"), task()) is F.cross_entropy
    given = functools.partial(F.cross_entropy, weight=torch.ones(3), reduction="mean")
    moved = loss_on(torch.device("meta"), task(loss=given))
    assert isinstance(moved, functools.partial) and moved.keywords["reduction"] == "mean"
    assert moved.keywords["weight"].device.type == "meta"
    assert given.keywords["weight"].device.type == "cpu"


def test_accuracy_of_classes_and_of_pixels() -> None:
    outputs = torch.eye(3)
    assert accuracy.function(outputs, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    pixels = torch.zeros(1, 2, 2, 2)
    pixels[:, 1, 0] = 1.0
    assert accuracy.function(pixels, torch.tensor([[[1, 1], [1, 1]]])) == 0.5


@pytest.mark.parametrize("inputs", [X, (X, X + 1), {"a": X, "b": X + 1}])
def test_inputs_keep_their_form(inputs: object) -> None:
    doubled = map_inputs(lambda value: value + 2, inputs)  # type: ignore[arg-type]
    assert type(doubled) is type(inputs) and n_examples(doubled) == 8
    pairs = zip(input_tensors(doubled).values(), input_tensors(inputs).values(), strict=True)  # type: ignore[arg-type]
    assert all(torch.equal(a, b + 2) for a, b in pairs)


def undirected(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).float().mean()


def undefined(outputs: Tensor, targets: Tensor) -> float:
    return math.nan


def infinite(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) / 0


def rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "../up"}, "usable as a folder's, got name='../up'"),
        ({"name": ".."}, "usable as a folder's"),
        ({"name": ""}, "usable as a folder's"),
        ({"name": 3}, "usable as a folder's, got name=3"),
        ({"model": model}, "model must be a torch.nn.Module, got a function"),
        ({"train_tasks": task("a")}, "train_tasks must be a list of .*Task, got a Task. Put it in"),
        ({"test_tasks": None}, "test_tasks must be a list of rlhf_ray.Task, got a NoneType"),
        ({"train_tasks": []}, "must have train tasks, got none"),
        ({"val_tasks": [task("a")]}, "task names must be unique, got 'a' twice"),
        ({"val_tasks": ["b"]}, "val_tasks must hold rlhf_ray.Task, got a str"),
        ({"levels": {"low": ["0"], "head": ["3"]}}, "module of level 'head'"),
        ({"test_tasks": [task("c", test=(X, Y + 7))]}, r"'c', test: labels must lie in \[0, 2\]"),
        ({"test_tasks": [task("c", train=(X, Y - 1))]}, "got labels from -1 to 1"),
        (
            {"test_tasks": [task("c", train=(X, Y + 1), loss=nn.CrossEntropyLoss())]},
            "got labels from 1 to 3",
        ),
        ({"test_tasks": [task("c", train=(X, 0 * Y - 100))]}, "there must be labels, got -100"),
        ({"test_tasks": [task("c", val=(X, Y.int()))]}, "labels must be int64, got torch.int32"),
        ({"test_tasks": [task("c", train=(X[:, :3], Y))]}, "'c': model and loss must take its"),
        ({"val_tasks": [task("c", test=(X[:, :3], Y))]}, "must take its data on test, got "),
        (
            {"val_tasks": [task("c", loss=nn.CrossEntropyLoss(reduction="none"))]},
            r"the loss must be a scalar tensor, got a Tensor of shape \(2,\)",
        ),
        ({"val_tasks": [task("c", loss=undirected)]}, "must be differentiable, got one without a"),
        (
            {"val_tasks": [task("c", loss=nn.L1Loss(), **{s: (X, X[:, 0]) for s in SPLITS})]},
            r"outputs and y must have one shape, got \(3,\) and \(\) per example",
        ),
        ({"source": [X]}, r"source must be inputs like a task's x \(a Tensor\), got a list"),
        ({"source": {"x": X}}, "source must be inputs like a task's x .*, got a dict"),
        ({"source": X[:0]}, "source: data must not be empty"),
        ({"source": X / 0}, "source: values must be finite"),
        ({"source": X[:, :3]}, "the model must take the source data, got RuntimeError"),
        (
            {"val_tasks": [task("c", metric=rows)]},
            r"metric 'rows' must take .*, give a number, got",
        ),
        (
            {"val_tasks": [task("c", metric=undefined)]},
            "metric 'undefined' must give a finite",
        ),
        ({"test_tasks": [task("c", loss=infinite)]}, "c', val: the loss must be finite, got inf"),
        (
            {"val_tasks": [task("c", loss=F.mse_loss, **{s: (X, X[:, :3]) for s in SPLITS})]},
            r"accuracy needs .* class labels .*, got \(3,\) and \(3,\) per example\. Give metric=",
        ),
    ],
)
def test_bad_suite_is_one_clear_line(changes: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        suite(**changes)
    assert "\n" not in str(caught.value)


def test_suite_leaves_the_model_as_it_was() -> None:
    net = model().train()
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    suite(model=net)
    assert [module.training for module in net.modules()] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_suite_finds_its_tasks_by_name() -> None:
    made = suite()
    assert [found.name for found in made.tasks()] == ["a", "b", "c"]
    assert made.task("b") is made.val_tasks[0]
    with pytest.raises(InputError, match=r"task must be one that exists, got task='bb'. Did you"):
        made.task("bb")


def test_a_tasks_label_is_its_name_unless_given() -> None:
    first = suite().train_tasks[0]
    assert dataclasses.replace(first, name="b").known_as == "b"
    labelled = dataclasses.replace(first, name="b", label="a")
    assert labelled.known_as == "a" and labelled.digest == first.digest
    with pytest.raises(InputError, match="label must be a string, got label=3"):
        dataclasses.replace(first, label=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [
        (F.cross_entropy, -100),
        (nn.CrossEntropyLoss(ignore_index=255), 255),
        (functools.partial(F.cross_entropy, ignore_index=7), 7),
    ],
)
def test_labels_that_the_loss_leaves_out_may_be_there(loss: Any, ignored: int) -> None:
    y = Y.clone()
    y[-1] = ignored
    suite(train_tasks=[task("void", train=(X, y), loss=loss)])
    y[-2] = ignored + 1
    with pytest.raises(InputError, match="labels must lie in"):
        suite(train_tasks=[task("void", train=(X, y), loss=loss)])
