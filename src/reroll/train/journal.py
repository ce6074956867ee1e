"""The journal: every step of a run in a few hundred bytes, from which its weights can be rebuilt without its data.

With gradients from probes the weights are a fold over records (loss, settings, terms) from the initial weights.

    journal    MAGIC, a block of JSON (the header: run, config, checksum of the initial weights …), a block per step
    block      length u32 · CRC-32 of the content u32 · CRC-32 of these eight bytes u32 · content
    content    sections: tag u32 · length u32 · bytes                                    all little-endian

    tag 1      step u64 · loss f64
    tag 2      lr f64 · momentum f64 · ε f64                                             NaN: the step has none
    tag 3      key 8 bytes · first probe u64 · coefficients f32 …                        a term; repeated

A skipped step has no terms. An unknown tag of 2³¹ or more is ignored, any other is refused. A killed run leaves at most
one incomplete record at the end, which is dropped; a bad block before the end is damage, reported by its step.
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
REMEDY = "Restore a copy of it. The checkpoints do not need a journal: reroll eval, sample and export work."
STEP, SETTINGS, TERM, OPTIONAL = 1, 2, 3, 1 << 31
_HEAD, _SECTION = struct.Struct("<III"), struct.Struct("<II")
_STEP, _SETTINGS, _TERM = struct.Struct("<Qd"), struct.Struct("<ddd"), struct.Struct("<8sQ")


class Record(NamedTuple):
    """One step: its number from 0, its loss, its settings, and the terms of its gradient."""

    step: int
    loss: float
    settings: StepSettings
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Journal:
    """A journal without its records.

    Args:
        path: the file.
        header: how the run was set up.
        offsets: where each record starts, and where the last one before any damage ends.
        torn: bytes of an incomplete last record.
        damage: the message about a bad block after the last offset; None if there is none.
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

    def iterate(self, from_step: int = 0, to: int | None = None) -> Iterator[Record]:
        """Yield the records of steps `from_step` to `to`, exclusive; one is in memory at a time."""
        with self.path.open("rb") as file:
            for step in range(from_step, self.steps if to is None else to):
                start, end = self.offsets[step : step + 2]
                file.seek(start + _HEAD.size)
                try:
                    record = _unpack(file.read(end - start - _HEAD.size))
                except (ValueError, struct.error) as error:
                    raise RunError(f"{self.path} is from another version of reroll (step {step}: {error}).") from None
                if record.step != step:
                    raise RunError(f"{self.path} is damaged at step {step}: its record is that of step {record.step}.")
                yield record


class Writer:
    """Appends records to a journal. Open with `create` or `append`."""

    def __init__(self, file: BinaryIO):
        self.file = file

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Writer:
        """Start a journal."""
        file = path.open("wb")
        file.write(MAGIC + _block(json.dumps(header, sort_keys=True).encode()))
        file.flush()
        return cls(file)

    @classmethod
    def append(cls, journal: Journal, steps: int) -> Writer:
        """Continue a journal after its first `steps` steps; later records are cut off.

        Raises:
            RunError: if it has fewer, naming its damage if that is why.
        """
        if steps > journal.steps:
            raise RunError(
                journal.damage
                or f"{journal.path} has only {journal.steps} of the checkpoint's {steps} steps. Restore a copy of it, "
                f"or move the checkpoints after step {journal.steps} elsewhere, to resume from an earlier one."
            )
        file = journal.path.open("r+b")
        file.truncate(journal.offsets[steps])
        file.seek(0, os.SEEK_END)
        return cls(file)

    def write(self, record: Record) -> None:
        """Append a record and flush it to the operating system."""
        self.file.write(_block(_pack(record)))
        self.file.flush()

    def sync(self) -> None:
        """Wait until everything is on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write everything to disk and close the file."""
        self.sync()
        self.file.close()


class _BadBlock(Exception):
    """A block before the end of the file does not match its checksum."""


def read(path: Path) -> Journal:
    """Read the header of a journal, and check every record.

    Raises:
        RunError: if it is missing, not a journal of this version, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); only runs with gradients from probes write a journal."
        ) from None


def _read(path: Path, file: BinaryIO) -> Journal:
    size, magic = os.fstat(file.fileno()).st_size, file.read(len(MAGIC))
    if magic != MAGIC:
        version = magic.removeprefix(NAME).strip().decode("ascii", "replace") if magic.startswith(NAME) else None
        what = f"of version {version}; this reroll reads version {VERSION.decode().strip()}" if version else "not one"
        raise RunError(f"{path} cannot be read as a journal: it is {what}. {REMEDY}")
    try:
        header = dict(json.loads(_content(file, size) or b""))
    except (_BadBlock, ValueError, TypeError):
        raise RunError(f"{path} is damaged: its header does not match its checksum. {REMEDY}") from None
    offsets, damage = array("Q", [file.tell()]), None
    try:
        while _content(file, size) is not None:
            offsets.append(file.tell())
    except _BadBlock:
        step = len(offsets) - 1
        before = f" Earlier steps are intact: reroll replay {path.parent} --to {step} rebuilds their weights."
        damage = f"{path} is damaged at step {step}: its record is corrupt.{before if step else ''} {REMEDY}"
    return Journal(path, header, offsets, 0 if damage else size - offsets[-1], damage)


def _content(file: BinaryIO, size: int) -> bytes | None:
    """Return the content of the next block; None at the end, and for an incomplete last block."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    length, check, own = _HEAD.unpack(head)
    if zlib.crc32(head[:8]) != own:
        # After a power failure a file can have its new size but not its new bytes: zeros.
        if any(head) or any(file.read()):
            raise _BadBlock
        return None
    content = file.read(length)
    if len(content) == length and zlib.crc32(content) == check:
        return content
    if file.tell() < size:
        raise _BadBlock
    return None


def _block(content: bytes) -> bytes:
    front = struct.pack("<II", len(content), zlib.crc32(content))
    return front + struct.pack("<I", zlib.crc32(front)) + content


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
