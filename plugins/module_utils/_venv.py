# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Releases of vLLM: a directory per locked set of packages, complete or not there.

A release is a virtual environment whose last written file is its marker. A directory without a
marker is what an interrupted run left, and nothing can be using it, because the ``current`` link
is only ever set to a complete release.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._json_file import read_object, write_object

MARKER = ".release.json"

_CAUSE = re.compile(r"^\s*(?:error|cause|Caused by|x|\u00d7|╰─▶|├─▶):?\s*(.+)$", re.IGNORECASE)
_UNREACHABLE = (
    "dns error",
    "failed to lookup",
    "client error (connect)",
    "connection refused",
    "timed out",
    "network is unreachable",
    "no route to host",
    "tls",
    "certificate",
)


class Supply(NamedTuple):
    """Where packages come from: a directory of wheels on the host, or package indexes."""

    wheelhouse: str
    index_urls: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.wheelhouse:
            return f"wheelhouse {self.wheelhouse}"
        return "index " + (", ".join(self.index_urls) or "of the host's own configuration")


def read_marker(release: str) -> dict[str, Any] | None:
    """The marker of a complete release, or None where the release is not there or not complete."""
    return read_object(os.path.join(release, MARKER)) or None


def write_marker(release: str, marker: Mapping[str, Any]) -> None:
    """Declare the release complete."""
    write_object(os.path.join(release, MARKER), marker)


def locked_packages(lock_text: str) -> list[str]:
    """``name==version`` of every requirement of a lock file, in its order."""
    found = re.findall(r"^([A-Za-z0-9][\w.\-]*(?:\[[^\]]*\])?==[^\s;\\]+)", lock_text, re.MULTILINE)
    return [re.sub(r"\[[^\]]*\]", "", name) for name in found]


def supply_options(supply: Supply) -> list[str]:
    """The options of ``uv pip install`` (and of pip, which names them alike) for a supply."""
    if supply.wheelhouse:
        return ["--no-index", "--find-links", supply.wheelhouse]
    options: list[str] = []
    for number, url in enumerate(supply.index_urls):
        options += ["--index-url" if number == 0 else "--extra-index-url", url]
    return options


def explain_failure(stderr: str, supply: Supply, host: str) -> str:
    """One sentence for a failed ``uv pip install``: what, where, and what to change.

    The wordings are those of uv 0.9 to 0.13 and pip 23 and newer; anything else is passed on as
    its last cause.
    """
    causes = [m.group(1).strip() for m in map(_CAUSE.match, stderr.splitlines()) if m]
    if not causes:
        causes = [line.strip() for line in stderr.splitlines() if line.strip()][-1:]
    text = stderr.lower()
    package = re.search(r"(?:Failed to download|build|Hash mismatch for) `([^`]+)`", stderr)
    name = package.group(1) if package else "a package"

    if "hash mismatch" in text or "do not match the hashes" in text:
        computed = re.search(r"Computed:\s+(sha256:[0-9a-f]+)", stderr)
        return (
            f"{host}: {name} from the {supply} has a hash that the lock file does not name"
            f"{' (' + computed.group(1) + ')' if computed else ''}: the file was damaged or replaced; "
            "fetch it again, or lock again if the change was meant"
        )
    if "no space left" in text or "disk quota" in text:
        return f"{host}: the disk is full while installing {name}: free space, or set vllm_root to a larger file system"
    if "failed to extract archive" in text or "badzipfile" in text:
        return f"{host}: {name} in the {supply} is truncated or damaged: fetch the file again"
    if any(word in text for word in _UNREACHABLE) and not supply.wheelhouse:
        return (
            f"{host}: cannot reach the package {supply} ({causes[-1]}): check vllm_index_urls and the proxy, "
            "or set vllm_wheelhouse to a directory that the controller filled"
        )
    if "not found in the provided package locations" in text or "no solution found" in text:
        return f"{host}: the {supply} does not hold what the lock file names ({causes[-1]}): fill it from that file"
    return f"{host}: installing from the {supply} failed: {'; '.join(causes[-2:]) or 'it printed nothing'}"
