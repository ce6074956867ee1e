"""Where text is found, how it is divided, and how its symbols are kept on disk."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from reroll.data import cache, corpus
from reroll.data.cache import cache_folder, load
from reroll.data.corpus import Document, find, passages
from reroll.data.text import Text
from reroll.data.tokenizers import fit
from reroll.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(root, **texts):
    """Files by name; `__` stands for a slash and `_` for a dot."""
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(passage):
    return b"".join(passage.document.chunks(passage.begin, passage.end, chunk=5)).decode()


def parts(path, **arguments):
    """The texts of every split of a corpus."""
    found = {}
    for passage in passages(find(path, **arguments)):
        found.setdefault(passage.split, []).append(read(passage))
    return found


def names(path):
    return [document.name for _, document in find(path).documents()]


def test_a_single_text_is_held_out_at_its_end(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    write(tmp_path, a_txt=text)
    found = parts(tmp_path / "a.txt")
    assert found["train"][0] + found["valid"][0] == text
    assert found["valid"][0].startswith("line ")
    assert 0.08 * len(text) < len(found["valid"][0]) <= 0.1 * len(text)
    assert load(find(tmp_path / "a.txt")).single


@pytest.mark.parametrize(
    "text", ["é" * 999, "ab", "aaaaaaaaa\n", "a" * 50, "one two three four five six", "日本語" * 50]
)
def test_the_border_of_a_single_text_cuts_no_character(tmp_path, text):
    write(tmp_path, a_txt=text)
    found = parts(tmp_path / "a.txt")
    assert found["train"][0] + found["valid"][0] == text
    assert found["train"][0]
    assert found["valid"][0]


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    write(
        tmp_path, b_txt="bb", a_txt="aa", sub__c_md="cc", _git__x_txt="no", z_bin=b"a\0b", y_bin=b"\xff\xfe", e_txt=""
    )
    assert names(tmp_path) == ["a.txt", "b.txt", "sub/c.md"]
    assert names(f"{tmp_path}/**/*.*") == ["a.txt", "b.txt", "sub/c.md"]
    assert names(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]


def test_a_character_at_the_end_of_the_looked_at_head_is_no_fault(tmp_path):
    write(tmp_path, a_txt="a" * 8191 + "é", b_txt="a" * 8190 + "é" + "b")
    assert names(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("count", [2, 3, 5, 20, 99, 400])
def test_documents_are_held_out_by_name_not_by_place(tmp_path, count):
    sizes = random.Random(count).choices([100, 300, 900], k=count)
    write(tmp_path, **{f"d{number:03}_txt": f"{number:03}" * (size // 3) for number, size in enumerate(sizes)})
    found = parts(tmp_path)
    assert sum(map(len, found.values())) == count
    assert found["train"]
    assert found["valid"]
    if count >= 20:
        share = sum(map(len, found["valid"])) / sum(sizes)
        assert 0.05 < share < 0.2
        numbers = sorted(int(text[:3]) for text in found["valid"])
        assert numbers != list(range(count - len(numbers), count))
    # Moving the folder, or reading it from another path, changes nothing.
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob("*.txt"):
        file.rename(tmp_path / "copy" / file.name)
    assert parts(tmp_path / "copy") == found


@pytest.mark.parametrize("sizes", [[9000, 500, 600, 700], [9000, 30], [10, 9000, 9000], [100] * 9 + [9000]])
def test_a_large_document_is_never_held_out(tmp_path, sizes):
    write(tmp_path, **{f"d{number}_txt": "x" * size for number, size in enumerate(sizes)})
    found = parts(tmp_path)
    assert 0 < sum(map(len, found["valid"])) <= sum(sizes) / 5
    assert max(map(len, found["train"])) == 9000


def test_files_named_after_splits_are_the_splits(tmp_path):
    write(
        tmp_path, ptb_train_txt="a", ptb_valid_txt="b", ptb_test_txt="c", ptb_char_train_txt="x", ptb_char_valid_txt="y"
    )
    write(tmp_path, README="read me")
    assert parts(tmp_path) == {"train": ["a"], "valid": ["b"], "test": ["c"]}
    assert parts(f"{tmp_path}/ptb.char.*") == {"train": ["x"], "valid": ["y"]}
    write(tmp_path / "plain", train_txt="1", val_txt="2")
    assert parts(tmp_path / "plain") == {"train": ["1"], "valid": ["2"]}
    write(tmp_path / "one", train_txt="1", other_txt="2")  # no held-out file: a folder like any other
    assert sorted(itertools.chain(*parts(tmp_path / "one").values())) == ["1", "2"]


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": f"document é {number}", "n": number}) for number in range(150)]
    write(tmp_path, a_jsonl="\n\n".join(lines) + "\n")
    found = parts(tmp_path / "a.jsonl")
    assert sorted(itertools.chain(*found.values())) == sorted(f"document é {number}" for number in range(150))
    assert 5 <= len(found["valid"]) <= 30
    write(tmp_path, b_jsonl='{"body": "one"}\n{"body": ""}\n{"body": "two"}')
    assert sorted(itertools.chain(*parts(tmp_path / "b.jsonl", field="body").values())) == ["one", "two"]


def test_json_lines_of_other_programs(tmp_path):
    """Nested fields, null, carriage returns, a byte-order mark; what is wrong is told with its line."""
    lines = ['{"data": {"text": "one"}}', '{"data": {"text": null}}', '{"data.text": "two"}', ""]
    write(tmp_path, a_jsonl="\ufeff" + "\r\n".join(lines))
    assert sorted(itertools.chain(*parts(tmp_path / "a.jsonl", field="data.text").values())) == ["one", "two"]
    for bad, message in [
        ('{"data": {"title": "x", "n": {"m": "y"}}}', "line 3.*field='data.text'.*title"),
        ('{"data": "x"}', "line 3.*data.*x.* Give"),
        ('{"\\u001b[2J": "x"}', r"line 3.*x1b"),
        ("[" * 100_000, "line 3, is not JSON"),
    ]:
        write(tmp_path, b_jsonl='{"data": {"text": "one"}}\r\n\r\n' + bad)
        with pytest.raises(UsageError, match=message) as caught:
            list(passages(find(tmp_path / "b.jsonl", "data.text")))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_json_lines_and_an_array_are_read_alike(tmp_path, encoding):
    rows = [{"text": f"document é {number}", "n": [number]} for number in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding)
    for name in ("a.json", "a.jsonl"):
        documents = [document.source for _, document in find(tmp_path / name).documents()]
        assert documents == [row["text"].encode() for row in rows]
    (tmp_path / "b.json").write_text(json.dumps(rows).replace("text", "body"), encoding)
    assert len(list(find(tmp_path / "b.json", "body").documents())) == 12
    assert len(list(find(tmp_path / "b.json").documents())) == 1
    assert "its objects have no 'text', so that it is one text" in find(tmp_path / "b.json").note
    with pytest.raises(UsageError, match="object 1, has no text in field='title'.*that every object has"):
        list(find(tmp_path / "b.json", "title").documents())
    (tmp_path / "c.json").write_text('{"text": "settings"}')
    assert len(list(find(tmp_path / "c.json").documents())) == 1
    (tmp_path / "d.json").write_text('[{"text": "x"}, ')
    with pytest.raises(UsageError, match="is not JSON.*correct it, or call it .txt"):
        list(find(tmp_path / "d.json").documents())


ODD = {
    "comma": '[{"text": "x"}, ]',
    "cut": '[{"text": "x"}, ',
    "some": '[{"text": "OK"}, {"icon": "x"}]',
    "number": '[{"text": 5}]',
    "other": '[{"body": "x"}]',
    "deep": '[{"text": "x", "n": ' + "[" * 100_000,
}


def test_an_odd_json_file_among_others_is_one_text(tmp_path):
    for name, text in ODD.items():
        (tmp_path / f"{name}.json").write_text(text)
    write(tmp_path, rows_json='[{"text": "one"}, {"text": null}, {"text": "two"}]')
    found = {document.name: b"".join(document.chunks()).decode() for _, document in find(tmp_path).documents()}
    assert found == {f"{name}.json": text for name, text in ODD.items()} | {"rows.json:1": "one", "rows.json:3": "two"}
    with pytest.raises(UsageError, match="comma.json is not JSON"):
        list(find(tmp_path, "body").documents())
    for name, message in {"some": "object 2, has no text", "number": "object 1, has no text"}.items():
        with pytest.raises(UsageError, match=message):
            find(tmp_path / f"{name}.json")
    assert names(tmp_path / "other.json") == ["other.json"]


@pytest.mark.parametrize("path", ["one/*.{}", "one/a.train.{}", "two/*.{}"])
def test_an_array_without_the_field_is_learned_as_any_text(tmp_path, path):
    text = json.dumps([{"body": f"document {number}"} for number in range(40)])
    for ending in ("txt", "json"):
        write(tmp_path / "one", **{f"a_train_{ending}": text, f"a_valid_{ending}": text[:99]})
        write(tmp_path / "two", **{f"{name}_{ending}": text for name in "abc"})
    txt, array = (
        [
            (p.document.name.removesuffix(ending), read(p), p.separated)
            for p in passages(find(tmp_path / path.format(ending)))
        ]
        for ending in ("txt", "json")
    )
    assert txt == array


def test_a_single_array_is_parsed_once(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"text {number}"} for number in range(20)]))
    parsed, loads = [], json.loads
    monkeypatch.setattr("reroll.data.jsontext.json.loads", lambda content: parsed.append(1) or loads(content))
    corpus = find(tmp_path / "a.json")
    assert len(list(passages(corpus))) == len(list(corpus.documents())) == 20
    assert len(parsed) == 1


def test_a_field_of_nothing_is_refused(tmp_path):
    """Unless it is that of the text that a model was trained on, which is scored on another."""
    write(tmp_path / "texts", a_txt="one", b_json='{"body": "two"}')
    for path in (tmp_path / "texts", tmp_path / "texts" / "a.txt", tmp_path / "texts" / "b.json", "stdlib:prose"):
        with pytest.raises(UsageError, match=f"field='body' is of nothing in path='{path}'.*Leave it out"):
            find(path, "body")
    assert [len(Text(tmp_path / "texts" / "a.txt", field="body", whole=True).tokens["valid"])] == [3]
    (tmp_path / "array.json").write_text('[{"body": "one"}, {"body": "two"}]')
    assert [document.name for _, document in find(tmp_path / "array.json", "body").documents()] == [
        "array.json:1",
        "array.json:2",
    ]


def test_a_hard_link_is_the_same_document(tmp_path):
    write(tmp_path, a_txt="one", b_txt="two")
    (tmp_path / "c.txt").hardlink_to(tmp_path / "a.txt")
    assert [document.name for _, document in find(tmp_path).documents()] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("number, links", [(0, 1), (7, 1), (0, 2)])
def test_files_without_a_number_of_their_own_are_different_documents(tmp_path, monkeypatch, number, links):
    write(tmp_path, a_txt="one", b_txt="two")
    stat = Path.stat

    def numbered(self, **options):
        state = stat(self, **options)
        return os.stat_result((state.st_mode, number, state.st_dev, links, *state[4:10]))

    monkeypatch.setattr(Path, "stat", numbered)
    assert names(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("path", ["", "/**", "/**/*.txt", "/*/*.txt", "/**.txt"])
def test_links_are_not_followed_twice(tmp_path, path):
    root = write(tmp_path / "g", a__1_txt="1", a__2_txt="2", b__c__3_txt="3", b__4_txt="4", _hidden__5_txt="5")
    for place in (root, root / "a", root / "b"):
        (place / "self").symlink_to(root)
        (place / "again").symlink_to(place)
        (place / "other.txt").symlink_to(root / "a" / "1.txt")
        (place / "broken.txt").symlink_to(root / "nothing")
    os.mkfifo(root / "a" / "pipe.txt")
    expected = {"/*/*.txt": ["a/1", "a/2", "b/4"], "/**.txt": ["other"]}.get(path, ["a/1", "a/2", "b/4", "b/c/3"])
    corpus = find(f"{root}{path}")
    found = [document.source for _, document in corpus.documents()]
    assert sorted(os.path.realpath(file) for file in found) == sorted(
        os.path.realpath(root / f"{name}.txt") for name in expected
    )
    assert re.fullmatch("skipped, being binary or no files: [1-9], such as '.*'", corpus.note)


def test_what_is_no_text_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe"):
        find(tmp_path / "pipe")
    packed = {"a.csv.gz": b"\x1f\x8b", "a.txt": b"\xfd7zXZ\0", "b.txt": b"BZh\x91"}
    for name, head in packed.items():
        (tmp_path / name).write_bytes(head)
        with pytest.raises(UsageError, match="compressed.*train arrays"):
            find(tmp_path / name)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word"])
def test_a_byte_order_mark_is_no_symbol(tmp_path, tokenizer):
    text = "one two three\n" * 40
    write(tmp_path, plain__a_txt=text, marked__a_txt=b"\xef\xbb\xbf" + text.encode())
    write(tmp_path, plain__b_txt=text[:99], marked__b_txt=b"\xef\xbb\xbf" + text[:99].encode())
    for path in ("a.txt", ""):
        plain, marked = (load(find(tmp_path / kind / path), tokenizer) for kind in ("plain", "marked"))
        assert plain.tokenizer == marked.tokenizer
        assert plain.fingerprint == marked.fingerprint


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("encoding, mark", [("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")])
def test_utf_16_after_its_mark_is_text(tmp_path, tokenizer, encoding, mark):
    text = "eins zwei dréi 𝄞\n" * 700
    write(tmp_path, plain__a_txt=text, wide__a_txt=mark + text.encode(encoding))
    for path in ("a.txt", ""):
        plain, wide = (load(find(tmp_path / kind / path), tokenizer) for kind in ("plain", "wide"))
        assert (plain.fingerprint, plain.size, plain.documents) == (wide.fingerprint, wide.size, 1)
    write(tmp_path, cut_txt=mark + text.encode(encoding)[:-1])
    with pytest.raises(UsageError, match=r"cut.txt cannot be read as UTF-16 .*Save it as UTF-8"):
        list(passages(find(tmp_path / "cut.txt")))


def test_the_standard_library_is_text_that_is_always_there():
    prose, everything = find("stdlib:prose"), find("stdlib")
    listed = [file.name for file in everything.files]
    assert [file.name for file in prose.files] == [name for name in listed if name.startswith("topics/")]
    assert {"argparse.py", "json/decoder.py"} <= set(listed)
    assert not any(part in name.split("/") for name in listed for part in ("test", "tests", "site-packages", "idlelib"))
    shares = Counter()
    for passage in passages(prose):
        shares[passage.split] += passage.document.size
    assert 0.09 < shares["valid"] / shares.total() < 0.21


def test_a_stripped_python_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"path='stdlib:prose': this Python comes without.*copy"):
        find("stdlib:prose")
    assert find("stdlib").files
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="path='stdlib': this Python comes without"):
        find("stdlib")


@pytest.mark.parametrize(
    "path, message",
    [
        ("nothing.txt", "path='nothing.txt' does not exist. Give a file, a folder"),
        ("no*.txt", r"path='no\*.txt' matches no file"),
        ("empty.txt", "path='empty.txt' is empty"),
        ("hollow", "path='hollow' has no text in its 1 files"),
        ("bare", "path='bare' has no text in its 0 files"),
        ("binary", "path='binary' has no text in its 1 files"),
        ("bad.jsonl", "path=bad.jsonl, line 3, is not JSON"),
        ("latin.jsonl", "path=latin.jsonl, line 1, is not JSON"),
        ("list.jsonl", "path=list.jsonl, line 1, has no text in field='text'"),
        (
            "other.jsonl",
            r"path=other.jsonl, line 2, has no text in field='text': \{'body'.{70,72}…. Give",
        ),
        ("blank.jsonl", "path='blank.jsonl' has no text: every document in it is empty"),
    ],
)
def test_errors(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, empty_txt="", hollow__a_txt="", binary__a_bin=b"\0", bad_jsonl='{"text": "a"}\n\n{"text"\n')
    write(
        tmp_path,
        other_jsonl='{"text": "a"}\n{"body": "b", "title": "%s"}\n' % ("c" * 99),
        latin_jsonl=b'{"text": "\xe9"}',
    )
    write(tmp_path, list_jsonl='["a"]', blank_jsonl='\n{"text": ""}\n')
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=message) as caught:
        list(passages(find(path)))
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path, a_txt="text")

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"a.txt cannot be read \(Permission denied\)"):
        find(tmp_path / "a.txt")


# The cache


@pytest.fixture
def texts(tmp_path):
    """A folder of 30 texts."""
    lines = [f"text {number}: naïve café\n" * (number + 1) for number in range(30)]
    return write(tmp_path / "texts", **{f"t{number}_txt": text for number, text in enumerate(lines)})


def expected(path, tokenizer):
    """The symbols of every split, encoded in one go; a separator ends each document."""
    found = {}
    for split, documents in parts(path).items():
        found[split] = [s for text in documents for s in (*tokenizer.encode(text).tolist(), tokenizer.separator)]
    return found


@pytest.mark.parametrize("name, max_vocab", [("byte", None), ("char", None), ("char", 5), ("word", 7)])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_streams_are_the_texts(texts, monkeypatch, name, max_vocab, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    streams = load(find(texts), name, max_vocab)
    if name != "byte":
        # Texts of several documents end in a newline, which separates them.
        training = "".join(text + "\n" for text in parts(texts)["train"])
        assert streams.tokenizer == fit(name, [training], max_vocab)
    if max_vocab == 5:
        return  # such a vocabulary has no newline to separate documents with
    assert {split: tokens.tolist() for split, tokens in streams.tokens.items()} == expected(texts, streams.tokenizer)


def test_a_vocabulary_is_of_the_training_part_alone(tmp_path):
    write(tmp_path, a_txt="abc " * 100 + "\n" + "xyz " * 11)
    streams = load(find(tmp_path / "a.txt"), "char")
    assert set(streams.tokenizer.to_dict()["characters"]) == set("abc \n")
    assert set(streams.tokens["valid"].tolist()) == {0, streams.tokenizer.encode(" ")[0]}


def test_a_vocabulary_without_a_newline_has_no_separator(tmp_path):
    write(tmp_path, a_txt="aabb", b_txt="aabb")
    streams = load(find(tmp_path), "char", max_vocab=3)
    assert [tokens.tolist() for tokens in streams.tokens.values()] == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_binary_files_are_bytes(tmp_path):
    data = bytes(range(256)) * 4
    write(tmp_path, a_bin=data)
    streams = load(find(tmp_path / "a.bin"))
    assert b"".join(tokens.tobytes() for tokens in streams.tokens.values()) == data
    with pytest.raises(UsageError, match="a.bin is not UTF-8 after"):
        load(find(tmp_path / "a.bin"), "char")


def test_a_second_load_reads_the_cache(texts, folder, monkeypatch):
    first = load(find(texts), "char")
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".json", ".train", ".valid"]
    monkeypatch.setattr(cache, "_build", None)
    second = load(find(texts), "char")
    assert isinstance(second.tokens["train"], np.memmap)
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer == first.tokenizer
    assert load(find(texts), "char").tokens["valid"].tolist() == first.tokens["valid"].tolist()


def test_other_texts_and_settings_are_other_entries(texts, folder):
    prints = [load(find(texts), *how).fingerprint for how in [("byte",), ("char",), ("char", 9), ("word",)]]
    assert load(find(texts), fit("char", ["abc"])).fingerprint not in prints
    before = len(list(folder.glob("*.json")))
    file = texts / "t3.txt"
    file.write_text(file.read_text().replace("3", "4"))
    os.utime(file, ns=(1, 1))
    assert load(find(texts), "byte").fingerprint not in prints
    assert len(list(folder.glob("*.json"))) == before + 1


@pytest.mark.parametrize("damage", ["short", "long", "missing", "broken description", "wrong description"])
def test_a_damaged_entry_is_built_again(texts, folder, damage, caplog):
    good = load(find(texts))
    kept = {split: tokens.tolist() for split, tokens in good.tokens.items()}
    description, train = next(folder.glob("*.json")), next(folder.glob("*.train"))
    if damage == "short":
        os.truncate(train, train.stat().st_size - 1)
    elif damage == "long":
        train.write_bytes(train.read_bytes() + b"x")
    elif damage == "missing":
        train.unlink()
    else:
        description.write_text(
            "{" if damage == "broken description" else '{"counts": 3, "tokenizer": {"name": "byte"}}'
        )
    again = load(find(texts))
    assert {split: tokens.tolist() for split, tokens in again.tokens.items()} == kept
    assert again.fingerprint == good.fingerprint
    assert ("is damaged" in caplog.text) == (damage != "missing")


def test_a_build_that_fails_leaves_nothing(tmp_path, folder):
    write(tmp_path, a_txt=b"text " * 100 + b"\xff")
    with pytest.raises(UsageError, match="a.txt is not UTF-8 after 'text text"):
        load(find(tmp_path / "a.txt"), fit("char", ["text "]))
    assert list(folder.iterdir()) == []


def test_no_room_is_said(texts, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_encoded", full)
    with pytest.raises(RunError, match="has no room for the symbols of .* set REROLL_CACHE"):
        load(find(texts))


def test_a_cache_that_cannot_be_written_is_replaced_and_said_once(tmp_path, monkeypatch, caplog):
    write(tmp_path, file="", a_txt="some text " * 20)
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "_temporary", None)
    with caplog.at_level(logging.WARNING):
        first, second = load(find(tmp_path / "a.txt")), load(find(tmp_path / "a.txt"))
    assert first.fingerprint == second.fingerprint
    assert caplog.text.count("cannot be written") == 1
    assert "REROLL_CACHE" in caplog.text


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("REROLL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "reroll"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "reroll"


def build(path, results):
    streams = load(find(path), "word")
    results.put((streams.fingerprint, {split: tokens.tolist() for split, tokens in streams.tokens.items()}))


def test_two_builds_at_once_agree(texts, folder):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    results = context.Queue()
    workers = [context.Process(target=build, args=(texts, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert all(result == found[0] for result in found)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".train", ".valid"]


@pytest.mark.parametrize("name", ["byte", "char", "word"])
def test_memory_is_that_of_a_few_chunks(tmp_path, monkeypatch, name):
    with (tmp_path / "a.txt").open("w") as file:
        for number in range(600 if name == "word" else 3000):  # words are slow under tracemalloc
            file.write(f"{number} thé quick brown fox jumps over the lazy dog\n" * 200)
    assert (tmp_path / "a.txt").stat().st_size > (5e6 if name == "word" else 25e6)
    monkeypatch.setattr(corpus, "CHUNK", 1 << 16)
    tokenizer = fit(name, ["thé quick brown fox jumps over the lazy dog\n"] if name != "byte" else ())
    tracemalloc.start()
    try:
        streams = load(find(tmp_path / "a.txt"), tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, streams.tokens.values())) > 1e6
    # A character of a chunk is 4 bytes of text, of code point, and of index each; a word is an object.
    assert peak < 4e6


def test_documents_in_memory_and_on_disk_are_read_alike(tmp_path):
    data = bytes(range(200))
    write(tmp_path, a_bin=data)
    for source in (data, tmp_path / "a.bin"):
        document = Document("a", source, len(data))
        for begin, end in [(0, None), (10, None), (0, 77), (50, 51), (200, None)]:
            blocks = list(document.chunks(begin, end, chunk=9))
            assert b"".join(blocks) == data[begin:end]
            assert all(0 < len(block) <= 9 for block in blocks)


def test_a_text_may_be_called_anything(tmp_path):
    (tmp_path / "notes.zip").write_text("Packed for the journey.")
    assert len(find(tmp_path / "notes.zip").files) == 1
