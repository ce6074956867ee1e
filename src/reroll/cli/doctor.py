"""`reroll doctor`: what this machine has, what is missing, and the command that fixes it."""

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
from reroll.cli.lines import hanging
from reroll.train.machine import cores


@dataclass(frozen=True)
class Doctor:
    """Check this machine, and say how to fix what is missing."""


class Check(NamedTuple):
    """One check: whether it passed, what was seen, and what to do if it did not pass."""

    name: str
    passed: bool
    text: str
    remedy: str = ""


EXTRAS = {
    "tiktoken": ("data", "GPT-2's tokenizer"),
    "tokenizers": ("data", "byte pairs of a text"),
    "matplotlib": ("plot", "figures"),
    "scipy": ("records", "p-values of records"),
    "triton": ("gpu", "noise and linear recurrences on a CUDA GPU"),
}


def run(command: str, arguments: Sequence[str]) -> int:
    parse(Doctor, arguments, "reroll doctor")
    for check in checks():
        print(hanging(f"{'ok  ' if check.passed else 'note'}  {check.name:<14} ", check.text))
        if not check.passed and check.remedy:
            print(hanging(f"      {'':<14} → ", check.remedy))
    return 0


def checks() -> list[Check]:
    """Return the results of all checks."""
    import torch

    from reroll.data.cache import cache_folder

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    free = shutil.disk_usage(".").free
    cache, asked = str(cache_folder()), os.environ.get("REROLL_CACHE")
    cached = asked is None or cache == os.path.expanduser(asked)
    extras = []
    for module, (extra, purpose) in EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        text = f"{module} is {'' if installed else 'not '}installed ({purpose})"
        extras.append(Check(f"extra {extra}", installed, text, f"pip install 'reroll[{extra}]'"))
    return [
        Check("python", sys.version_info >= (3, 11), platform.python_version(), "Install Python 3.11 or newer."),
        Check("torch", version >= (2, 9), torch.__version__, "pip install 'torch>=2.9'"),
        _gpu(),
        _kernels(),
        _threads(),
        Check("text cache", cached, cache, "REROLL_CACHE cannot be written: every run encodes its text anew."),
        Check("disk", free > 2**30, f"{free / 2**30:.1f} GiB free here", "Less than 1 GiB: runs may fail to save."),
        *extras,
    ]


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return Check("GPU", True, f"{torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB")
    built = torch.version.cuda
    if built is None:
        return Check("GPU", True, "none; this torch is built for the CPU, which is all that reroll needs")
    return Check("GPU", False, f"none that this torch (CUDA {built}) can use", "nvidia-smi shows driver and GPUs.")


def _kernels() -> Check:
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
        return Check(
            "cpu kernels", False, f"numba {numba.__version__} failed: {error}", "pip install -U numba llvmlite"
        )
    same = torch.equal(fast, slow)
    return Check(
        "cpu kernels", same, f"numba {numba.__version__}, {'same bits as' if same else 'NOT the bits of'} the reference"
    )


def _threads() -> Check:
    import torch

    available, used = cores(), torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > available / 2:
        busy = f"{used} of torch on {available} cores, which are busy (load {load:.1f})"
        return Check("threads", used == 1, busy, "--threads 1: torch's threads spin while waiting for one another")
    remedy = "unset OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "export OMP_NUM_THREADS=CORES"
    return Check("threads", used >= available, f"{used} of torch on {available} cores", remedy)
