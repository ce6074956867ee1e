"""Who evaluates the units of a step: a function from an evaluator and units to results, in the order of the units.

    Execute = (evaluator, units) → results

Everything around it is a function of all results in that order, so it never matters who computed which: threads of this
process (`threads`, the default), or the ranks of a mesh.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from reroll.grad.evaluate.probing import Evaluator, Result, Unit
from reroll.kernels.threads import pool, torch_threads

Execute = Callable[[Evaluator, Sequence[Unit]], list[Result]]


def threads(workers: int, each: int) -> Execute:
    """Return the executor of this process.

    Args:
        workers: units evaluated at the same time.
        each: torch's threads for one of them.
    """

    def execute(evaluator: Evaluator, units: Sequence[Unit]) -> list[Result]:
        precision = _precision()

        def one(unit: Unit) -> Result:
            with torch.no_grad(), _autocast(precision):
                return evaluator.losses(unit)

        if workers > 1:
            # Each unit runs in a copy of this context, so that a forced implementation holds in the workers too.
            shared = pool(workers, each)
            futures = [shared.submit(contextvars.copy_context().run, one, unit) for unit in units]
            return [future.result() for future in futures]
        with torch_threads(each):
            return [one(unit) for unit in units]

    return execute


def _precision() -> list[tuple[str, torch.dtype]]:
    """The kinds of device that autocast is on for in this thread, and to which dtype."""
    return [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


@contextmanager
def _autocast(precision: list[tuple[str, torch.dtype]]) -> Iterator[None]:
    """Autocast as in the thread that asked, without its cache of cast weights: those of a branch hold for no other."""
    with ExitStack() as stack:
        for kind, dtype in precision:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
        yield
