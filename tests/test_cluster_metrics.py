import inspect

from rlhf_ray import cluster_metrics
from rlhf_ray.cluster_metrics import GAUGES, ClusterMetrics
from rlhf_ray.tree.actor import TreeActor


def test_every_gauge_shows_its_figure_and_silence_shows_nothing(monkeypatch):
    shown = {}

    class Fake:
        def __init__(self, name, description, tag_keys):
            self.name, self.tag_keys = name, tag_keys

        def set_default_tags(self, tags):
            assert set(tags) == set(self.tag_keys)

        def set(self, value):
            shown[self.name] = value

    monkeypatch.setattr(cluster_metrics, "Gauge", Fake)
    metrics = ClusterMetrics("digits-1")
    metrics.show({})
    assert shown == {}
    metrics.show({key: i for i, (key, _) in enumerate(GAUGES.values())})
    assert shown == {f"rlhf_ray_{name}": i for i, name in enumerate(GAUGES)}


def test_the_tree_counts_every_figure():
    source = inspect.getsource(TreeActor.stats)
    for key, _ in GAUGES.values():
        assert f'"{key}":' in source
