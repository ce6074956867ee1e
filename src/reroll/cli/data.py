"""`reroll data prepare NAME`: convert files into ones that can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from reroll.cli.flags import as_flags, parse, positional
from reroll.errors import UsageError, did_you_mean, plural
from reroll.specs.base import option


@dataclass(frozen=True)
class Data:
    """Convert files into ones that can be trained on."""

    action: str = positional("prepare")
    name: str = positional(
        "eigenworms, or ts for any other labelled series in .ts files; tokens: shards of a text; fineweb: the shards "
        "of the NanoGPT speedrun, openwebtext: shards of that text, which are downloaded"
    )
    path: str | None = option(
        None, "a .ts file, or a folder with NAME_TRAIN.ts and NAME_TEST.ts; tokens: as for `reroll train text`"
    )
    to: Path | None = option(
        None, "folder to write to (default: for series the cache, where `reroll reproduce elk-fig3` looks; else NAME/)"
    )
    field: str = option("text", "tokens: field of JSON lines, or column of .parquet files, that has the text")
    every: int = option(1, "series: keep every k-th step")
    tokenizer: Literal["byte", "char", "word", "bpe", "gpt2"] | None = option(
        None, "byte, char, word, bpe or gpt2 (default: tokens byte, openwebtext gpt2)"
    )
    max_vocab: int | None = option(None, "largest vocabulary (default: char 1024, word 10000, bpe 8192)")
    shard: int = option(100_000_000, "tokens, openwebtext: tokens per shard", within="[1, 2**31)")
    shards: int = option(
        25, "fineweb: training shards, of 100 million tokens and 200 MB each; openwebtext: files to train on, of 303 MB"
    )


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(Data, arguments, "reroll data")
    if request.action != "prepare":
        raise UsageError(f'action "{request.action}" is unknown.{did_you_mean(request.action, ["prepare"])}')
    if request.name not in PREPARE:
        raise UsageError(f'archive "{request.name}" is unknown.{did_you_mean(request.name, PREPARE)}')
    prepare, flags = PREPARE[request.name]
    _require_taken(request, flags)
    with as_flags(request):
        prepare(request)
    return 0


def _require_taken(request: Data, flags: str) -> None:
    """Refuse what the source does not take, with the line for files of one's own where that was meant."""
    passed = [f.name for f in fields(Data) if "positional" not in f.metadata and getattr(request, f.name) != f.default]
    for name in (name for name in passed if name not in flags.split()):
        given, known = (f"--{n.replace('_', '-')}" for n in (name, flags.replace(" ", ", --")))
        own = "path" not in flags and name in TOKENS.split()
        line = (
            f"reroll data prepare tokens --path {request.path or 'X.parquet'} --tokenizer {request.tokenizer or 'byte'}"
        )
        instead = f" For a text of yours: {line}" if own else ""
        raise UsageError(f"reroll data prepare {request.name} takes no {given}, only {known}.{instead}")


def _series(request: Data) -> None:
    if request.path is None:
        raise UsageError("--path is missing: pass a .ts file or a folder of them; nothing is downloaded.")
    import numpy as np

    from reroll.data.cache import cache_folder
    from reroll.data.timeseries import name_of, prepare

    name = name_of(request.path) if request.name == "ts" else request.name
    target = (request.to or cache_folder()) / f"{name}.npz"
    arrays = prepare(Path(request.path), target, request.every)
    count, steps, features = arrays["inputs"].shape
    shape = f"{count} series of {plural(steps, 'step')}, {plural(features, 'feature')}"
    print(f"{target}: {shape}, {len(arrays['labels'])} class{'es' * (len(arrays['labels']) != 1)}")
    padding = count * steps - int(arrays["lengths"].sum())
    if missing := int(np.isnan(arrays["inputs"]).sum()) - padding * features:
        print(f"{plural(missing, 'missing value')}: in training filled with the mean of the feature")
    if "held_out" in arrays:
        print(f"held out: the {arrays['held_out'].sum()} series of the test file")
    print(f"train on it: reroll train arrays --path {target} --length {steps}")


def _tokens(request: Data) -> None:
    if request.path is None:
        raise UsageError("--path is missing: pass a text file, a folder, a glob, a .jsonl or .parquet file, or stdlib.")
    from reroll.data.prepare import encode

    target = request.to or Path(request.name)
    about = encode(
        request.path, target, request.tokenizer or "byte", max_vocab=request.max_vocab, field=request.field,
        shard=request.shard,
    )  # fmt: skip
    _print_shards(target, about)
    print(f"train on it: reroll train cpu-bytes --path {target} --set task.valid_tokens=none")


def _print_shards(target: Path, about: dict[str, Any]) -> None:
    for name, file in about["files"].items():
        print(f"{target / name}: {file['tokens']:,} tokens of {file['bytes']:,} bytes, sha256 {file['sha256'][:12]}…")
    if about["empty"]:
        print(f"skipped, having no text: {about['empty']:,}")


def _fineweb(request: Data) -> None:
    from reroll.data.prepare import download

    download(request.to or Path(request.name), request.shards)


def _openwebtext(request: Data) -> None:
    from reroll.data.prepare import openwebtext

    target = request.to or Path(request.name)
    about = openwebtext(
        target, request.shards, request.tokenizer or "gpt2", max_vocab=request.max_vocab, shard=request.shard
    )
    _print_shards(target, about)
    print(f"train on it: reroll train cdrge-lstm-owt --path {target}")


SERIES, TOKENS = "path to every", "path to field tokenizer max_vocab shard"
PREPARE = {
    "eigenworms": (_series, SERIES), "ts": (_series, SERIES), "tokens": (_tokens, TOKENS),
    "fineweb": (_fineweb, "to shards"), "openwebtext": (_openwebtext, "to shards tokenizer max_vocab shard"),
}  # fmt: skip
"""What can be prepared, and the flags that each takes."""
