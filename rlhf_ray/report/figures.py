"""For notebooks: the front as a plotly figure, and results as short HTML. Everything is escaped."""

from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from rlhf_ray.commands.tables import comparison
from rlhf_ray.config import SWEPT
from rlhf_ray.numerals import are_fine, figure
from rlhf_ray.report.page import LABELS

if TYPE_CHECKING:
    from rlhf_ray.report.explain import Explanation
    from rlhf_ray.sweep.results import SearchResult

GREY, BLUE, ORANGE = "#8a8f98", "#2563eb", "#c2570c"


def front_figure(result: "SearchResult", val_marks: list[dict[str, Any]]) -> go.Figure:
    """Accuracy against cost of all trials on the val tasks, their front, and the baselines."""
    metric = escape(str(result.sweep["metric"]["name"]))
    table = result.table().dropna(subset=["metric"])
    front = table.loc[table["on_front"]].sort_values(by="cost")
    drawn = go.Figure(
        layout={
            "template": "simple_white",
            "xaxis": {"title": "tuning cost", "rangemode": "tozero"},
            "yaxis": {"title": f"{metric} on the val tasks"},
            "height": 420,
        }
    )
    fine = are_fine(table["utility"])
    for name, rows, mode, colour in (
        ("trials", table.loc[~table["on_front"]], "markers", GREY),
        ("front", front, "lines+markers", BLUE),
    ):
        hover = [_hover(row, fine) for row in rows.to_dict("records")]
        drawn.add_scatter(
            x=rows["cost"], y=rows["metric"], mode=mode, name=name, hovertext=hover,
            hoverinfo="text", marker={"color": colour, "size": 8}, line={"shape": "hv"},
        )  # fmt: skip
    if val_marks:
        names = [escape(str(mark["name"]), quote=False) for mark in val_marks]
        drawn.add_scatter(
            x=[mark["cost"] for mark in val_marks],
            y=[mark["metric"] for mark in val_marks],
            mode="markers+text", name="baselines", text=names, textposition="top center",
            marker={"color": ORANGE, "symbol": "diamond", "size": 9},
        )  # fmt: skip
    return drawn


def _hover(row: dict[str, Any], fine: bool) -> str:
    settings = "<br>".join(f"{label} {row[name]:.6g}" for name, label in LABELS.items())
    name, utility = escape(str(row["trial"]), quote=False), figure(row["utility"], fine=fine)
    return f"{name}<br>{settings}<br>utility {utility}"


def result_html(result: "SearchResult") -> str:
    """A result in a notebook: what came out in a sentence, and the front."""
    about = result.sweep["metric"]
    said = comparison(
        result.summary.get("methods", {}),
        metric=str(about["name"]),
        higher_is_better=bool(about["higher_is_better"]),
    )
    done = sum(trial["status"] == "done" for trial in result.trials)
    state = f"{result.state}; {done} of {len(result.trials)} trials judged"
    front = result.front().drop(columns=["status", "on_front"])
    return (
        f"<b>{escape(result.name)}</b> ({escape(state)})<br>{escape(said)}"
        + front.to_html(
            index=False,
            border=0,
            float_format="{:.3g}".format,
            formatters=dict.fromkeys(SWEPT, "{:.6g}".format),
        )
        + "<small>the trials that no other beats in both metric and cost, on the val tasks</small>"
    )


def explanation_html(explanation: "Explanation") -> str:
    """An explanation in a notebook: its sentences, and the way each task goes."""
    words = "".join(f"<li>{escape(line)}</li>" for line in explanation.words)
    fine = {of: are_fine(path[of] for path in explanation.paths) for of in ("metric", "cost")}
    rows = "".join(
        f"<tr><td>{escape(path['task'])}</td><td>{path['split']}</td>"
        f"<td>{escape(path['words'])}</td><td>{figure(path['start'], fine=fine['metric'])}</td>"
        f"<td>{figure(path['metric'], fine=fine['metric'])}</td>"
        f"<td>{figure(path['cost'], 2, fine['cost'])}</td></tr>"
        for path in explanation.paths
    )
    head = "".join(f"<th>{name}</th>" for name in ("task", "split", "what", "start", "val", "cost"))
    return f"<ul>{words}</ul><table><tr>{head}</tr>{rows}</table>"
