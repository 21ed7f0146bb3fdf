"""What all tests share: properties are tried without a clock, for a busy machine makes an example late, not wrong."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("house", settings.get_profile("ci" if "CI" in os.environ else "default"), deadline=None)
settings.load_profile("house")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks on a busy machine: more threads would wait for each other."""
    import torch  # seconds, and for few files

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_of_torch() -> Iterator[None]:
    """One thread, and what a learner changes for its whole process is put back."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is such a place: for tests of many small files that sync, and not of syncing."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)
