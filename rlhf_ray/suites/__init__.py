"""The suites that can be named on the command line: built in, or a user's own function.

A built-in suite is a source of images (`images`), a network pretrained on clean ones (`pretrain`)
and tasks drawn (`generate`) from families of shifts (`shifts`); `seed` holds the literal form of
the founding document.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InputError, RlhfRayError, check_whole, in_one_line, unknown_name
from rlhf_ray.suites.generate import SplitSizes, make_tasks
from rlhf_ray.suites.images import SOURCES
from rlhf_ray.suites.pretrain import pretrained_cnn
from rlhf_ray.suites.seed import DEFAULTS as SEED_DEFAULTS
from rlhf_ray.suites.seed import mnist_seed_suite
from rlhf_ray.suites.shifts import N_GROUPS
from rlhf_ray.tasks import SPLITS, Suite, Task

__all__ = ["SUITES", "load_suite"]

TWO_LEVELS = {"conv": ["conv1", "conv2"], "dense": ["dense", "head"]}
FOUR_LEVELS = {name: [name] for name in ("conv1", "conv2", "dense", "head")}

FOUR_LEVELS_DEFAULTS = {"learning_rates": (1e-3, 3e-3, 1e-2)}
"""Levels of one layer take higher rates than those of several (see experiments/LOG.md)."""

SUITES: dict[str, str] = {
    "digits": "scikit-learn's 1,797 digits; levels conv, dense; no network needed",
    "digits-4": "the same in four levels: conv1, conv2, dense, head",
    "mnist": "MNIST; levels conv, dense",
    "mnist-4": "the same in four levels",
    "fashion-mnist": "Fashion-MNIST; levels conv, dense",
    "fashion-mnist-4": "the same in four levels",
    "mnist-seed": "the founding document's literal form: its reward sees the test images",
}
"""Name -> one line about the suite."""


def suite_defaults(name: str) -> Mapping[str, Any] | None:
    """A built-in suite's own defaults, without loading it; None for another name.

    >>> suite_defaults("digits"), suite_defaults("package.module:function")
    ({}, None)
    """
    if name not in SUITES:
        return None
    if name == "mnist-seed":
        return SEED_DEFAULTS
    return FOUR_LEVELS_DEFAULTS if name.endswith("-4") else {}


def load_suite(
    name: str,
    *,
    data_root: str | Path | None = None,
    storage_path: str | Path | None = None,
    n_train_tasks: int = 24,
    n_val_tasks: int = 6,
    n_test_tasks: int = 8,
    seed: int = 0,
    fold: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Suite:
    """The suite of a name, ready to be trained on.

    A user's own suite is called without arguments: all but the name is then left aside, and so are
    task numbers, fold and storage path for `mnist-seed`, which has ten tasks and a fresh network.

    Args:
        name: one of `SUITES`, or "package.module:function".
        data_root: where torchvision's data lies or is downloaded to; else `RLHF_RAY_DATA`, else
            `./data`.
        storage_path: pretrained weights are kept in its folder `pretrained`; None keeps nothing.
        n_train_tasks: tasks that policies learn on, >= 1; as many as wanted.
        n_val_tasks: tasks that the sweep is judged on, >= 1.
        n_test_tasks: tasks of the final report, >= 1.
        seed: of the pools, the pretraining and the tasks, >= 0.
        fold: 0, 1 or 2; rotates which families of shifts are the test tasks' alone.
        progress: called with short lines for the user.

    Returns:
        The suite.

    Raises:
        InputError: no such suite, its data cannot be had, or the user's function does not give one.
    """
    if ":" in name:
        return _own_suite(name)
    if name not in SUITES:
        module = _as_module(name)
        if Path(f"{module.replace('.', '/')}.py").is_file():
            raise InputError(
                "a suite of your own must be named package.module:function, got "
                f"{name!r}. Write {module}:FUNCTION."
            )
        raise unknown_name("suite", name, SUITES)
    check_whole("seed", seed, at_least=0)
    if name == "mnist-seed":
        return mnist_seed_suite(data_root=data_root, seed=seed)
    n_tasks = dict(zip(SPLITS, (n_train_tasks, n_val_tasks, n_test_tasks), strict=True))
    for role, number in n_tasks.items():
        check_whole(f"n_{role}_tasks", number, at_least=1)
    if fold not in range(N_GROUPS):
        raise InputError(f"fold must be 0, 1 or 2, got fold={fold}.")
    source = name.removesuffix("-4")
    pools = SOURCES[source](data_root=data_root, seed=seed)
    model = pretrained_cnn(
        source, pools.pretrain, seed=seed, storage_path=storage_path, progress=progress
    )
    tasks: dict[str, tuple[Task, ...]] = {}
    for role, number in n_tasks.items():
        tasks[role] = make_tasks(
            role,
            number,
            pools=pools,
            seed=seed,
            fold=fold,
            # nothing is reported on train tasks by default: smaller test splits keep many cheap
            sizes=SplitSizes(test=256 if role == "train" else 1000),
            names=[task.name for made in tasks.values() for task in made],
        )
    return Suite(
        name=f"{name}-fold{fold}" if fold else name,
        model=model,
        levels=TWO_LEVELS if source == name else FOUR_LEVELS,
        train_tasks=tasks["train"],
        val_tasks=tasks["val"],
        test_tasks=tasks["test"],
        source=pools.pretrain[0][:256].clone(),
        defaults=suite_defaults(name) or {},
    )


def _own_suite(name: str) -> Suite:
    """Calls a user's "package.module:function"."""
    suite = _call(name, _own_function(name))
    if not isinstance(suite, Suite):
        raise InputError(
            f"a suite function must return an rlhf_ray.Suite, got a {type(suite).__name__} from "
            f"{name!r}."
        )
    return suite


def _own_function(name: str) -> Callable[[], Any]:
    module_name, _, function_name = name.partition(":")
    if module_name.endswith(".py"):
        raise InputError(
            "a suite's module must be named as in an import, got "
            f"{name!r}. Write {_as_module(module_name)}:{function_name}."
        )
    if not module_name or module_name.startswith(".") or not function_name.isidentifier():
        raise InputError(
            f"a suite of your own must be named package.module:function, got {name!r}."
        )
    if os.getcwd() not in sys.path:  # a console script does not put it there, `python -m` does
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise InputError(
                f"the suite's module must exist, got {name!r} and no module {missing!r}. Start in "
                "the folder that holds it, or install it."
            ) from error
        raise _raised(f"the suite's module {module_name!r} must be importable", error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise unknown_name(f"function of {module_name}", function_name, functions)
    return function


def _as_module(path: str) -> str:
    """What a file is named in an import, if it is one of the current folder."""
    return path.removesuffix(".py").removeprefix("./").replace("/", ".")


def _call(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except RlhfRayError:
        raise  # says by itself what is wrong with the user's suite
    except (Exception, SystemExit) as error:
        raise _raised(f"the suite function {name!r} must return a suite", error) from error


def _raised(what: str, error: BaseException) -> InputError:
    return InputError(f"{what}, got {in_one_line(error)}")
