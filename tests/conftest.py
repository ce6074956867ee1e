"""Strict settings for every test: warnings are errors (pyproject.toml), and memory nobody wrote is NaN."""

import atexit
import logging
import os
import shutil
import tempfile

import pytest

# Workers beside each other (pytest -n) share the cores: two that spin on two threads each take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import hypothesis
import torch

# A busy machine generates inputs slowly; that is no fault of the code.
hypothesis.settings.register_profile("reroll", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("reroll")

CUDA = torch.cuda.is_available()
if not CUDA:  # must be set before triton is imported: its kernels then run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Encoded texts go to a folder of this run, not to the user's cache.
CACHE = tempfile.mkdtemp(prefix="reroll-tests-")
os.environ["REROLL_CACHE"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

logging.getLogger("reroll.kernels.jit").setLevel(logging.ERROR)  # what a test sees is the same with kernels kept or not

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def _global_generator_is_seeded():
    """torch's own initialisers draw from the global generator; each test starts from the same state of it."""
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _output_has_no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it


@pytest.fixture(autouse=True)
def _threads_are_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_steps(monkeypatch):
    """One thread, which is faster for the smallest models, and no waiting for a disk that no test takes away."""
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
