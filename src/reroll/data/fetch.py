"""Files from the network: what is whole is left alone, interrupted downloads are resumed, damaged ones discarded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reroll.data.corpus import CHUNK
from reroll.data.shards import sha256_of
from reroll.errors import RunError, UsageError

Check = Callable[[Path], object]
"""Raises `UsageError` where a file is not of the kind that it should be."""


def fetch(url: str, path: Path, check: Check, say: Callable[[str], None], known: str = "") -> bool:
    """Have what is at a URL in a file, and return whether it had to be fetched.

    Args:
        check: is called with the file, before it takes its place.
        known: the SHA-256 of the file; empty: the one that the server names, if it does.

    Raises:
        RunError: if the network fails (what has come is kept), or the file is not what it should be.
    """
    try:
        if path.exists() and _is_whole(path, known, url, check):
            return False
        say(f"fetching {path.name}")
        _fetch(url, path, check)
    except OSError as error:  # of urllib too
        raise RunError(f"{url} could not be fetched ({error}); run the command again to go on.") from None
    return True


def _is_whole(path: Path, known: str, url: str, check: Check) -> bool:
    """Whether a file is what it should be: by the checksum that is known, else by what the server says."""
    try:
        check(path)
    except UsageError:
        return False
    if not known:
        with contextlib.suppress(OSError):  # without a network it is what it is
            answer, known = _open(urllib.request.Request(url, method="HEAD"))
            answer.close()
    return not known or sha256_of(path) == known


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the checksum that one names: the storage it leads to does not know it."""

    checksum = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.checksum = self.checksum or _checksum(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checksum(headers: Any) -> str:
    """The SHA-256 in the headers of an answer; empty if there is none."""
    tag = (headers.get("X-Linked-ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else ""


def _open(request: urllib.request.Request) -> tuple[Any, str]:
    """The answer to a request, and the SHA-256 that it or a redirect to it names."""
    redirects = _Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        answer = error  # the part that is asked for begins at the end
    return answer, redirects.checksum or _checksum(answer.headers)


def _fetch(url: str, target: Path, check: Check) -> None:
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    answer, expected = _open(urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {}))
    left = 0
    with answer:
        if answer.status == 416:
            if (answer.headers.get("Content-Range") or "").rpartition("/")[2] != str(have):
                part.unlink()  # longer than the file
                raise ConnectionError("what was fetched before is not a part of it")
        else:
            with part.open("ab") as file:
                if have and answer.status != 206:  # a server that begins again
                    file.truncate(0)
                left = int(answer.headers.get("Content-Length") or 0)
                while block := answer.read(CHUNK):
                    left -= file.write(block)
    if left > 0:
        raise ConnectionError(f"the connection ended {left} bytes early")
    try:
        with part.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest() if expected else ""
        if got != expected:
            raise RunError(
                f"{target.name} arrived damaged (SHA-256 {got[:12]}…, not {expected[:12]}…); run the command again."
            )
        check(part)
    except (UsageError, RunError) as error:
        part.unlink()
        discarded = f"The download of {url} is discarded: " if isinstance(error, UsageError) else ""
        raise RunError(f"{discarded}{error}") from None
    os.replace(part, target)
