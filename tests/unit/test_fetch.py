"""Downloads, from a server on this machine: they go on where they ended, and what is damaged is not kept."""

import functools
import hashlib
import http.server
import json
import pathlib
import sys
import threading

import numpy as np
import pytest

from reroll.data import prepare
from reroll.data.prepare import download, openwebtext
from reroll.data.tokens import ABOUT, TokenBatches, read_shard, write_shard
from reroll.errors import RunError, UsageError

RANDOM = np.random.default_rng(0)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges; ends after `give` bytes of a file, and names `digest`."""

    give, digest, redirects, ranges = 10**9, None, False, True

    def do_GET(self):
        content = (pathlib.Path(self.directory) / self.path[1:].split("?")[0]).read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        if self.redirects and "?" not in self.requestline:  # to a storage that knows no checksum
            self.send_response(302)
            self.send_header("Location", self.path + "?storage")
        elif begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
        else:
            self.send_response(206 if begin and self.ranges else 200)
            begin = begin if self.ranges else 0
            self.send_header("Content-Length", str(len(content) - begin))
        if self.digest and not (self.redirects and "?" in self.requestline):
            digest = hashlib.sha256(content).hexdigest() if self.digest == "true" else self.digest
            self.send_header("X-Linked-ETag", f'"{digest}"')
        self.end_headers()
        if self.command == "HEAD" or (self.redirects and "?" not in self.requestline) or begin >= len(content):
            return
        self.wfile.write(content[begin : begin + self.give])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        write_shard(tmp_path / "served" / name, RANDOM.integers(0, 50_257, 3000))
    kind = type("Here", (Server,), {})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=tmp_path / "served"))
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/", kind, tmp_path
    running.shutdown()
    running.server_close()


def test_a_download_goes_on_where_it_ended(server):
    address, kind, path = server
    said = []
    kind.give = 2000
    with pytest.raises(RunError, match="run the command again"):
        download(path / "got", 2, said.append, address)
    assert "3 files" in said[0]
    assert "licence ODC-By" in said[0]
    assert (path / "got" / "fineweb_val_000000.bin.part").stat().st_size >= 2000
    kind.give = 10**9
    download(path / "got", 2, said.append, address)
    for file in (path / "served").iterdir():
        assert (path / "got" / file.name).read_bytes() == file.read_bytes()
    said.clear()
    download(path / "got", 2, said.append, address)
    assert len(said) == 1  # nothing is fetched twice


def test_a_download_that_is_damaged_is_discarded(server):
    address, kind, path = server
    kind.digest = "0" * 64
    with pytest.raises(RunError, match="fineweb_val_000000.bin arrived damaged"):
        download(path / "got", 1, lambda line: None, address)
    assert not list((path / "got").iterdir())
    kind.redirects = True  # where the redirect alone knows the checksum
    with pytest.raises(RunError, match="fineweb_val_000000.bin arrived damaged"):
        download(path / "got", 1, lambda line: None, address)
    kind.redirects, kind.digest = False, None
    (path / "served" / "fineweb_val_000000.bin").write_bytes(b"<html>" * 500)
    with pytest.raises(RunError, match="is no token shard"):
        download(path / "got", 1, lambda line: None, address)
    assert not list((path / "got").iterdir())
    with pytest.raises(RunError, match="could not be fetched"):
        download(path / "got", 1, lambda line: None, address + "nowhere/")
    with pytest.raises(UsageError, match="shards=0"):
        download(path / "got", 0, lambda line: None, address)
    (path / "mine").mkdir()
    write_shard(path / "mine" / "x_train_000001.bin", [1])
    with pytest.raises(UsageError, match=r"another text \(x_train_000001.bin\)"):
        download(path / "mine", 1, lambda line: None, address)
    (path / "file").touch()
    with pytest.raises(RunError, match="got cannot be made"):
        download(path / "file" / "got", 1, lambda line: None, address)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_is_gone_on_with_or_begun_again(server, ranges):
    address, kind, path = server
    kind.ranges, name = ranges, "fineweb_val_000000.bin"
    content = (path / "served" / name).read_bytes()
    part = path / "got" / f"{name}.part"
    part.parent.mkdir()
    for before in (content, content[:3000], content + b"more"):
        part.write_bytes(before)
        if len(before) > len(content):
            with pytest.raises(RunError, match="not a part of it"):
                download(path / "got", 1, lambda line: None, address)
        download(path / "got", 1, lambda line: None, address)
        assert (path / "got" / name).read_bytes() == content
        assert not part.exists()
        (path / "got" / name).unlink()


@pytest.mark.parametrize("known", ["tokens.json", "the server"])
def test_files_that_are_there_have_the_checksum_that_is_known(server, known):
    address, kind, path = server
    download(path / "got", 1, lambda line: None, address)
    if known == "the server":
        kind.digest = "true"
        (path / "got" / ABOUT).unlink()
    file = path / "got" / "fineweb_train_000001.bin"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:2000] + b"ab" + whole[2002:])
    said = []
    download(path / "got", 1, said.append, address)
    assert said[1:] == ["fetching fineweb_train_000001.bin"]
    assert file.read_bytes() == whole
    kind.digest = None
    (path / "got" / ABOUT).unlink(missing_ok=True)
    download(path / "got", 1, said.append, address.replace("127.0.0.1", "127.0.0.2.invalid"))  # without a network


def test_files_that_are_there_are_described(server):
    """A folder with whole shards and no tokens.json gets one, though nothing is fetched."""
    address, _, path = server
    download(path / "got", 2, lambda line: None, address)
    about = (path / "got" / ABOUT).read_text()
    (path / "got" / ABOUT).unlink()
    said = []
    download(path / "got", 2, said.append, address)
    assert len(said) == 1
    assert (path / "got" / ABOUT).read_text() == about


@pytest.fixture
def rows(server, monkeypatch):
    """Three of four Parquet files, with documents that say where they are from."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra `data`")
    from pyarrow import parquet

    monkeypatch.setattr(prepare, "OPENWEBTEXT_FILES", 4)
    texts = [[f"document {i} of {file} " * RANDOM.integers(1, 40) for i in range(9)] for file in range(3)]
    for file, text in enumerate(texts):
        path = server[2] / "served" / f"train-{file:05d}-of-00004.parquet"
        parquet.write_table(pyarrow.table({"text": text}), path, row_group_size=4)
    return texts


