"""The journal: every step of a run in a few hundred bytes, from which its weights can be made again without its data.

With gradients from probes the weights are a fold over records (step, key, ε, η, coefficients) from the initial weights.

    header    MAGIC, then a block of JSON: how the run was set up, checksum of the initial weights
    record    a block: step u64 · key 8 bytes · ε f64 · η f64 · loss f64 · N u32 · N coefficients f32
    block     length u32 · bytes · CRC-32 u32          all little-endian

Records are appended and flushed one by one, so a killed run leaves at most one torn record at the end, which is dropped
and said so. Anything else that does not check is an error.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reroll.errors import RunError
from reroll.keys import Key

MAGIC = b"reroll.journal.1\n"
REMEDY = "A journal cannot be mended; bring back a copy. Its checkpoints do without: reroll eval, sample and export."
_LENGTH, _CRC = struct.Struct("<I"), struct.Struct("<I")
_RECORD = struct.Struct("<Q8sdddI")


class Record(NamedTuple):
    """One step.

    Args:
        step: counted from 0.
        key: the key of its probes.
        epsilon: ε.
        lr: η.
        loss: the loss it saw.
        coefficients: c_k as applied (shaped, averaged, clipped), fp32.
    """

    step: int
    key: Key
    epsilon: float
    lr: float
    loss: float
    coefficients: Tensor


@dataclass(frozen=True)
class Journal:
    """A journal as it was read: its header, its whole records, and what was wrong with its end."""

    header: dict[str, Any]
    records: list[Record]
    torn_bytes: int
    end: int


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
    def append(cls, path: Path, steps: int) -> Writer:
        """Continue a journal after its first `steps` steps; later records are cut off."""
        journal = read(path)
        kept = [record for record in journal.records if record.step < steps]
        if len(kept) != steps:
            raise RunError(
                f"{path} has {len(kept)} of the {steps} steps the checkpoint has; it belongs to another run."
            )
        file = path.open("r+b")
        file.truncate(_end_of(path, len(kept)))
        file.seek(0, os.SEEK_END)
        return cls(file)

    def write(self, record: Record) -> None:
        """Append a record and flush it to the operating system."""
        coefficients = record.coefficients.numpy().astype("<f4")
        fixed = (record.step, record.key.digest, record.epsilon, record.lr, record.loss, len(coefficients))
        self.file.write(_block(_RECORD.pack(*fixed) + coefficients.tobytes()))
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
    """Read a journal.

    Raises:
        RunError: if it is missing, no journal, or damaged anywhere but at its end.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); only runs with gradients from probes keep one."
        ) from None
    if not data.startswith(MAGIC):
        raise RunError(f"{path} is no journal of this version of reroll.")
    blocks = list(_blocks(data, len(MAGIC)))
    if not blocks or blocks[0].bytes is None:
        raise RunError(f"{path} is damaged: its header does not check. {REMEDY}")
    contents = []
    for position, block in enumerate(blocks[1:], 1):
        if block.bytes is None:
            if position != len(blocks) - 1:
                which = f"record {position - 1} of {len(blocks) - 1}"
                raise RunError(f"{path} is damaged: {which} does not check. {REMEDY}")
            break
        contents.append(block.bytes)
    try:
        header = dict(json.loads(blocks[0].bytes))
        records = [_unpack(content) for content in contents]
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise RunError(f"{path} is whole, but not of this version of reroll ({error}).") from None
    torn = blocks[-1].bytes is None
    end = blocks[-1].begin if torn else len(data)
    return Journal(header, records, len(data) - end, end)


class _Found(NamedTuple):
    begin: int
    bytes: bytes | None  # None: torn, or its checksum is wrong


def _blocks(data: bytes, begin: int) -> Iterator[_Found]:
    while begin < len(data):
        if begin + _LENGTH.size > len(data):
            yield _Found(begin, None)
            return
        (length,) = _LENGTH.unpack_from(data, begin)
        first, last = begin + _LENGTH.size, begin + _LENGTH.size + length
        if last + _CRC.size > len(data):
            yield _Found(begin, None)
            return
        content = data[first:last]
        good = zlib.crc32(content) == _CRC.unpack_from(data, last)[0]
        yield _Found(begin, content if good else None)
        begin = last + _CRC.size


def _end_of(path: Path, records: int) -> int:
    """Where the record after the first `records` begins."""
    begins = [block.begin for block in _blocks(path.read_bytes(), len(MAGIC))]
    return begins[records + 1] if records + 1 < len(begins) else path.stat().st_size


def _block(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content + _CRC.pack(zlib.crc32(content))


def _unpack(content: bytes) -> Record:
    step, digest, epsilon, lr, loss, count = _RECORD.unpack_from(content)
    coefficients = np.frombuffer(content, "<f4", count, _RECORD.size).astype(np.float32)
    return Record(step, Key.from_bytes(digest), epsilon, lr, loss, torch.from_numpy(coefficients))
