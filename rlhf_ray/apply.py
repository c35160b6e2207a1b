"""`python -m rlhf_ray.apply`: fine-tunes one task with a learned policy, without Ray."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.commands import command_line
from rlhf_ray.commands.command_line import OK, Flag, SuiteOptions
from rlhf_ray.commands.terminal import Terminal
from rlhf_ray.errors import InputError
from rlhf_ray.uris import without_secrets

if TYPE_CHECKING:
    from rlhf_ray.policies.finetuning import FineTuned
    from rlhf_ray.policies.policy import Policy
    from rlhf_ray.tasks import Suite, Task

PROG = "python -m rlhf_ray.apply"

DESCRIPTION = (
    "Fine-tunes one task as a learned policy decides: no search, no Ray. Prints what was done, the "
    "metric before and after, and the cost; saves the tuned weights. Exit status: 0; 2 bad input; "
    "130 interrupted."
)


@dataclass(frozen=True, kw_only=True)
class ApplyOptions:
    """What this command does.

    Attributes:
        policy: folder with policy.json and its weights, or that policy.json.
        task: name of one of the suite's tasks.
        output: file for the tuned weights (safetensors: the model's state dict); an existing one
            is replaced; without it nothing is saved.
        replica: seed of the batches drawn, >= 0; the same seed gives the same weights.
        search_stages: stages to try beyond the policy's own, >= 0: its values guide a search, and
            the best val metric met is returned.
        device: where to train; auto: CUDA where there is a device.
        storage_path: pretrained weights of built-in suites are kept here, as by the launch command.
        json: print the result as JSON on stdout, everything else on stderr.
        quiet: show errors and the result in one line.
    """

    policy: str
    task: str
    output: str | None = None
    replica: int = 0
    search_stages: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    storage_path: str = "./rlhf_runs"
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.replica < 0:
            raise InputError(f"replica must be at least 0, got replica={self.replica}.")
        if self.search_stages < 0:
            raise InputError(
                f"search_stages must be at least 0, got search_stages={self.search_stages}."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    stopped = "interrupted. Nothing was saved."
    return command_line.run(lambda: _apply(arguments), on_interrupt=stopped)


def _apply(arguments: list[str]) -> int:
    values = command_line.parse(
        arguments, prog=PROG, description=DESCRIPTION, groups=_flag_groups()
    )
    options = command_line.pick(ApplyOptions, values)
    suite_options = command_line.pick(SuiteOptions, values)
    output = _checked_output(options.output)
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if options.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        terminal = stack.enter_context(Terminal(sys.stdout, quiet=options.quiet))
        tuned, answer = _finetune(options, suite_options, terminal)
        try:
            if output is not None:
                _save(tuned, output)
                terminal.show_lines(f"The tuned weights are in {output}")
                answer["output"] = str(output)
        finally:  # the figures are not lost with the file
            if options.json:
                stdout.write(json.dumps(answer, indent=1) + "\n")
    return OK


def _finetune(
    options: ApplyOptions, suite_options: SuiteOptions, terminal: Terminal
) -> tuple["FineTuned", dict[str, Any]]:
    from rlhf_ray.engine.loaded_model import EngineSettings
    from rlhf_ray.policies.finetuning import finetune
    from rlhf_ray.policies.policy import Policy
    from rlhf_ray.storage import open_storage
    from rlhf_ray.tasks import n_examples

    EngineSettings(device=options.device)  # loading the suite may pretrain for minutes
    policy = Policy.load(options.policy)
    named = without_secrets(options.policy)
    terminal.message(f"policy  {named}: made for levels {', '.join(policy.levels)}")
    kept = str(open_storage(options.storage_path).local_path() or ApplyOptions.storage_path)
    suite = suite_options.load(kept, terminal.message)
    task = suite.task(options.task)
    terminal.message(f"task    {task.name} of suite {suite.name}")
    tuned = finetune(
        suite.model,
        suite.levels,
        task,
        policy,
        replica=options.replica,
        search_stages=options.search_stages,
        device=options.device,
    )
    _show(terminal, tuned, policy, _metric_name(task), n_val=n_examples(task.val[0]))
    return tuned, _answer(options, suite, tuned)


def _show(
    terminal: Terminal, tuned: "FineTuned", policy: "Policy", metric: str, *, n_val: int
) -> None:
    from rlhf_ray.commands.tables import trace_table
    from rlhf_ray.numerals import are_fine, figure

    metrics = (tuned.start_metric, tuned.val_metric, tuned.start_test_metric, tuned.test_metric)
    shown = partial(figure, fine=are_fine(metrics), none="none")
    unit = "seconds" if policy.metadata["process"]["cost"] == "seconds" else "full stages"
    used = min(n_val, policy.metadata["process"]["val_size"])
    part = f" (on {used} of its {n_val} examples)" if used < n_val else ""
    own_cost = tuned.cost - tuned.search_cost
    figures = {"start_metric": tuned.start_metric, "cost": own_cost, "unit": unit}
    terminal.show("")
    terminal.show(trace_table(tuned.trace, metric=metric, **figures))
    terminal.show("")
    terminal.say(
        f"val {metric} {shown(tuned.start_metric)} -> {shown(tuned.val_metric)}{part}, "
        f"test {metric} {shown(tuned.start_test_metric)} -> {shown(tuned.test_metric)}, "
        f"cost {tuned.cost:.2f} {unit}, {tuned.switches} "
        + ("switch" if tuned.switches == 1 else "switches")
        + (f"; searching off this way took {tuned.search_cost:.2f}" if tuned.search_cost else "")
    )
    for line in tuned.failures:
        terminal.message(f"a stage failed and counts as diverged: {line}")
    if unit == "full stages":
        terminal.message(
            "A full stage is 20 training steps of 64 examples over the whole model; the cost "
            "counts training, evaluations, probes and cache fills."
        )


def _answer(options: ApplyOptions, suite: "Suite", tuned: "FineTuned") -> dict[str, Any]:
    return {
        "suite": suite.name,
        "task": options.task,
        "policy": without_secrets(options.policy),
        "replica": options.replica,
        "start_metric": tuned.start_metric,
        "val_metric": tuned.val_metric,
        "start_test_metric": _finite(tuned.start_test_metric),
        "test_metric": _finite(tuned.test_metric),
        "cost": tuned.cost,
        "search_cost": tuned.search_cost,
        "stages": tuned.stages,
        "switches": tuned.switches,
        "trace": [dict(step) for step in tuned.trace],
        "failures": list(tuned.failures),
        "output": None,
    }


def _finite(figure: float) -> float | None:
    """None for what JSON has no word for."""
    return figure if math.isfinite(figure) else None


# -- input and output ------------------------------------------------------------------------------


def _flag_groups() -> dict[str, list[Flag]]:
    flags = command_line.flags_of(ApplyOptions)
    own = ("policy", "task", "replica", "search_stages", "device")
    return {
        "task": [flags[name] for name in own],
        "suite": list(command_line.flags_of(SuiteOptions).values()),
        "output": [flag for name, flag in flags.items() if name not in own],
    }


def _metric_name(task: "Task") -> str:
    return str(getattr(task.metric, "name", "metric"))


def _checked_output(output: str | None) -> Path | None:
    """Looks before the work whether the result can be written after it."""
    if output is None:
        return None
    if "://" in output:
        raise InputError(
            "output must be a file of this machine, got the URI "
            f"output={without_secrets(output)!r}. Copy it there afterwards."
        )
    path = Path(output).expanduser().resolve()  # a link keeps leading where it leads
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise InputError(f"output must be a file, got the {kind} output={output!r}.")
    if not path.parent.is_dir():
        raise InputError(
            f"output must lie in a folder that exists, got output={output!r}. "
            f"Make {str(path.parent)!r} first."
        )
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise InputError(f"output must be writable, got output={output!r}.")
    return path


def _save(tuned: "FineTuned", path: Path) -> None:
    """Writes the state dict; the file is the old one or the new one, never a part."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    state = {  # copies: tied tensors are in it by each of their names
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in tuned.model.state_dict().items()
    }
    try:
        save_file(state, str(part))
        part.replace(path)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise InputError(f"output must be writable, got {str(path)!r} ({error}).") from error
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
