"""Reinforcement-Learning-based Hierarchical Fine-tuning: learn how to fine-tune.

The names of the public interface; each is imported when it is first used, so that `import
rlhf_ray` is quick and needs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.commands.terminal import Terminal
    from rlhf_ray.config import SearchConfig
    from rlhf_ray.errors import InputError, RlhfRayError, StageError, StorageError
    from rlhf_ray.evaluation.comparing import run_baselines
    from rlhf_ray.operations import Operation, Skip, Stop, Train, default_operations
    from rlhf_ray.policies.finetuning import FineTuned, finetune
    from rlhf_ray.policies.policy import Policy
    from rlhf_ray.suites import load_suite
    from rlhf_ray.sweep.results import SearchResult
    from rlhf_ray.sweep.search import search
    from rlhf_ray.tasks import Metric, Suite, Task

_HOMES = {
    "evaluation.comparing": ("run_baselines",),
    "commands.terminal": ("Terminal",),
    "config": ("SearchConfig",),
    "errors": ("InputError", "RlhfRayError", "StageError", "StorageError"),
    "policies.finetuning": ("FineTuned", "finetune"),
    "operations": ("Operation", "Skip", "Stop", "Train", "default_operations"),
    "policies.policy": ("Policy",),
    "sweep.results": ("SearchResult",),
    "suites": ("load_suite",),
    "sweep.search": ("search",),
    "tasks": ("Metric", "Suite", "Task"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "FineTuned",
    "InputError",
    "Metric",
    "Operation",
    "Policy",
    "RlhfRayError",
    "SearchConfig",
    "SearchResult",
    "Skip",
    "StageError",
    "Stop",
    "StorageError",
    "Suite",
    "Task",
    "Terminal",
    "Train",
    "default_operations",
    "finetune",
    "load_suite",
    "run_baselines",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
