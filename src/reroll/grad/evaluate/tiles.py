"""Evaluate probes with perturbed tiles of weights, generated when a product needs them and discarded after it.

Small weights are perturbed once per branch, in one half of the budget. What does not fit there comes in tiles (rows of
the matrix in the noise stream, which can be generated separately), one after the other in the other half:

    linear        W in blocks of rows, one block of outputs each
    embedding     only the rows that are looked up
    lstm_scan     groups of heads, each with all its time steps before the next
    anything else the whole tensor, for the duration of the operation

so perturbed weights never take more than the budget (8 MB, or 1 % of the weights) per worker, except for an operation
that needs a larger tensor whole.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reroll.grad.base import TILE_BYTES
from reroll.grad.evaluate.base import BranchByBranch, ProbeContext
from reroll.grad.evaluate.intercept import Intercept
from reroll.kernels import dispatch
from reroll.kernels.lstm_scan import lstm_scan
from reroll.kernels.lstm_scan.reference import gated
from reroll.kernels.noise_axpy import layout, noise_axpy, noise_axpy_rows


class Tiles(BranchByBranch):
    """Evaluate units without touching the weights. Several threads may call `losses` at once."""

    def __init__(self, probes: ProbeContext, budget: int = TILE_BYTES):
        super().__init__(probes)
        self.budget, self.thread = budget, threading.local()

    @contextmanager
    def branch(self, side: int, probe: int) -> Iterator[None]:
        if not hasattr(self.thread, "scratch"):
            self.thread.scratch = Scratch()
        largest = max(p.nbytes for p in self.probes.parameters.values())
        with ExitStack() as stack:
            stack.enter_context(Intercept(Perturbed(self.probes, side, probe, self.budget, self.thread.scratch)))
            if largest > self.budget // 2:
                # Torch's kernels for whole sequences need whole weights: loop over steps if one does not fit.
                for op in ("rnn", "gru"):
                    stack.enter_context(dispatch.use(op, "reference"))
            yield


class Scratch:
    """Memory of a thread, reused by its next branch: fresh pages would cost more than the noise."""

    def __init__(self) -> None:
        self.whole: dict[int, Tensor] = {}
        """For weights that are whole for the length of a branch, by `id`."""
        self.tiles: Tensor | None = None
        """For the current tiles, of whichever weight."""

    def tile(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for numbers `first` … `first + count` of the current tiles."""
        out = self.tiles
        if out is None or out.dtype != dtype or out.device != device or out.numel() < first + count:
            out = self.tiles = torch.empty(first + count, dtype=dtype, device=device)
        return out[first : first + count]

    def keep(self, p: Tensor, dtype: torch.dtype, in_use: Container[int], limit: int) -> Tensor:
        """Return memory for a whole weight; if need be, free that of weights this branch does not use."""
        out = self.whole.get(id(p))
        if out is None or out.dtype != dtype:
            out = self.whole[id(p)] = torch.empty(p.numel(), dtype=dtype, device=p.device)
            if sum(tensor.nbytes for tensor in self.whole.values()) > limit:
                self.whole = {i: tensor for i, tensor in self.whole.items() if i in in_use or i == id(p)}
        return out


