"""What the commands share: flags made from dataclasses, errors in one line, exit statuses.

Which flags there are and what they mean stands in the dataclasses (`SearchConfig` and the options
of each command): their docstrings are the help texts. No torch here, so that `--help` and typing
errors answer at once.
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from rlhf_ray.commands.terminal import WIDTH, printable
from rlhf_ray.errors import InputError, RlhfRayError, check_whole, unknown_name
from rlhf_ray.uris import shown_word

if TYPE_CHECKING:
    from rlhf_ray.tasks import Suite

OK, FAILED, BAD_INPUT, TRIALS_FAILED, TIME_IS_UP, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
"""Exit statuses."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Which suite, and how it is made.

    Attributes:
        suite: digits, mnist, fashion-mnist (each also with -4: four levels), mnist-seed, or your
            own as package.module:function.
        data_root: folder of torchvision's data, downloaded when absent; without it RLHF_RAY_DATA,
            else ./data.
        n_train_tasks: tasks that policies learn on, >= 1; as many as wanted.
        n_val_tasks: tasks that the sweep is judged on, >= 1.
        n_test_tasks: tasks of the final report, >= 1.
        suite_seed: of the data split, the pretraining and the tasks, >= 0.
        fold: 0, 1 or 2: rotates which families of shifts are the test tasks' alone.
    """

    suite: str = "digits"
    data_root: str | None = None
    n_train_tasks: int = 24
    n_val_tasks: int = 6
    n_test_tasks: int = 8
    suite_seed: int = 0
    fold: int = 0

    def __post_init__(self) -> None:
        for name in ("n_train_tasks", "n_val_tasks", "n_test_tasks"):
            check_whole(name, getattr(self, name), at_least=1)
        check_whole("suite_seed", self.suite_seed, at_least=0)
        if self.fold not in (0, 1, 2):
            raise InputError(f"fold must be 0, 1 or 2, got fold={self.fold}.")
        takes = {"suite", "data_root", "suite_seed"} if self.suite == "mnist-seed" else {"suite"}
        idle = [flag_of(name) for name in self._changed() if name not in takes]
        if idle and (":" in self.suite or self.suite == "mnist-seed"):
            raise InputError(
                f"the suite's flags must be those that it takes, got {' '.join(idle)} with "
                f"--suite {self.suite}, which makes its tasks by itself. Leave them out."
            )

    def load(self, storage_path: str | None, progress: Callable[[str], None]) -> "Suite":
        """The suite; pretrained weights are kept under the storage path, if one is given."""
        from rlhf_ray.suites import load_suite

        return load_suite(
            self.suite,
            data_root=self.data_root,
            storage_path=storage_path,
            n_train_tasks=self.n_train_tasks,
            n_val_tasks=self.n_val_tasks,
            n_test_tasks=self.n_test_tasks,
            seed=self.suite_seed,
            fold=self.fold,
            progress=progress,
        )

    def changed_flags(self) -> list[str]:
        """The arguments that give these options again: those that are not at their defaults."""
        changed = self._changed().items()
        return [word for name, value in changed for word in (flag_of(name), str(value))]

    def _changed(self) -> dict[str, Any]:
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a command.

    Attributes:
        name: of the dataclass field.
        kind: its type.
        default: its default; `dataclasses.MISSING` where it must be given.
        doc: what it means, with unit and range.
    """

    name: str
    kind: Any
    default: Any
    doc: str


def flag_of(name: str) -> str:
    """The flag of a field: "n_val_tasks" -> "--n-val-tasks"."""
    return f"--{name.replace('_', '-')}"


def flags_of(schema: type) -> dict[str, Flag]:
    """The flags of a dataclass, documented by the Attributes section of its docstring."""
    kinds, docs = typing.get_type_hints(schema), field_docs(schema)
    return {
        f.name: Flag(
            name=f.name,
            # KEY=VALUE pairs, read by the command
            kind=tuple[str, ...] if typing.get_origin(kinds[f.name]) is Mapping else kinds[f.name],
            default=() if callable(f.default_factory) else f.default,
            doc=docs[f.name],
        )
        for f in dataclasses.fields(schema)
    }


def field_docs(schema: type) -> dict[str, str]:
    """Field name -> its text in the docstring's Attributes section."""
    _, _, section = (inspect.getdoc(schema) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    groups: Mapping[str, Sequence[Flag]],
) -> dict[str, Any]:
    """Parses a command line.

    Args:
        argv: the arguments, without the program's name.
        prog: how the command is called.
        description: one paragraph for `--help`.
        groups: heading -> its flags, in the order of `--help`.

    Returns:
        Field name -> value. `--help` prints and raises SystemExit.

    Raises:
        InputError: an unknown flag, a missing one, or a value of another type.
    """
    flags = {flag_of(flag.name): flag for group in groups.values() for flag in group}
    _check_flags(argv, flags)
    boxes = {title: _group(title, group) for title, group in groups.items()}
    schema = dataclasses.make_dataclass(
        "Arguments",
        [(title, box, dataclasses.field(default_factory=box)) for title, box in boxes.items()],
    )
    said, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                schema,
                args=list(argv),
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit_:
        if exit_.code:
            raise _rephrased(complaint.getvalue(), argv, flags) from None
        for line in said.getvalue().splitlines():  # tyro wraps all but the description
            print(line if line[:1] in "│╭╰" else textwrap.fill(line, WIDTH))
        raise
    return {
        flag.name: getattr(getattr(parsed, title), flag.name)
        for title, group in groups.items()
        for flag in group
    }


