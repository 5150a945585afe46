"""Fixtures of several test files."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SLURM = "test_slurm"  # begins the names of the files that use `cluster`


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`, a file is one worker's, and so are all that need the Slurm, of which there is one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return SLURM if SLURM in file else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a Slurm come first: of several workers one has them to itself, and they take longest."""
    items.sort(key=lambda item: SLURM not in item.path.name)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """What is tested sets the number of torch's threads; the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that was never trained."""
    from campaign_jobs import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    """A real Slurm: four nodes of eight GPU slots."""
    from slurm_cluster import Cluster, why_not

    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system as small as the test file's SMALL_DISK says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={request.module.SMALL_DISK}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
