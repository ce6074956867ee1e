"""Parquet as text: rows are documents, read a few at a time; what is no text is skipped and counted, or named."""

import json
import random
import sys

import pytest

from reroll.data.corpus import find, passages
from reroll.data.prepare import encode
from reroll.data.text import Text
from reroll.data.tokens import ABOUT, read_shard
from reroll.errors import UsageError

pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra `data`")
parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra `data`")


def write(path, group=3, page=1024, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group, write_batch_size=page)
    return path


def documents(path, field="text"):
    return [b"".join(document.chunks()).decode() for _, document in find(path, field).documents()]


TEXTS = ["one", "", "two\nthree", "東京 🜁", "a\0b", None, "the end"]


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_rows_are_documents(tmp_path, kind, group):
    write(tmp_path / "a.parquet", group, text=pyarrow.array(TEXTS).cast(kind), n=list(range(7)))
    assert documents(tmp_path / "a.parquet") == [text for text in TEXTS if text]
    assert "in 5 documents; " in (said := Text(tmp_path / "a.parquet", length=2).describe())
    assert said.endswith("; skipped, having no text: 2.")
    assert [d.name for _, d in find(tmp_path / "a.parquet").documents()] == [f"a.parquet:{i}" for i in (1, 3, 4, 5, 7)]


def test_columns_and_fields_in_them(tmp_path):
    entries = [{"a": "x", "b": {"c": "1"}}, {"a": "y", "b": {"c": None}}, {"a": "z", "b": None}]
    path = write(tmp_path / "a.PARQUET", **{"d": entries, "d.e": ["u", "v", "w"]})
    assert documents(path, "d.a") == ["x", "y", "z"]
    assert documents(path, "d.b.c") == ["1"]
    assert documents(path, "d.e") == ["u", "v", "w"]


def test_folders_and_globs(tmp_path):
    """Beside texts; a table without the column is left out, as binary files are."""
    for i in range(3):
        write(tmp_path / "data" / f"{i}.parquet", text=[f"{i}{j}" for j in range(4)])
    write(tmp_path / "numbers.parquet", n=[1, 2])
    (tmp_path / "b.txt").write_text("b")
    rows = [f"{i}{j}" for i in range(3) for j in range(4)]
    assert documents(tmp_path) == ["b", *rows]
    assert documents(tmp_path / "data" / "[01].parquet") == rows[:8]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UsageError, match="no text in its 4 files, and no .parquet file has a column 'body'"):
        find(tmp_path, "body")


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
def test_shards_are_those_of_json_lines(tmp_path, tokenizer, cli):
    """The same documents, some longer than a shard, make the same files, whatever they are read from."""
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers", reason="byte pairs need the extra `data`")
    draw = random.Random(0)
    for split, count in (("train", 9), ("valid", 3)):
        texts = [
            " ".join(draw.choices(["to", "be", "or", "nöt", "\n"], k=3**i)) for i in draw.choices(range(6), k=count)
        ]
        write(tmp_path / "rows" / f"{split}.parquet", body=texts)
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "lines" / f"{split}.jsonl").write_text(lines)
    sizes = [] if tokenizer == "byte" else ["--max-vocab", 270 if tokenizer == "bpe" else 5]
    shards = []
    for source in ("rows", "lines"):
        done = cli("data", "prepare", "tokens", "--path", tmp_path / source, "--field", "body", "--shard", 100,
                   "--tokenizer", tokenizer, *sizes, "--to", tmp_path / "to" / source)  # fmt: skip
        assert done.code == 0, done.err
        files = json.loads((tmp_path / "to" / source / ABOUT).read_text())["files"]
        shards.append([(read_shard(tmp_path / "to" / source / name).tolist(), files[name]["bytes"]) for name in files])
    assert shards[0] == shards[1]
    assert len(shards[0]) > 4


def test_no_file_is_in_memory(tmp_path):
    """30 MB of text in one group of rows, of which a few are there at once."""
    draw = random.Random(0)
    path = write(tmp_path / "a.parquet", 3000, 64, text=[draw.randbytes(5000).hex() for _ in range(3000)])
    assert path.stat().st_size > 16e6
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for _, document in find(path).documents():
        most, count = max(most, pyarrow.total_allocated_bytes() - before), count + len(document.source)
    assert count == 3e7
    assert most < 6e6


def test_a_text_task_reads_rows(tmp_path):
    path = write(tmp_path / "a.parquet", text=[f"row {i}, to be or not" for i in range(40)])
    task = Text(path, length=8, batch=2)
    held_out = [b"".join(p.chunks()) + b"\n" for p in passages(find(path)) if p.split == "valid"]
    assert bytes(task.tokens["valid"]) == b"".join(held_out)


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-40], "hole": content[:4] + b"\xff" * 100 + content[104:], "empty": b""}[how])


@pytest.mark.parametrize(
    "column, how, message", [
        ("body", "", "has no column 'body'; its columns are text, n. Give one of them as field="),
        ("text.a", "", "row 1, has no text in field='text.a': "),
        ("n", "", r"row 1, has no text in field='n': \{'n': 7\}. Give field=… that every row has"),
        ("b", "", "row 1, has no text in field='b'"),
        ("text", "cut", "cannot be read as Parquet .*Get it again"),
        ("text", "hole", "cannot be read as Parquet .*Get it again"),
        ("text", "empty", "is empty|cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, column, how, message):
    columns = {"b": [b"x", b"y"]} if column == "b" else {}
    path = write(tmp_path / "a.parquet", text=["one " * 99, "two"], n=[7, 8], **columns)
    if how:
        damaged(path, how)
    with pytest.raises(UsageError, match=f"(?s)a.parquet.*({message})") as caught:
        encode(path, tmp_path / "shards", field=column)
    assert "\n" not in str(caught.value)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", text=["one", "two"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for where in (path, tmp_path):
        with pytest.raises(UsageError, match=r"a.parquet needs pyarrow: pip install 'reroll\[data\]'"):
            documents(where)
