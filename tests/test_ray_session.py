import pytest
import ray

from rlhf_ray import ray_session
from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError
from rlhf_ray.ray_session import running_ray


def test_a_local_ray_has_a_dashboard_where_it_is_asked_for(monkeypatch):
    given = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: given.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session, "_check_gpus", lambda config: None)
    monkeypatch.setattr(ray_session, "get_webui_url_from_internal_kv", lambda: "127.0.0.1:8265")
    with running_ray(SearchConfig(dashboard=True)) as address:
        assert address == "http://127.0.0.1:8265"
    assert given["include_dashboard"] is True
    with running_ray(SearchConfig()):
        assert given["include_dashboard"] is False


def test_a_ray_that_runs_without_dashboard_has_no_address(ray_session):
    with running_ray(SearchConfig()) as address:
        assert address is None
    assert ray.is_initialized()


def test_workers_share_the_gpus_that_there_are_unless_said_otherwise(monkeypatch):
    nodes = [{"CPU": 8.0, "GPU": 1.0}]
    monkeypatch.setattr(ray_session, "node_resources", lambda: nodes)
    assert ray_session.needs(SearchConfig()).worker_gpus == 0.25
    assert ray_session.needs(SearchConfig(device="cpu")).worker_gpus == 0
    assert ray_session.needs(SearchConfig(gpus_per_worker=0)).worker_gpus == 0
    assert ray_session.needs(SearchConfig(gpus_per_worker=1)).worker_gpus == 1
    nodes[:] = [{"CPU": 8.0}]
    assert ray_session.needs(SearchConfig()).worker_gpus == 0


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"precision": "bf16"}])
def test_a_gpu_must_be_on_a_node_and_reserved(changes, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ray_session, "node_resources", lambda: [{"CPU": 8.0}])
    with pytest.raises(InputError, match="got no GPU on any node"):
        ray_session.needs(SearchConfig(**changes))
    monkeypatch.setattr(
        ray_session, "node_resources", lambda: [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1}]
    )
    assert ray_session.needs(SearchConfig(**changes)).worker_gpus == 0.25
    with pytest.raises(InputError, match="gpus_per_worker must be > 0"):
        ray_session.needs(SearchConfig(gpus_per_worker=0, **changes))
