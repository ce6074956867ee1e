"""`reroll doctor`: what this machine has, what it lacks, and the line that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reroll.cli.flags import parse
from reroll.train.machine import cores


@dataclass(frozen=True)
class Doctor:
    pass


class Finding(NamedTuple):
    """One thing looked at: whether it is well, in words, and what to do if not."""

    name: str
    well: bool
    words: str
    remedy: str = ""


EXTRAS = {
    "tiktoken": ("data", "GPT-2's tokenizer"),
    "matplotlib": ("plot", "figures"),
    "triton": ("gpu", "noise and linear recurrences on a CUDA card"),
}


def run(command: str, arguments: Sequence[str]) -> int:
    parse(Doctor, arguments, "reroll doctor", "Look at this machine, and say how to mend what is missing.")
    for finding in examine():
        print(f"{'ok  ' if finding.well else 'note'}  {finding.name:<14} {finding.words}")
        if not finding.well and finding.remedy:
            print(f"      {'':<14} → {finding.remedy}")
    return 0


def examine() -> list[Finding]:
    """Return all findings."""
    import torch

    from reroll.data.cache import cache_folder

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    free = shutil.disk_usage(".").free
    cache, wished = str(cache_folder()), os.environ.get("REROLL_CACHE")
    cached = wished is None or cache == os.path.expanduser(wished)
    extras = []
    for module, (extra, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        words = f"{module} is {'there' if there else 'not installed'} ({purpose})"
        extras.append(Finding(f"extra {extra}", there, words, f"pip install 'reroll[{extra}]'"))
    return [
        Finding("python", sys.version_info >= (3, 11), platform.python_version(), "Install Python 3.11 or newer."),
        Finding("torch", version >= (2, 9), torch.__version__, "pip install 'torch>=2.9'"),
        _card(),
        _kernels(),
        _threads(),
        Finding("text cache", cached, cache, "REROLL_CACHE cannot be written; texts are encoded for every run."),
        Finding("disk", free > 2**30, f"{free / 2**30:.1f} GiB free here", "Less than 1 GiB: runs may not be saved."),
        *extras,
    ]


def _card() -> Finding:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return Finding("card", True, f"{torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB")
    built = torch.version.cuda
    if built is None:
        return Finding("card", True, "none; this torch is built for the CPU, which is all that reroll needs")
    return Finding("card", False, f"none that this torch (CUDA {built}) can use", "nvidia-smi shows driver and cards.")


def _kernels() -> Finding:
    import numba
    import torch

    from reroll.kernels import dispatch
    from reroll.kernels.noise_axpy import noise
    from reroll.keys import Key

    try:
        with dispatch.use("noise_axpy", "cpu"):
            fast = noise(Key(0), (5, 200), 3, "doctor")
        with dispatch.use("noise_axpy", "reference"):
            slow = noise(Key(0), (5, 200), 3, "doctor")
    except Exception as error:
        return Finding(
            "cpu kernels", False, f"numba {numba.__version__} failed: {error}", "pip install -U numba llvmlite"
        )
    same = torch.equal(fast, slow)
    return Finding("cpu kernels", same, f"numba {numba.__version__}, {'same bits as' if same else 'NOT'} the reference")


def _threads() -> Finding:
    import torch

    available, used = cores(), torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > available / 2:
        busy = f"{used} of torch on {available} cores, which others use too (load {load:.1f})"
        return Finding("threads", used == 1, busy, "--threads 1: torch's threads spin while they wait for one another")
    remedy = "unset OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "export OMP_NUM_THREADS=CORES"
    return Finding("threads", used >= available, f"{used} of torch on {available} cores", remedy)
