"""The source files of installed packages as token shards: text that every installation of reroll has, byte for byte.

    shards_of("cpu-bytes")             a folder of shards, made on the first call

Bytes are tokens; every file follows a zero byte, which no source file holds. A tenth of the files, by a hash of their
names, is held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from reroll.data.cache import cache_folder
from reroll.data.corpus import is_held_out
from reroll.data.tokens import ABOUT, write_shard
from reroll.errors import UsageError


@dataclass(frozen=True)
class Packages:
    """The versions of packages, and the SHA-256 of their source files in the order of their names."""

    versions: Mapping[str, str]
    sha256: str


PACKAGES = {
    "cpu-bytes": Packages(
        {"numpy": "2.4.6", "pandas": "3.1.1"}, "c2c071553b06246d87b31f507beded1d06cb65d887bcfb4a65b0f31102b54d59"
    ),
}
"""Every text of packages, by the name that stands for a path."""


def shards_of(path: str) -> str:
    """Return the folder with the shards of a text of packages; another path as it is.

    Raises:
        UsageError: if a package is missing, or has other files: with the line that installs the right ones.
    """
    if path not in PACKAGES:
        return path
    packages = PACKAGES[path]
    folder = cache_folder() / f"{path}-{packages.sha256[:16]}"
    if (folder / ABOUT).exists():
        return str(folder)
    files = {key: text for package in packages.versions for key, text in source_files(package).items()}
    if digest(files) != packages.sha256:
        wanted = " ".join(f"{package}=={version}" for package, version in packages.versions.items())
        raise UsageError(f"{path} is the text of other files than those installed here: pip install {wanted}")
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    for label, number in (("train", 1), ("val", 0)):
        texts = [b"\0" + text for key, text in sorted(files.items()) if is_held_out(key) == (label == "val")]
        write_shard(folder / f"bytes_{label}_{number:06d}.bin", np.frombuffer(b"".join(texts), np.uint8))
        about[f"bytes_{label}_{number:06d}.bin"] = {"tokens": sum(map(len, texts))}
    (folder / ABOUT).write_text(json.dumps({"tokenizer": {"name": "byte"}, "files": about}))  # last: now it is whole
    return str(folder)


def source_files(package: str) -> dict[str, bytes]:
    """Return the .py files of an installed package by their names in its wheel."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"the package {package} is not installed: pip install {package}") from None
    return {str(f): Path(str(f.locate())).read_bytes() for f in files if f.suffix == ".py" and f.parts[0] == package}


def digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of names and contents in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return total.hexdigest()
