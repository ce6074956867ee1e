"""Runs made once by the command line, and the command line itself."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from reroll.cli import main
from tests.cli import TRAIN, Result


def _trained(folder, *arguments):
    """The folder of a new run. Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*arguments, "--run-dir", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a run of the recipe `smoke` as it is; to be read."""
    return _trained(tmp_path_factory.mktemp("runs") / "smoke", "train", "smoke")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a finished tiny run; to be read."""
    return _trained(tmp_path_factory.mktemp("runs") / "run", *TRAIN)


@pytest.fixture
def run(tiny, tmp_path):
    """The same to be changed: `run` in the folder where `cli` is called."""
    return Path(shutil.copytree(tiny, tmp_path / "run"))


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Call the command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def little_room(tmp_path, monkeypatch):
    """An empty folder, one thread, and memory that ends in an error rather than with the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    if sys.platform != "linux":
        yield tmp_path
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, limits)
