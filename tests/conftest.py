"""Fixtures of several test files."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Several workers, if there are (pytest-xdist), take files in the order of collection."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` a file is one worker's, and so is all of Slurm, which comes first as it takes longest."""
    for item in items:
        group = "slurm" if item.get_closest_marker("slurm") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


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
