"""The journal: every byte of it can be lost from the end, and none from the middle."""

import struct

import pytest
import torch

from reroll.errors import RunError
from reroll.keys import Key
from reroll.optim import StepSettings
from reroll.train import journal
from reroll.train.journal import MAGIC, Record, Term, Writer, read

HEADER = {"initial": "abc", "sizes": {"vocab": 3}}
SETTINGS = [StepSettings(0.1), StepSettings(0.2, epsilon=0.01), StepSettings(0.3, 0.9, 0.02), StepSettings(0.4, 0.8)]


def record(step, counts=(5, 2)):
    generator = torch.Generator().manual_seed(step)
    terms = [Term(Key(i).at(step), 7 * i, torch.randn(n, generator=generator)) for i, n in enumerate(counts)]
    return Record(step, 2.5 - step, SETTINGS[step % 4], tuple(terms[: step % 3]))  # none, one, two


@pytest.fixture
def path(tmp_path):
    writer = Writer.create(tmp_path / "journal", HEADER)
    for step in range(4):
        writer.write(record(step))
    writer.close()
    return tmp_path / "journal"


def same(a, b):
    terms = [(x[:2], x[2].tolist()) for x in a.terms], [(x[:2], x[2].tolist()) for x in b.terms]
    return a[:3] == b[:3] and terms[0] == terms[1]


def test_round_trip_from_any_step(path):
    found = read(path)
    assert (found.header, found.steps, found.torn, found.damage) == (HEADER, 4, 0, None)
    for first in range(5):
        records = list(found.iterate(first))
        assert [r.step for r in records] == list(range(first, 4))
        assert all(same(a, record(a.step)) for a in records)
    assert [r.step for r in found.iterate(1, to=3)] == [1, 2]


def test_the_bytes_are_as_documented(path):
    data, offsets = path.read_bytes(), read(path).offsets
    _, key, coefficients = 0, Key(0).at(1), record(1).terms[0].coefficients
    content = struct.pack("<IIQd", 1, 16, 1, 1.5) + struct.pack("<IIddd", 2, 24, 0.2, float("nan"), 0.01)
    content += struct.pack("<II8sQ5f", 3, 36, key.digest, 0, *coefficients.tolist())
    assert data[offsets[1] + 12 : offsets[2]] == content


def test_a_torn_end_is_dropped_wherever_it_is_torn(path):
    whole, offsets = path.read_bytes(), list(read(path).offsets)
    assert offsets[-1] == len(whole)
    for size in range(offsets[0], len(whole) + 1):
        for tail in (b"", bytes(30)):  # a file may have been longer before its bytes reached the disk
            path.write_bytes(whole[:size] + (tail if size in offsets else b""))
            found = read(path)
            steps = sum(border <= size for border in offsets) - 1
            assert (found.steps, found.damage) == (steps, None)
            assert all(same(a, record(a.step)) for a in found.iterate())
            assert found.torn == path.stat().st_size - offsets[steps]


def test_any_flipped_bit_is_reported_with_its_step_and_what_is_before_it_is_whole(path):
    whole, offsets = path.read_bytes(), list(read(path).offsets)
    for at in range(offsets[0], offsets[3]):  # of the last record it could be a torn end
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        step = sum(border <= at for border in offsets) - 1
        found = read(path)
        assert found.steps == step
        assert f"damaged at step {step}: " in found.damage
        assert all(same(a, record(a.step)) for a in found.iterate())
        with pytest.raises(RunError, match=f"damaged at step {step}"):
            Writer.append(found, 4)
        Writer.append(found, step).close()
        assert path.read_bytes() == whole[: offsets[step]]


def test_sections_of_later_versions(path):
    more = struct.pack("<II", 1 << 31, 3) + b"abc"
    for extra, known in ((more, True), (struct.pack("<II", 9, 0), False)):
        content = journal._pack(record(4)) + extra
        Writer.append(read(path), 4).close()
        with path.open("ab") as file:
            file.write(journal._block(content))
        if known:
            assert same(list(read(path).iterate())[4], record(4))
        else:
            with pytest.raises(RunError, match="unknown tag 9"):
                list(read(path).iterate())


def test_a_damaged_header_is_an_error(path):
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 20] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(RunError, match="its header does not match"):
        read(path)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "journal"
    for content, said in (
        (b"", "not one"), (b"\x80\x04pickle", "not one"), (b"reroll.journal.1\n1234", "version 1; .* reads version 2"),
        (MAGIC, "header"),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(RunError, match=said):
            read(file)
    with pytest.raises(RunError, match="only runs with gradients from probes"):
        read(tmp_path / "nothing")


def test_appending_cuts_what_comes_after(path):
    writer = Writer.append(read(path), 2)
    writer.write(record(2, counts=(9, 1)))
    writer.close()
    records = list(read(path).iterate())
    assert [r.step for r in records] == [0, 1, 2]
    assert len(records[2].terms[0].coefficients) == 9
    with pytest.raises(RunError, match="has only 3 of the checkpoint's 7 steps"):
        Writer.append(read(path), 7)


def test_records_reach_the_file_one_by_one(tmp_path):
    writer = Writer.create(tmp_path / "journal", HEADER)
    for step in range(3):
        writer.write(record(step))
        assert read(tmp_path / "journal").steps == step + 1
    writer.close()


def test_a_record_of_another_step_is_damage(tmp_path):
    writer = Writer.create(tmp_path / "journal", HEADER)
    for step in (0, 1, 1, 3):
        writer.write(record(step))
    writer.close()
    with pytest.raises(RunError, match="damaged at step 2: its record is that of step 1"):
        list(read(tmp_path / "journal").iterate())