class Perturbed:
    """The weights of one branch, θ ± ε z_k, as a source of copies and tiles for `Intercept`."""

    def __init__(self, probes: ProbeContext, side: int, probe: int, budget: int, scratch: Scratch):
        self.probes, self.side, self.probe, self.scratch = probes, side, probe, scratch
        self.room = budget // 2
        """Bytes for whole weights, and for the tiles that are needed at once."""
        self.names: dict[int, str | None] = {id(p): name for name, p in probes.parameters.items()}
        if probes.dtype is not None and probes.model is not None:
            # Weights that are not perturbed are still cast to the dtype of the branch.
            self.names = {id(p): None for p in probes.model.parameters()} | self.names
        self.ids = set(self.names)
        self.anywhere = {}
        self.rules = {functional.linear: self.linear, functional.embedding: self.embedding, lstm_scan: self.lstm_scan}
        self.copies: dict[int, Tensor] = {}
        self.copied_bytes = 0

    # ---- copies and tiles

    def tensor(self, p: Tensor) -> Tensor:
        """Return the whole perturbed tensor, stored for the rest of the branch if the budget allows."""
        if id(p) in self.copies:
            return self.copies[id(p)]
        dtype = self.probes.dtype_of(p)
        if not self.fits(p):
            return self._fill(p, 0, None, torch.empty(p.numel(), dtype=dtype, device=p.device)).view(p.shape)
        memory = self.scratch.keep(p, dtype, self.copies, self.room)
        self.copies[id(p)] = copy = self._fill(p, 0, None, memory).view(p.shape)
        self.copied_bytes += copy.nbytes
        return copy

    def rows(self, p: Tensor, begin: int, end: int, first: int = 0) -> Tensor:
        """Return rows of the perturbed tensor, as the matrix it is in the noise stream.

        The next rows, of any tensor, overwrite them in the same memory; rows that are needed at the same time as others
        go behind those, at number `first`.
        """
        count = (end - begin) * layout(p.shape)[1]
        return self._fill(p, begin, end, self.scratch.tile(first, count, self.probes.dtype_of(p), p.device))

    def _fill(self, p: Tensor, begin: int, end: int | None, memory: Tensor) -> Tensor:
        rows, columns = layout(p.shape)
        # A tensor that is one row of noise keeps its own rows, of which one may be an embedding's padding.
        source = p.detach().reshape(rows, columns)[begin:end] if rows > 1 else p.detach().contiguous()
        out = memory.view(source.shape)
        name = self.names[id(p)]
        if name is None:
            return out.copy_(source)
        alpha = self.probes.alpha(name, self.side)
        noise_axpy(source, self.probes.stream(name), [self.probe], [alpha], out=out, first_row=begin)
        return out

    def value(self, p: Any) -> Any:
        """Return what replaces an argument: a perturbed copy of a weight, anything else as it is."""
        return self.tensor(p) if id(p) in self.ids else p

    def fits(self, *tensors: Any) -> bool:
        """Whether these weights all fit whole."""
        missing = {
            id(p): p.numel() * self.probes.dtype_of(p).itemsize
            for p in tensors
            if id(p) in self.ids and id(p) not in self.copies
        }
        return self.copied_bytes + sum(missing.values()) <= self.room

    # ---- rules: functions computed tile by tile

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch.nn.functional.linear, in blocks of outputs if the weight does not fit."""
        outputs, columns = weight.shape
        bias = self.value(bias)
        input = input.to(self.probes.dtype_of(weight))
        if (name := self.names.get(id(weight))) is not None:
            alpha = self.probes.alpha(name, self.side)
            product = self.probes.noise.linear(input, weight, bias, self.probes.stream(name), self.probe, alpha)
            if product is not None:
                return product
        if id(weight) not in self.ids or self.fits(weight) or layout(weight.shape)[0] != outputs:
            return functional.linear(input, self.value(weight), bias)
        result = input.new_empty(*input.shape[:-1], outputs)
        step = max(1, self.room // (columns * input.element_size()))
        for begin in range(0, outputs, step):
            end = min(begin + step, outputs)
            part = None if bias is None else bias[begin:end]
            result[..., begin:end] = functional.linear(input, self.rows(weight, begin, end), part)
        return result

    def embedding(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """torch.nn.functional.embedding, of the rows that are looked up where those are fewer than all."""
        name = self.names.get(id(weight))
        few = input.numel() < weight.shape[0] or not self.fits(weight)
        # max_norm renormalises the weight in place; only a whole copy can take that.
        max_norm = kwargs.get("max_norm", args[1] if len(args) > 1 else None)
        if name is None or not few or id(weight) in self.copies or layout(weight.shape)[0] == 1 or max_norm is not None:
            return functional.embedding(input, self.value(weight), *args, **kwargs)
        out = torch.empty(*input.shape, weight.shape[1], dtype=self.probes.dtype_of(weight), device=weight.device)
        flat = out.view(-1, weight.shape[1])
        alpha = self.probes.alpha(name, self.side)
        noise_axpy_rows(weight, input.reshape(-1), self.probes.stream(name), self.probe, alpha, out=flat)
        return out

    def lstm_scan(
        self, inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """reroll.kernels.lstm_scan, one group of heads after another if the weights do not fit."""
        inputs, h, c = (self.value(t).to(self.probes.dtype_of(weight_hh)) for t in (inputs, h, c))
        bias = self.value(bias)
        if self.fits(weight_ih, weight_hh):
            return lstm_scan(inputs, self.value(weight_ih), self.value(weight_hh), bias, h, c)
        width = weight_hh.shape[1]
        heads, gates = h.shape[1] // width, 4 * width
        head_bytes = gates * (inputs.shape[2] + width) * inputs.element_size()
        group = min(heads, self.room // head_bytes)
        if group == 0:
            return self._lstm_by_steps(inputs, weight_ih, weight_hh, bias, h, c)
        parts = []
        for n in range(0, heads, group):
            rows, lanes = slice(n * gates, (n + group) * gates), slice(n * width, (n + group) * width)
            # The far end first: memory that grew for the second tile would exist twice.
            first = group * gates * weight_ih.shape[1]
            tile_hh = self._tile(weight_hh, rows, first)
            tile_ih = self._tile(weight_ih, rows)
            parts.append(lstm_scan(inputs, tile_ih, tile_hh, bias[rows], h[:, lanes], c[:, lanes]))
        outputs, last_h, last_c = (torch.cat(tensors, -1) for tensors in zip(*parts))
        return outputs, last_h, last_c

    def _tile(self, matrix: Tensor, rows: slice, first: int = 0) -> Tensor:
        """Rows of a matrix, perturbed if it is a weight; cut from a whole copy if it is one row of the noise stream."""
        if id(matrix) not in self.ids or layout(matrix.shape)[0] == 1:
            return self.value(matrix)[rows]
        return self.rows(matrix, rows.start, min(rows.stop, len(matrix)), first)

    def _lstm_by_steps(
        self, inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For heads that do not fit: the recurrent matrix is generated anew, in blocks of rows, at every step."""
        width = weight_hh.shape[1]
        heads, gates = h.shape[1] // width, 4 * width
        step = max(1, self.room // (width * inputs.element_size()))
        projected = self.linear(inputs, weight_ih, bias)
        outputs = []
        for u in projected.unbind(1):
            pre = u.clone()
            for n in range(heads):
                block = h[:, n * width : (n + 1) * width]
                for begin in range(n * gates, (n + 1) * gates, step):
                    rows = slice(begin, min(begin + step, (n + 1) * gates))
                    pre[:, rows] += block @ self._tile(weight_hh, rows).T
            h, c = (t.flatten(1) for t in gated(pre.view(-1, heads, gates), c.view(-1, heads, width)))
            outputs.append(h)
        return torch.stack(outputs, 1), h, c
