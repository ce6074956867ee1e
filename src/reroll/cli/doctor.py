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


@dataclass(frozen=True)
class Doctor:
    pass


class Finding(NamedTuple):
    """One thing looked at: whether it is well, what was found, and what to do if not."""

    name: str
    well: bool
    found: str
    remedy: str = ""


EXTRAS = {
    "tiktoken": ("data", "GPT-2's tokenizer"),
    "matplotlib": ("plot", "figures"),
    "triton": ("gpu", "noise and linear recurrences on a CUDA card"),
}


def run(command: str, arguments: Sequence[str]) -> int:
    parse(Doctor, arguments, "reroll doctor", "Look at this machine, and say how to mend what is missing.")
    findings = examine()
    for finding in findings:
        mark = "ok  " if finding.well else "note"
        print(f"{mark}  {finding.name:<14} {finding.found}")
        if not finding.well and finding.remedy:
            print(f"      {'':<14} → {finding.remedy}")
    return 0


def examine() -> list[Finding]:
    """Return all findings."""
    return [_python(), _torch(), _card(), _kernels(), _threads(), _cache(), _disk(), *_extras()]


def _python() -> Finding:
    well = sys.version_info >= (3, 11)
    return Finding("python", well, platform.python_version(), "reroll needs Python 3.11 or newer.")


def _torch() -> Finding:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return Finding("torch", version >= (2, 9), torch.__version__, "pip install 'torch>=2.9'")


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

    from reroll.train.machine import cores

    available, used = cores(), torch.get_num_threads()
    remedy = "unset OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "export OMP_NUM_THREADS=CORES"
    return Finding("threads", used >= available, f"{used} of torch on {available} cores", remedy)


def _cache() -> Finding:
    from reroll.data.cache import cache_folder

    folder = cache_folder()
    wished = os.environ.get("REROLL_CACHE")
    well = wished is None or str(folder) == os.path.expanduser(wished)
    return Finding("text cache", well, str(folder), "REROLL_CACHE cannot be written; texts are encoded for every run.")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding("disk", free > 2**30, f"{free / 2**30:.1f} GiB free here", "Less than 1 GiB: runs may not be saved.")


def _extras() -> list[Finding]:
    found = []
    for module, (extra, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        text = f"{module} is {'there' if there else 'not installed'} ({purpose})"
        found.append(Finding(f"extra {extra}", there, text, f"pip install 'reroll[{extra}]'"))
    return found
