"""The journal: every step of a run in a few hundred bytes, from which its weights can be made again without its data.

With gradients from probes the weights are a fold over records (loss, settings, terms) from the initial weights.

    journal    MAGIC, a block of JSON (the header: run, config, checksum of the initial weights …), a block per step
    block      length u32 · CRC-32 of the content u32 · CRC-32 of these eight bytes u32 · content
    content    sections: tag u32 · length u32 · bytes                                    all little-endian

    tag 1      step u64 · loss f64
    tag 2      lr f64 · momentum f64 · ε f64                                             NaN: the step has none
    tag 3      key 8 bytes · first probe u64 · coefficients f32 …                        a term; repeated

A step that was not taken has no terms. A tag from 2³¹ on may be passed over by whoever does not know it; any other that
is unknown is refused. Contents are read one at a time, and their offsets are found from the lengths alone.

Records are appended and flushed one by one, so a killed run leaves at most one torn record at the end, which is dropped
and said so. What does not check before it is damage, and reported with its step; the steps before it are whole.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from reroll.errors import RunError
from reroll.grad.base import Term
from reroll.keys import Key
from reroll.optim import StepSettings

NAME, VERSION = b"reroll.journal.", b"2\n"
MAGIC = NAME + VERSION
REMEDY = "Bring back a copy of it. Checkpoints do without a journal: reroll eval, sample and export."
_HEAD, _SECTION = struct.Struct("<III"), struct.Struct("<II")
_STEP, _SETTINGS, _TERM = struct.Struct("<Qd"), struct.Struct("<ddd"), struct.Struct("<8sQ")
STEP, SETTINGS, TERM, OPTIONAL = 1, 2, 3, 1 << 31


class Record(NamedTuple):
    """One step.

    Args:
        step: counted from 0.
        loss: the loss it saw.
        settings: η, μ and ε of the step.
        terms: of its gradient; none if it was not finite, and the step not taken.
    """

    step: int
    loss: float
    settings: StepSettings
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Journal:
    """What is known of a journal without its records.

    Args:
        path: the file.
        header: how the run was set up.
        offsets: where each record begins, and where the last of those before any damage ends.
        torn: bytes of a last record that was not written to its end.
        damage: what does not check behind the last offset; None if nothing.
    """

    path: Path
    header: dict[str, Any]
    offsets: array[int]
    torn: int = 0
    damage: str | None = None

    @property
    def steps(self) -> int:
        """Records before any damage."""
        return len(self.offsets) - 1

    def require(self, steps: int) -> None:
        """Raise `RunError` unless the journal has so many steps, naming its damage if that is why."""
        if steps > self.steps:
            raise RunError(
                self.damage
                or f"{self.path} has {self.steps} of the {steps} steps the checkpoint has. Bring back a copy of it, or "
                f"move the checkpoints of later steps than {self.steps} elsewhere: an earlier one is then gone on from."
            )

    def iterate(self, from_step: int = 0, to: int | None = None) -> Iterator[Record]:
        """Yield the records of the steps from `from_step` up to, without, `to`; one is in memory at a time.

        Raises:
            RunError: at a record that is damaged or not of this version.
        """
        for step, content in self.contents(from_step, self.steps if to is None else to):
            try:
                record = _unpack(content)
            except (ValueError, struct.error) as error:
                raise RunError(
                    f"the journal {self.path} is not of this version of reroll (step {step}: {error})."
                ) from None
            if record.step != step:
                raise RunError(_damaged(self.path, step))
            yield record

    def contents(self, from_step: int, to: int) -> Iterator[tuple[int, bytes]]:
        """Yield (step, bytes) of records, checked but not unpacked."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[from_step])
            for step in range(from_step, to):
                try:
                    content = _content(file, self.offsets[-1])
                except _DoesNotCheck:
                    content = None
                if content is None:
                    raise RunError(_damaged(self.path, step))
                yield step, content


class Writer:
    """Appends records to a journal. Open with `create` or `append`."""

    def __init__(self, file: BinaryIO):
        self.file = file

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Writer:
        """Begin a journal."""
        file = path.open("wb")
        file.write(MAGIC + _block(json.dumps(header, sort_keys=True).encode()))
        file.flush()
        return cls(file)

    @classmethod
    def append(cls, journal: Journal, steps: int) -> Writer:
        """Continue a journal after its first `steps` steps, which are checked; later records are cut off.

        Raises:
            RunError: if one of them is damaged or missing.
        """
        journal.require(steps)
        for _ in journal.contents(0, steps):
            pass
        file = journal.path.open("r+b")
        file.truncate(journal.offsets[steps])
        file.seek(0, os.SEEK_END)
        return cls(file)

    def write(self, record: Record) -> None:
        """Append a record and flush it to the operating system."""
        self.file.write(_block(_pack(record)))
        self.file.flush()

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write everything to the disk and close the file."""
        self.sync()
        self.file.close()


def read(path: Path) -> Journal:
    """Read the header of a journal and where its records are.

    Raises:
        RunError: if it is missing, no journal of this version, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _read(path, file, size)
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); only runs with gradients from probes keep a journal."
        ) from None


