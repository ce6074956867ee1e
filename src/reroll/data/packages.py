"""The source files of installed packages as token shards: text that every installation of reroll has, byte for byte.

    shards_of("cpu-bytes")             a folder of shards, made on the first call

Bytes are tokens; every file follows a zero byte, which no source file holds. A tenth of the files, by a hash of their
names, is held out. Files that differ from wheel to wheel of a version are left out, and lines end in \\n, so that the
text is the same for every version of Python and every system.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from reroll.data.cache import cache_folder, replacing
from reroll.data.corpus import is_held_out
from reroll.data.shards import ABOUT, described, write_shard
from reroll.errors import UsageError


@dataclass(frozen=True)
class Packages:
    """The versions of packages, and the SHA-256 of their source files in the order of their names.

    Of the files to train on only `percent` of the bytes are taken, in the order of the hashes of their names.
    """

    versions: Mapping[str, str]
    sha256: str
    percent: int = 100


OF_A_WHEEL = re.compile(r"numpy/(distutils/.*|__config__\.py)|(numpy|pandas)/__init__\.py")
"""Files that depend on the version of Python, on the compiler, or on how Windows finds libraries."""
_BYTES = Packages(
    {"numpy": "2.4.6", "pandas": "3.1.1"}, "a42a11834b335aae836d85daa904518eb0447c1138f5bfdda4312b769907ddb1"
)
PACKAGES = {"cpu-bytes": _BYTES, "cpu-bytes-small": replace(_BYTES, percent=1)}
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
    files_about = {}
    trained = {key: text for key, text in files.items() if not is_held_out(key)}
    held_out = {key: text for key, text in files.items() if is_held_out(key)}
    for label, number, some in (("train", 1, _part(trained, packages.percent)), ("val", 0, held_out)):
        texts = [b"\0" + text for _, text in sorted(some.items())]
        file = folder / f"bytes_{label}_{number:06d}.bin"
        write_shard(file, np.frombuffer(b"".join(texts), np.uint8))
        files_about[file.name] = described(file, sum(map(len, texts)) - len(texts))
    about = {"tokenizer": {"name": "byte"}, "vocab": 256, "document": 0, "files": files_about}
    with replacing(folder / ABOUT) as out:  # last: now it is whole
        out.write(json.dumps(about).encode())
    return str(folder)


def source_files(package: str) -> dict[str, bytes]:
    """Return the .py files of an installed package by their names in its wheel, but those `OF_A_WHEEL`."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UsageError(f"the package {package} is not installed: pip install {package}") from None
    return {
        str(file): Path(str(file.locate())).read_bytes().replace(b"\r\n", b"\n")
        for file in files
        if file.suffix == ".py" and file.parts[0] == package and not OF_A_WHEEL.fullmatch(str(file))
    }


def _part(files: Mapping[str, bytes], percent: int) -> Mapping[str, bytes]:
    """The first files, in the order of the hashes of their names, of which the last is cut."""
    left, part = percent * sum(map(len, files.values())) // 100, {}
    for key in sorted(files, key=lambda key: hashlib.sha256(key.encode()).digest()):
        part[key] = files[key][:left]
        left -= len(part[key])
        if not left:
            return part
    return files


def digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of names and contents in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return total.hexdigest()
