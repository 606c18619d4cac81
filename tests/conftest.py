"""What every test shares: one thread, reproducible property tests, and the way to the real data."""

import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Linear algebra on a busy two-core machine has no steady pace, so a deadline would only flake.
settings.register_profile("stiefel", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("stiefel")


@pytest.fixture(scope="session", autouse=True)
def _interrupted_as_in_a_terminal():
    # A process started in the background ignores SIGINT from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: `STIEFEL_DATA`, or `shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("STIEFEL_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not at hand in {folder}; set STIEFEL_DATA")
    return folder


@pytest.fixture(scope="session")
def cifar_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images a class of CIFAR-10 (JPEG), laid out as `train/<class>` and `test/<class>`."""
    archive = shared_data / "cifar10-jpeg.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} not at hand")
    folder = tmp_path_factory.mktemp("cifar10")
    quota = {"train": 40, "test": 40}
    taken: dict[Path, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            place = Path(member.name)
            group = place.parent
            if not member.isfile() or taken.get(group, 0) >= quota.get(group.parent.name, 0):
                continue
            tar.extract(member, folder, filter="data")
            taken[group] = taken.get(group, 0) + 1
    return folder
