import pytest

from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError
from rlhf_ray.placement import Needs, fitting, trial_room, wanted_workers, worker_room
from rlhf_ray.ray_session import shortages


def needs(cpus: float = 1.0, gpus: float = 0.0, trials: int = 2) -> Needs:
    return Needs(worker_cpus=cpus, worker_gpus=gpus, trial_cpus=0.5, trials=trials)


def test_workers_leave_room_for_trials() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0}]
    assert wanted_workers(nodes, needs(), None) == 5  # two trials take the sixth CPU
    assert wanted_workers(nodes, needs(), 3) == 3
    assert wanted_workers(nodes, needs(), 100) == 5  # one trial must fit
    assert trial_room(nodes, needs(), 5) == 2
    assert wanted_workers([{"CPU": 1.5}, {"CPU": 1.5}], needs(), 100) == 2
    # a worker lies on one node
    assert worker_room([{"CPU": 3.0}, {"CPU": 3.0}], needs(cpus=2.0), trials=1) == 2


def test_fractions_lie_on_one_gpu() -> None:
    node = {"CPU": 32.0, "GPU": 2.0}
    for gpus, workers in ((0.5, 4), (0.4, 4), (0.25, 8), (1.0, 2), (2.0, 1), (4.0, 0)):
        assert worker_room([node], needs(gpus=gpus), trials=1) == workers
    assert worker_room([{"CPU": 2.0, "GPU": 8.0}], needs(gpus=1.0), trials=1) == 1
    with pytest.raises(InputError, match=r"a fraction of one GPU or a whole number, got .*=1\.5"):
        needs(gpus=1.5)


def test_workers_without_room_are_asked_for_where_they_take_nothing_from_trials() -> None:
    head, gpus = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}
    assert wanted_workers([head], needs(gpus=1.0), None) == 1  # an autoscaler sees it wait
    assert wanted_workers([head], needs(gpus=1.0), 4) == 4
    assert wanted_workers([head, gpus], needs(gpus=1.0), None) == 2
    assert wanted_workers([head, gpus], needs(gpus=1.0), 4) == 4  # GPUs are short, not CPUs
    few_cpus = {"CPU": 2.0, "GPU": 8.0}
    assert wanted_workers([few_cpus], needs(gpus=1.0), 8) == 1


def test_cluster_too_small_for_both_grants_less_to_each() -> None:
    for nodes in ([{"CPU": 1.0}], [{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 0.5}, {"CPU": 0.5}]):
        less = fitting(nodes, needs(cpus=4.0))
        assert worker_room(nodes, less, trials=1) >= 1, (nodes, less)
    assert fitting([{"CPU": 2.0}], needs()) == needs()
    assert fitting([{}], needs()) == needs()


def test_what_there_is_less_of_is_said() -> None:
    nodes = [{"CPU": 3.0}]
    config = SearchConfig(num_workers=8, concurrent_trials=4)
    lines = shortages(nodes, needs(trials=4), config)
    assert lines == [
        "the cluster has 3 CPUs and 0 GPUs: 2 workers instead of 8; more when it grows",
        "the cluster has 3 CPUs and 0 GPUs: 2 trials at once instead of 4",
    ]
    assert shortages([{"CPU": 64.0}], needs(trials=4), config) == []
    small = SearchConfig(num_workers=1, concurrent_trials=1)
    (line,) = shortages([{"CPU": 1.0}], fitting([{"CPU": 1.0}], needs(trials=1)), small)
    assert "a worker reserves 0.66 CPUs instead of 1, a trial 0.33" in line
