# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Bundles: one directory with all that hosts without a network need.

::

    README.md        how to use it
    bundle.json      what it was made for
    SHA256SUMS       every other file; `sha256sum --check SHA256SUMS` works
    wheelhouse/      the wheels of the lock
    model/           the files of the checkpoint, model.json its manifest
    packages/SUITE/  Debian packages with the distribution's own signatures

What is large is proven where it is used: wheels by the lock's hashes when they are installed, the
checkpoint by its manifest on the host, packages by apt. Here the small files are, which say what the
large ones must be, and that none is absent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ._checksum import digest
from ._json_file import read_object

SUMS = "SHA256SUMS"
DESCRIPTION = "bundle.json"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def files(path: str) -> Iterator[str]:
    """The bundle's files but SHA256SUMS, relative, sorted; hidden ones belong to unfinished work."""
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(folder, name), path)
            if not name.startswith(".") and relative != SUMS:
                yield relative


def read_sums(text: str) -> dict[str, str]:
    """File to SHA-256, from the text of SHA256SUMS. Raises ValueError for a line that is none of sha256sum's."""
    found = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{SUMS} has a line that sha256sum does not write: {line[:80]}")
        found[match[2]] = match[1]
    return found


def proven_later(name: str) -> bool:
    """Whether the file is checked where it is used, against what a smaller file of the bundle says."""
    return name.startswith("model/") or name.endswith((".whl", ".deb"))


def complaints(path: str, pinned: str, wanted: Mapping[str, Any]) -> list[str]:
    """Why the bundle cannot be used, one sentence each.

    ``pinned`` is the SHA-256 that SHA256SUMS must have, or empty. ``wanted`` are the fields that
    bundle.json must have, such as ``vllm_version``.
    """
    sums_path = os.path.join(path, SUMS)
    absent = [name for name in (SUMS, DESCRIPTION) if not os.path.isfile(os.path.join(path, name))]
    if absent:
        return [f"vllm_bundle is {path}, which is no bundle: it has no {absent[0]} (`make bundle` makes one)"]
    found = digest(sums_path).sha256
    if pinned and found != pinned:
        return [f"{sums_path} has SHA-256 {found}, vllm_bundle_sha256 is {pinned}: this is not the bundle you made"]
    try:
        with open(sums_path, encoding="utf-8") as stream:
            sums = read_sums(stream.read())
    except ValueError as error:
        return [f"{path}: {error}: copy the bundle again"]
    if DESCRIPTION not in sums:
        return [f"{sums_path} does not name {DESCRIPTION}: it is cut off; copy the bundle again"]
    errors = []
    for name, sha256 in sums.items():
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            errors.append(f"{file} is missing: copy the bundle again")
        elif not proven_later(name) and digest(file).sha256 != sha256:
            errors.append(f"{file} is not what {SUMS} says: it is damaged or was changed; copy the bundle again")
    if errors:
        return errors
    description = read_object(os.path.join(path, DESCRIPTION))
    return [
        f"the bundle {path} was made for {key} {description.get(key)!r}, this host wants {value!r}: make it again with "
        "this inventory, or deploy what it holds"
        for key, value in wanted.items()
        if description.get(key) != value
    ]
