"""What `gathering` gives, as HTML: one file that needs no network, or the part that changes.

Every name comes from users: the templates escape all they are given, and the data for the charts
is JSON in which no `<` is left.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.commands.tables import difference
from rlhf_ray.commands.terminal import duration, number
from rlhf_ray.config import SWEPT
from rlhf_ray.numerals import are_fine, figure, percent
from rlhf_ray.report.explain import TABLES

PAGE_FILE = "report.html"
"""The page's name in the sweep's folder."""

TEMPLATES = Path(__file__).parent / "templates"

LABELS = {
    "gamma": "gamma",
    "epsilon": "epsilon",
    "tuning_cost_weight": "tuning weight",
    "switch_cost_weight": "switch weight",
}
"""How the page calls the swept settings."""

_NOT_IN_CHARTS = ("keys", "paths", "stages", "error", "wall_s", "others")


def whole(data: Mapping[str, Any]) -> str:
    """The page, self-contained."""
    return (
        _environment()
        .get_template("page.html")
        .render(
            **_context(data), css=_source("page.css"), script=_source("page.js"), plotly=_plotly()
        )
    )


def fragment(data: Mapping[str, Any]) -> str:
    """What changes of it: a live page replaces this part."""
    return _environment().get_template("content.html").render(**_context(data))


def version(data: Mapping[str, Any]) -> str:
    """Changes when what is shown does."""
    shown = {key: value for key, value in data.items() if key not in ("generated", "trials")}
    trials = [[t["name"], t["status"], t["episodes"], t["utility"]] for t in data["trials"]]
    text = json.dumps([shown, trials], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _context(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "d": data,
        "swept": SWEPT,
        "labels": LABELS,
        "tables": TABLES,
        "version": version(data),
        "fine": _fine(data),
        "charts": _for_charts(data),
        "ordered": sorted(data["trials"], key=_rank),
    }


def _rank(trial: Mapping[str, Any]) -> tuple[bool, float]:
    """Best utility first; those without one last."""
    return trial["utility"] is None, -(trial["utility"] or 0.0)


def _for_charts(data: Mapping[str, Any]) -> dict[str, Any]:
    trials = [
        {k: v if k == "values" else _short(v) for k, v in trial.items() if k not in _NOT_IN_CHARTS}
        for trial in data["trials"]
    ]
    names = ("metric", "higher_is_better", "unit", "best", "methods", "val_marks", "effects")
    return {
        **{name: data[name] for name in names},
        "trials": trials,
        "labels": LABELS,
        "fine": _fine(data),
    }


def _fine(data: Mapping[str, Any]) -> dict[str, bool]:
    """Which kinds of figures are too small for decimals."""
    learned = data["learned"]["paths"] if data["learned"] else []
    shown = [*data["trials"], *data["val_marks"], *learned, *data["best_paths"]]
    fine = {"switches": False}
    for kind in ("metric", "cost", "utility"):
        methods = [method[f"{kind}_mean"] for method in data["methods"]]
        fine[kind] = are_fine([*methods, *(record.get(kind) for record in shown)])
    fine["return"] = are_fine(trial["curve"][-1][1] for trial in data["trials"] if trial["curve"])
    return fine


def _short(value: Any) -> Any:
    """Five significant digits: what a chart can show of a figure."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # the order is that of the page
    environment.filters.update(
        figure=figure, number=number, duration=duration, percent=percent, clock=_clock,
        difference=difference, setting=_setting, as_heading=_as_heading,
    )  # fmt: skip
    return environment


def _as_heading(name: str) -> str:
    """A name at the beginning of a line: RMSE and mAP@0.5 stay as they are."""
    return name[:1].upper() + name[1:] if name.islower() else name


def _setting(value: Any) -> str:
    """A value of the configuration, much as its flag takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return _setting([f"{key}={json.dumps(v)}" for key, v in value.items()])
    if isinstance(value, list):
        return " ".join(map(_setting, value)) or "–"  # noqa: RUF001
    return "–" if value is None else str(value)  # noqa: RUF001


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@cache
def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