def documents_of(folder, label):
    tokens = np.concatenate([read_shard(path) for path in sorted(folder.glob(f"openwebtext_{label}_*.bin"))])
    return tokens.astype(np.uint8).tobytes().decode().split("\0")[1:]


def test_openwebtext_becomes_shards(server, rows):
    """The first file is held out, whatever else is fetched; what is there is not fetched again."""
    address, kind, path = server
    said, kind.give = [], 900
    with pytest.raises(RunError, match=r"train-00000-of-00004.parquet could not be fetched .*run the command again"):
        openwebtext(path / "got", 1, "byte", say=said.append, source=address)
    assert said[0].startswith(f"2 files of 303 MB from {address}, licence CC0 1.0")
    kind.give, kind.digest = 10**9, "true"
    for count in (1, 2, 1):
        about = openwebtext(path / "got", count, "byte", say=said.append, source=address, shard=500)
        assert documents_of(path / "got", "val") == rows[0]
        assert documents_of(path / "got", "train") == [text for file in rows[1 : count + 1] for text in file]
        assert json.loads((path / "got" / ABOUT).read_text()) == about
    assert said[-1].startswith("2 files")
    assert sum("fetching" in line for line in said) == 4  # one of them twice
    assert TokenBatches(path / "got", length=8, batch=2, valid_tokens=None).document == 0


def test_openwebtext_that_is_damaged_is_discarded(server, rows, monkeypatch):
    address, kind, path = server
    served, got = (
        path / "served" / "train-00001-of-00004.parquet",
        path / "got" / "parquet" / "train-00001-of-00004.parquet",
    )
    fetched = functools.partial(openwebtext, path / "got", 1, "byte", say=lambda line: None, source=address)
    content = served.read_bytes()
    served.write_bytes(content[:-9])
    with pytest.raises(
        RunError, match="The download of .*train-00001-of-00004.parquet is discarded: .*cannot be read as Parquet"
    ):
        fetched()
    kind.digest = "0" * 64
    with pytest.raises(RunError, match="train-00000-of-00004.parquet arrived damaged"):
        fetched()
    kind.digest = "true"
    assert not got.exists()
    served.write_bytes(content)
    fetched()
    got.unlink()
    got.write_bytes(content[:300] + b"\0" + content[301:])
    fetched()
    assert got.read_bytes() == content
    with pytest.raises(UsageError, match="shards=4 must be 1 to 3"):
        openwebtext(path / "got", 4, "byte", source=address)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UsageError, match="needs tiktoken"):
        openwebtext(path / "other", 1, say=lambda line: None, source=address)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="openwebtext needs pyarrow: pip install"):
        openwebtext(path / "other", 1, "byte", say=lambda line: None, source=address)
    assert not (path / "other").exists()


def test_files_of_another_split_are_not_read(server, rows, monkeypatch):
    address, _, path = server
    read, whole = [], prepare.parquet.rows
    monkeypatch.setattr(prepare.parquet, "rows", lambda file, field: read.append(file.name[:11]) or whole(file, field))
    openwebtext(path / "got", 2, "byte", say=lambda line: None, source=address)
    assert read == ["train-00001", "train-00002", "train-00000"]


def test_openwebtext_from_the_command_line(server, rows, cli, monkeypatch):
    address, _, path = server
    monkeypatch.setattr(prepare.openwebtext, "__kwdefaults__", prepare.openwebtext.__kwdefaults__ | {"source": address})
    done = cli("data", "prepare", "openwebtext", "--shards", 2, "--tokenizer", "byte", "--to", path / "got")
    assert done.code == 0, done.err
    assert documents_of(path / "got", "train") == rows[1] + rows[2]
    assert f"reroll train cdrge-lstm-owt --path {path / 'got'}" in done.out
