"""The journal: every byte of it can be lost from the end, and none from the middle."""

import pytest
import torch

from reroll.errors import RunError
from reroll.keys import Key
from reroll.train.journal import MAGIC, Record, Writer, read

HEADER = {"initial": "abc", "sizes": {"vocab": 3}}


def record(step, count=5):
    values = torch.randn(count, generator=torch.Generator().manual_seed(step))
    return Record(step, Key(0).at(step), 0.01 * step, 0.1, 2.5 - step, values)


@pytest.fixture
def path(tmp_path):
    writer = Writer.create(tmp_path / "journal", HEADER)
    for step in range(4):
        writer.write(record(step))
    writer.close()
    return tmp_path / "journal"


def same(a, b):
    return a[:5] == b[:5] and torch.equal(a.coefficients, b.coefficients)


def test_round_trip(path):
    journal = read(path)
    assert journal.header == HEADER
    assert all(same(a, record(step)) for step, a in enumerate(journal.records))
    assert journal.torn_bytes == 0


def test_a_torn_end_is_dropped_wherever_it_is_torn(path):
    whole = path.read_bytes()
    borders = []  # sizes of the journal with 0 … 4 records
    for steps in range(5):
        Writer.append(path, steps).close()
        borders.append(path.stat().st_size)
        path.write_bytes(whole)
    assert borders[-1] == len(whole)
    for size in range(borders[0], len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = read(path)
        kept = sum(border <= size for border in borders) - 1
        assert len(journal.records) == kept
        assert all(same(a, record(step)) for step, a in enumerate(journal.records))
        assert journal.end == borders[kept]
        assert journal.torn_bytes == size - borders[kept]


@pytest.mark.parametrize("where", ["header", "middle"])
def test_damage_elsewhere_is_an_error(path, where):
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 10 if where == "header" else len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(RunError, match="does not check"):
        read(path)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "journal"
    for content in (b"", b"\x80\x04pickle", b"reroll.journal.9\n1234", MAGIC):
        file.write_bytes(content)
        with pytest.raises(RunError):
            read(file)
    with pytest.raises(RunError, match="only runs with gradients from probes"):
        read(tmp_path / "nothing")


def test_appending_cuts_what_comes_after(path):
    writer = Writer.append(path, 2)
    writer.write(record(2, count=9))
    writer.close()
    records = read(path).records
    assert [r.step for r in records] == [0, 1, 2]
    assert len(records[2].coefficients) == 9
    with pytest.raises(RunError, match="has 3 of the 7 steps"):
        Writer.append(path, 7)


def test_records_reach_the_file_one_by_one(tmp_path):
    writer = Writer.create(tmp_path / "journal", HEADER)
    for step in range(3):
        writer.write(record(step))
        assert len(read(tmp_path / "journal").records) == step + 1
    writer.close()
