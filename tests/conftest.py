"""Fixtures of the whole test run: one Ray for all tests that need it."""

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from simulated_cuda import simulated_cuda

torch.set_num_threads(1)


TESTS = Path(__file__).parent
FOLDERS = (TESTS, *(path for path in TESTS.iterdir() if path.is_dir()))
"""Where Ray's processes find what tests define themselves."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulated-cuda", action="store_true", help="run tests on a CUDA device that is not there"
    )


@pytest.fixture(scope="session", autouse=True)
def _device_of_the_run(request: pytest.FixtureRequest) -> Iterator[None]:
    with simulated_cuda() if request.config.getoption("simulated_cuda") else nullcontext():
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of four logical CPUs, shared by the run; tests free what they reserve."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        # actors import what tests define beside themselves (fake_engine, zoo)
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}},
    )
    yield
    ray.shutdown()
