# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a checkpoint consists of: its files, each with size and checksum. Pure.

A manifest is a JSON object::

    {"repository": "openai/gpt-oss-120b",            # empty where it comes from no hub
     "revision": "b5c939de8f754692c1647ca79fbf85e8c1e70f8a",  # the hub's commit, or empty
     "files": {"config.json": {"size": 2089, "sha256": "..."}, ...}}  # size in bytes

A hub tells the SHA-256 of its large files (those in LFS or Xet) and the git blob identifier of the
small ones; both prove the content. In a manifest that is complete every file has its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class ManifestError(ValueError):
    """Why a text is no manifest; one sentence without the place where it stands."""


@dataclass(frozen=True)
class File:
    """One file: ``size`` in bytes, and what proves its content (one of the two at least).

    ``git_sha1`` is the identifier that git gives a blob: SHA-1 over ``blob SIZE``, a NUL and the content.
    """

    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Manifest:
    """All files of a checkpoint by their path relative to its directory."""

    files: Mapping[str, File]
    repository: str = ""
    revision: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def name(self) -> str:
        """Name of the directory that holds these files: the revision, or a digest of the manifest."""
        return self.revision or hashlib.sha256(self.dump().encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """The manifest as JSON has it."""
        files: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            files[path] = {"size": file.size}
            if file.sha256:
                files[path]["sha256"] = file.sha256
            if file.git_sha1:
                files[path]["git_sha1"] = file.git_sha1
        return {"repository": self.repository, "revision": self.revision, "files": files}

    def dump(self) -> str:
        """The manifest as text; the same manifest gives the same text."""
        return json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n"


def is_commit(revision: str) -> bool:
    """Whether this is a full commit, and not a branch or tag, which can move."""
    return bool(_SHA1.fullmatch(revision))


def parse(value: Any) -> Manifest:
    """The manifest in a JSON object or its text. Raises ManifestError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ManifestError(f"it is no JSON: {error}") from None
    if not isinstance(value, Mapping) or not isinstance(value.get("files"), Mapping) or not value["files"]:
        raise ManifestError("wanted an object with 'files', each with size and sha256, as tools/manifest writes it")
    for key in ("repository", "revision"):
        if not isinstance(value.get(key, ""), str):
            raise ManifestError(f"{key} is {value[key]!r}, wanted a string")
    # It becomes the name of a directory.
    revision = value.get("revision", "")
    if revision and not is_commit(revision):
        raise ManifestError(f"revision is {revision!r}, wanted a commit of 40 hexadecimal digits, or nothing")
    files = {str(path): _file(str(path), entry) for path, entry in value["files"].items()}
    return Manifest(files, value.get("repository", ""), revision)


def _file(path: str, entry: Any) -> File:
    # A manifest says which files to write, as root: it must not lead out of the directory.
    if "\\" in path or not path.isprintable() or any(part in ("", ".", "..") for part in path.split("/")):
        raise ManifestError(f"{path!r} is no path below the checkpoint's directory")
    if not isinstance(entry, Mapping) or type(entry.get("size")) is not int or entry["size"] < 0:
        raise ManifestError(f"{path} has no size in bytes")
    sha256, git_sha1 = str(entry.get("sha256", "")), str(entry.get("git_sha1", ""))
    if (sha256 and not _SHA256.fullmatch(sha256)) or (git_sha1 and not _SHA1.fullmatch(git_sha1)):
        raise ManifestError(f"{path} has a checksum that is no SHA-256 in 64 small hexadecimal digits")
    if not sha256 and not git_sha1:
        raise ManifestError(f"{path} has no sha256")
    return File(entry["size"], sha256, git_sha1)