class _DoesNotCheck(Exception):
    """Bytes that are all there are not those that were written."""


def _read(path: Path, file: BinaryIO, size: int) -> Journal:
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        version = magic.removeprefix(NAME).strip().decode("ascii", "replace") if magic.startswith(NAME) else None
        what = f"a journal of version {version}; this reroll reads {VERSION.decode().strip()}" if version else "none"
        raise RunError(f"{path} is no journal that can be read: it is {what}. {REMEDY}")
    try:
        content = _content(file, size)
        if content is None:
            raise _DoesNotCheck
        header = dict(json.loads(content))
    except _DoesNotCheck:
        raise RunError(f"{path} is damaged: its header does not check. {REMEDY}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is whole, but not of this version of reroll ({error}).") from None
    offsets, damage = array("Q", [file.tell()]), None
    while offsets[-1] < size:
        file.seek(offsets[-1])
        try:
            head = _head(file, size)
        except _DoesNotCheck:
            damage = _damaged(path, len(offsets) - 1)
            break
        if head is None or (file.tell() + head[0] == size and zlib.crc32(file.read()) != head[1]):
            break
        offsets.append(offsets[-1] + _HEAD.size + head[0])
    return Journal(path, header, offsets, 0 if damage else size - offsets[-1], damage)


def _head(file: BinaryIO, size: int) -> tuple[int, int] | None:
    """Length and checksum of the next content; None if it is not all there."""
    raw = file.read(_HEAD.size)
    if len(raw) < _HEAD.size:
        return None
    length, check, own = _HEAD.unpack(raw)
    if zlib.crc32(raw[:8]) != own:
        # When the power fails, a file can have its new size before its new bytes: zeros.
        if any(raw) or any(file.read()):
            raise _DoesNotCheck
        return None
    return (length, check) if file.tell() + length <= size else None


def _content(file: BinaryIO, size: int) -> bytes | None:
    """The next content; None if it is not all there."""
    head = _head(file, size)
    if head is None:
        return None
    content = file.read(head[0])
    if zlib.crc32(content) != head[1]:
        raise _DoesNotCheck
    return content


def _block(content: bytes) -> bytes:
    front = struct.pack("<II", len(content), zlib.crc32(content))
    return front + struct.pack("<I", zlib.crc32(front)) + content


def _damaged(path: Path, step: int) -> str:
    before = f" Steps before it are whole: reroll replay {path.parent} --to {step} makes their weights." if step else ""
    return f"{path} is damaged at step {step}: its record does not check.{before} {REMEDY}"


def _pack(record: Record) -> bytes:
    numbers = (record.settings.lr, record.settings.momentum, record.settings.epsilon)
    sections = [(STEP, _STEP.pack(record.step, record.loss))]
    sections += [(SETTINGS, _SETTINGS.pack(*(math.nan if value is None else value for value in numbers)))]
    for key, first, coefficients in record.terms:
        sections += [(TERM, _TERM.pack(key.digest, first) + coefficients.numpy().astype("<f4").tobytes())]
    return b"".join(_SECTION.pack(tag, len(content)) + content for tag, content in sections)


def _unpack(content: bytes) -> Record:
    step, loss, settings, terms, at = -1, math.nan, StepSettings(math.nan), [], 0
    while at < len(content):
        tag, length = _SECTION.unpack_from(content, at)
        at += _SECTION.size + length
        section = content[at - length : at]
        if tag == STEP:
            step, loss = _STEP.unpack(section)
        elif tag == SETTINGS:
            lr, *others = _SETTINGS.unpack(section)
            settings = StepSettings(lr, *(None if math.isnan(value) else value for value in others))
        elif tag == TERM:
            digest, first = _TERM.unpack_from(section)
            coefficients = np.frombuffer(section, "<f4", offset=_TERM.size).astype(np.float32)
            terms.append(Term(Key.from_bytes(digest), first, torch.from_numpy(coefficients)))
        elif tag < OPTIONAL:
            raise ValueError(f"a section with the unknown tag {tag}")
    return Record(step, loss, settings, tuple(terms))
