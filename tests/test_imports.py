"""Ray is imported where Ray is the point, and imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import rlhf_ray

ROOT = Path(rlhf_ray.__file__).parent

RAY_MODULES = {
    "cluster_metrics", "env", "ray_session", "shared_storage", "submission.cluster",
    "sweep.search", "sweep.tracking", "sweep.trial", "sweep.tuning", "tensorboard", "trackers",
    "tree.actor", "tree.client", "tree.dispatch", "tree.pool", "tree.stage_worker", "tree.workers",
}  # fmt: skip
"""May import Ray, or one another, when they are imported; so may the algorithms, but for those:"""

RAY_FREE_ALGORITHMS = {
    "algorithms", "algorithms.counterfactuals", "algorithms.exploration", "algorithms.handover",
    "algorithms.overrides", "algorithms.settings",
}  # fmt: skip


def may_import_ray(name: str) -> bool:
    if name.startswith("algorithms"):
        return name not in RAY_FREE_ALGORITHMS
    return name in RAY_MODULES


def modules() -> dict[str, ast.Module]:
    """Dotted name below `rlhf_ray` ("" for the package itself) -> syntax tree."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(file.read_text(), str(file))
    return found


MODULES = modules()


def imported(tree: ast.Module, *, late: bool) -> set[str]:
    """Full names that a module imports: when it is imported, or (late) inside functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.update({node.module or "", *(f"{node.module}.{a.name}" for a in node.names)})
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if for_types or (inside and not late):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def own(names: set[str]) -> set[str]:
    """Modules of this package among names."""
    short = {name.removeprefix("rlhf_ray.") for name in names if name.startswith("rlhf_ray.")}
    return short & set(MODULES)


def test_ray_is_imported_by_the_modules_of_the_list_only() -> None:
    importers = {
        name
        for name, tree in MODULES.items()
        if any(full.split(".")[0] == "ray" for full in imported(tree, late=True))
    }
    # `testing` makes its environment when it is asked for one
    assert not {name for name in importers - {"testing"} if not may_import_ray(name)}
    users = {
        name
        for name, tree in MODULES.items()
        if any(may_import_ray(other) for other in own(imported(tree, late=False)))
    }
    steps = {"sweep.summing_up", "sweep.scheduling"}  # of a sweep, on its trials' context
    assert not {name for name in users - steps if not may_import_ray(name)}


def test_imports_have_no_cycle() -> None:
    below = {name: own(imported(tree, late=False)) - {name} for name, tree in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(below):
        ready = {name for name, needs in below.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {sorted(set(below) - done)}"
        done |= ready


def stays_out(package: str, modules: list[str]) -> None:
    """Imports modules one after the other in a fresh process."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    assert {package!r} not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_needs_no_ray_does_not_import_it() -> None:
    names = (
        "", "policies.policy", "policies.finetuning", "sweep.results", "launch", "apply", "submit",
        "suites", "evaluation.baselines",
    )  # fmt: skip
    stays_out("ray", [f"rlhf_ray.{name}".rstrip(".") for name in names])


def test_commands_show_their_arguments_before_a_storage_is_there() -> None:
    stays_out("pyarrow", ["rlhf_ray.launch", "rlhf_ray.apply"])


def test_commands_answer_before_torch_is_imported() -> None:
    stays_out(
        "torch",
        ["rlhf_ray", "rlhf_ray.config", "rlhf_ray.launch", "rlhf_ray.apply", "rlhf_ray.submit"],
    )