def flags_in(argv: Sequence[str]) -> list[str]:
    """The flags in a command line, however they are written: "--val_size=8" -> "--val-size"."""
    return [word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")]


def fields_in(argv: Sequence[str]) -> set[str]:
    """Names of the fields that the flags in a command line set: "--no-share" -> "share"."""
    names = [flag[2:].replace("-", "_") for flag in flags_in(argv)]
    return {*names, *(name.removeprefix("no_") for name in names)}


def pick(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from the values that carry the names of its fields."""
    fields = dataclasses.fields(typing.cast(Any, schema))
    return schema(**{f.name: values[f.name] for f in fields})


def run(command: Callable[[], int], *, on_interrupt: str = "interrupted.") -> int:
    """Runs a command and turns what it raises into one line on stderr and an exit status.

    SIGTERM, which schedulers and `timeout` send before they kill, ends it as Ctrl-C does.
    """
    terminated = False

    def terminate(number: int, frame: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    before, in_charge = signal.getsignal(signal.SIGTERM), current_thread() is main_thread()
    if in_charge:
        signal.signal(signal.SIGTERM, terminate)
    try:
        return command()
    except InputError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except RlhfRayError as error:
        return _fail(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        return _fail(on_interrupt, TERMINATED if terminated else INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, before)


def _fail(line: str, status: int) -> int:
    print(printable(line), file=sys.stderr, flush=True)
    return status


def _check_flags(argv: Sequence[str], flags: Mapping[str, Flag]) -> None:
    valid = {*flags, "--help"} | {
        f"--no-{name[2:]}" for name, flag in flags.items() if flag.default is True
    }
    given = flags_in(argv)
    for name in given:
        if name not in valid:
            raise unknown_name("flag", name, valid)
    if {"--help", "-h"} & set(argv):
        return
    for name, flag in flags.items():
        if flag.default is dataclasses.MISSING and name not in given:
            raise InputError(f"{name} must be given ({flag.doc.rstrip('.')}), got none.")
        if name in given and "[" in (_metavar(flag) or "") and not _values(argv, name):
            raise InputError(f"{name} must have at least one value, got none.")


def _group(title: str, flags: Sequence[Flag]) -> type:
    """A dataclass of some flags: tyro gives each its own box."""
    made = []
    for flag in flags:
        argument = tyro.conf.arg(
            help=flag.doc, metavar=_metavar(flag), help_behavior_hint=_default_hint(flag)
        )
        default = "" if flag.default is dataclasses.MISSING else flag.default
        kind = flag.kind
        if default is False:  # no --no-x for what is off anyway
            kind = Annotated[kind, tyro.conf.FlagCreatePairsOff]
        made.append((flag.name, Annotated[kind, argument], dataclasses.field(default=default)))
    return dataclasses.make_dataclass(title, made, frozen=True)


def _metavar(flag: Flag) -> str | None:
    """How the value is written in `--help`; None: as tyro writes it (no value, or choices)."""
    names = {int: "N", float: "X", str: "TEXT"}
    kinds = typing.get_args(flag.kind) if _is_union(flag.kind) else (flag.kind,)
    parts = []
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            one = names[typing.get_args(kind)[0]]
            parts.append(f"{one} [{one} ...]")
        elif typing.get_origin(kind) is Literal and len(kinds) > 1:
            parts += [str(choice) for choice in typing.get_args(kind)]
        elif kind in names:
            parts.append(names[kind])
    return "|".join(parts) or None


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _default_hint(flag: Flag) -> str:
    if flag.default is dataclasses.MISSING:
        return "(required)"
    if flag.default is None or flag.default == ():
        return "(default: none)"
    if isinstance(flag.default, bool):
        return f"(default: {'on' if flag.default else 'off'})"
    shown = flag.default if isinstance(flag.default, tuple) else (flag.default,)
    return f"(default: {' '.join(str(value) for value in shown)})"


def _rephrased(complaint: str, argv: Sequence[str], flags: Mapping[str, Flag]) -> InputError:
    """Tyro's box of several lines as one line of ours."""
    shown = [shown_word(word) for word in argv]
    first = next((name for name in re.findall(r"--[\w-]+", complaint) if name in flags), None)
    if first is None or "Unrecognized" in complaint:
        stray = re.search(r"[Uu]nrecognized options: ([^\n│]*)", complaint)
        # the box may cut a URI in two, and its keys would not be known as such
        quote = stray if shown == list(argv) else None
        got = repr(quote[1].strip()) if quote else " ".join(shown)
        return InputError(f"every value must follow a flag that takes it, got {got} (see --help).")
    flag, given = flags[first], " ".join(_values(shown, first))
    if typing.get_origin(flag.kind) is Literal and given:
        return unknown_name(first, given, typing.get_args(flag.kind))
    return InputError(
        f"{first} must be {_metavar(flag) or 'without a value'} ({flag.doc.rstrip('.')}), "
        f"got {first}={given or 'nothing'}."
    )


def _values(argv: Sequence[str], name: str) -> list[str]:
    """The words after the last occurrence of a flag."""
    found: list[str] = []
    taking = False
    for word in argv:
        if word.startswith("--"):
            key, has_value, value = word.partition("=")
            taking = key.replace("_", "-") == name
            found = ([value] if has_value else []) if taking else found
        elif taking:
            found.append(word)
    return found
