"""Thousands of damaged and foreign files; what must hold is said in `test_fuzz.py`."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from reroll.train import journal
from reroll.train.load import export, open_model
from tests.cli import TINY, TRAIN
from tests.fuzz import call, changed, dumped, examples, mangled, tables

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("little_room")]


def saved_array(**arrays):
    file = io.BytesIO()
    if len(arrays) == 1:
        np.save(file, *arrays.values())
    else:
        np.savez(file, **arrays)
    return file.getvalue()


SERIES = np.sin(np.arange(120.0)).reshape(4, 15, 2).astype(np.float32)
DATA = {
    "text.txt": b"one line, and then another one of the same kind.\n" * 3,
    "text.jsonl": b"".join(dumped({"text": f"line {i} of many", "id": i}) + b"\n" for i in range(12)),
    "array.npy": saved_array(inputs=SERIES),
    "array.npz": saved_array(inputs=SERIES, targets=np.array([0, 1, 2, 1]), mask=np.ones((4, 15), dtype=bool)),
    "table.csv": b"series,x,y\n" + b"".join(b"%d,%f,%d\n" % (i % 2, i / 7, i * i) for i in range(40)),
}


@given(st.data(), st.sampled_from(sorted(DATA)), st.sampled_from(["byte", "char", "word"]))
@examples(500)
def test_any_data_are_learned_or_refused(data, name, tokenizer):
    whole = DATA[name]
    content = data.draw(st.one_of(mangled(whole), mangled(whole), st.binary(max_size=80), st.just(b"")))
    Path(name).write_bytes(content)
    recipe = "text" if name.startswith("text") else "arrays"
    more = ("--tokenizer", tokenizer) if recipe == "text" else ()
    call("train", recipe, "--path", name, *TINY[2:], "--length", 4, "--steps", 1, *more, "--run-dir", "new")
    shutil.rmtree("new", ignore_errors=True)
    shutil.rmtree("cache", ignore_errors=True)


@given(
    st.sampled_from(["inputs", "targets", "mask", "x"]),
    st.lists(st.sampled_from([0, 1, 4, 5, 15]), max_size=4),
    st.sampled_from(["bool", "i1", "u8", "f2", "f8", "c8", "S3", "U3", "O", "M8[s]", "V4"]),
)
@examples(150)
def test_any_type_and_shape_of_arrays_is_learned_or_refused(name, shape, kind):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(kind)
    np.savez("array.npz", **({"inputs": SERIES} | {name: array}))
    call("train", "arrays", "--path", "array.npz", *TINY[2:], "--length", 4, "--steps", 1, "--run-dir", "new")
    shutil.rmtree("new", ignore_errors=True)


# Runs and models


RUN_FILES = [
    "config.toml", "environment.json", "status.json", "metrics.jsonl", "journal",
    "checkpoints/step-00000004/state.json", "checkpoints/step-00000004/model.safetensors",
    "checkpoints/step-00000004/state.safetensors",
]  # fmt: skip
USES = [
    ("eval", "run"), ("sample", "run", "--length", "2"), ("export", "run", "--to", "x.safetensors"),
    ("replay", "run", "--checksum"), ("show", "run"), ("runs", "."), ("runs", ".", "--json"),
    ("train", "--run-dir", "run", "--resume"), ("train", "--run-dir", "run", "--resume", "--steps", "5"),
    (*TRAIN, "--init", "run", "--steps", "1", "--run-dir", "new"),
]  # fmt: skip


def of_json(whole):
    return changed(json.loads(whole)).map(dumped)


def of_rows(whole):
    rows = [json.loads(line) for line in whole.splitlines()]
    return st.tuples(*map(changed, rows)).map(lambda changed_rows: b"\n".join(map(dumped, changed_rows)))


def of_journal(whole):
    """A journal that checks, with another header, or with records that are none."""
    begin, blocks = len(journal.MAGIC), []
    while begin < len(whole):
        end = begin + 12 + int.from_bytes(whole[begin : begin + 4], "little")
        blocks.append(whole[begin + 12 : end])
        begin = end
    headers = changed(json.loads(blocks[0])).map(dumped)
    records = st.one_of(
        st.just(blocks[1:]), st.lists(st.binary(max_size=60), max_size=2), mangled(blocks[1]).map(lambda b: [b])
    )
    return st.tuples(headers, records).map(
        lambda parts: journal.MAGIC + b"".join(journal._block(block) for block in (parts[0], *parts[1]))
    )


@given(st.data(), st.sampled_from(RUN_FILES), st.sampled_from(USES))
@examples(700)
def test_any_damage_to_a_run_is_said(tiny, caplog, data, name, use):
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(tiny, "run")
    whole = Path("run", name).read_bytes()
    well_formed = {".json": of_json, ".jsonl": of_rows, "": of_journal, ".toml": lambda _: tables()}
    options = [mangled(whole), st.binary(max_size=60)]
    if Path(name).suffix in well_formed:
        options += [well_formed[Path(name).suffix](whole)] * 3
    Path("run", name).write_bytes(data.draw(st.one_of(options)))
    call(*use)
    shutil.rmtree("new", ignore_errors=True)


@pytest.fixture
def model(tiny, little_room):
    """The bytes of an exported model, and what they say of it."""
    export(open_model(tiny), Path("model.safetensors"))
    whole = Path("model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    return whole, json.loads(json.loads(whole[8 : 8 + size])["__metadata__"]["reroll"])


@given(
    st.data(),
    st.sampled_from([("eval",), ("sample", "--length", "2"), ("export", "--to", "x.safetensors"), (*TRAIN, "--init")]),
)
@examples(400)
def test_any_model_file_is_read_or_refused(model, data, use):
    whole, about = model
    others = changed(about).map(lambda value: save(load(whole), {"reroll": dumped(value).decode()}))
    Path("model.st").write_bytes(data.draw(st.one_of(mangled(whole), st.binary(max_size=80), others)))
    arguments = (*use, "model.st", "--run-dir", "new") if use[-1] == "--init" else (use[0], "model.st", *use[1:])
    call(*arguments)
    shutil.rmtree("new", ignore_errors=True)


def test_archives_that_lie():
    """An .npz whose members are no arrays, or promise more than there is memory for."""
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000000,), }".ljust(117)
        + b"\n"
    )
    for content in (b"", b"nothing", header, header + b"\0" * 64):
        with zipfile.ZipFile("array.npz", "w") as archive:
            archive.writestr("inputs.npy", content)
        assert call("train", "arrays", "--path", "array.npz", "--run-dir", "new")[0] in (1, 2)
        Path("array.npy").write_bytes(content)
        assert call("train", "arrays", "--path", "array.npy", "--run-dir", "new")[0] in (1, 2)
