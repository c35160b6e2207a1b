"""How a sweep's stages stand, for Ray's dashboard and whatever scrapes Ray's metrics.

Gauges, tagged with the sweep's name, as the tree's actor counts them:

    rlhf_ray_stages_executed    stages carried out
    rlhf_ray_stages_in_flight   stages being carried out: busy workers
    rlhf_ray_stages_waiting     stages that wait for a worker
    rlhf_ray_stages_retried     stages begun again after a worker was lost
    rlhf_ray_stage_seconds      seconds spent on stages
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

GAUGES = {
    "stages_executed": ("executed", "stages carried out"),
    "stages_in_flight": ("in_flight", "stages being carried out"),
    "stages_waiting": ("waiting", "stages that wait for a worker"),
    "stages_retried": ("retried", "stages begun again after a worker was lost"),
    "stage_seconds": ("seconds_spent", "seconds spent on stages"),
}
"""Name -> the figure of `TreeActor.stats` that it shows, and what that is."""


class ClusterMetrics:
    """Keeps the gauges of one sweep up to date. Ray must run.

    Args:
        sweep: the sweep's name.
    """

    def __init__(self, sweep: str) -> None:
        self._gauges = []
        for name, (key, about) in GAUGES.items():
            gauge = Gauge(f"rlhf_ray_{name}", description=about, tag_keys=("sweep",))
            gauge.set_default_tags({"sweep": sweep})
            self._gauges.append((key, gauge))

    def show(self, stats: Mapping[str, Any]) -> None:
        """Sets what `stats` holds; nothing when the tree did not answer."""
        for key, gauge in self._gauges:
            if key in stats:
                gauge.set(stats[key])
