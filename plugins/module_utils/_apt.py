# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What apt says, read: versions on offer, what an installation would do, and why one failed. Text in, values out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_INST = re.compile(r"^Inst (\S+?)(?::\S+)? (?:\[(\S+)\] )?\((\S+)", re.MULTILINE)
_REMV = re.compile(r"^Remv (\S+?)(?::\S+)? \[(\S+)\]", re.MULTILINE)
_URI = re.compile(r"^'(\S+)' (\S+) \d+", re.MULTILINE)
#: What apt writes as it works, of no use in a sentence about a failure.
_NOISE = re.compile(r"^(E|W|N|dpkg): ")


class Step(NamedTuple):
    """One package of a planned installation. ``before`` is empty for a new one, ``after`` for one that goes."""

    name: str
    before: str
    after: str


def offers(madison: str, repository: str) -> dict[str, list[str]]:
    """Versions that a repository (URI) offers by package, best first, from the output of ``apt-cache madison``.

    Others can have packages of the same names: Ubuntu's archive has its own builds of the driver.
    """
    found: dict[str, list[str]] = {}
    for line in madison.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) == 3 and columns[2].split()[0].rstrip("/") == repository.rstrip("/"):
            versions = found.setdefault(columns[0], [])
            if columns[1] not in versions:
                versions.append(columns[1])
    return found


def upstream(version: str) -> str:
    """The version less epoch and Debian's revision: 580.95.05 of 1:580.95.05-1ubuntu1."""
    without_epoch = version.rpartition(":")[2]
    return without_epoch.rpartition("-")[0] or without_epoch


def choose(names: Iterable[str], wanted: str, offered: Mapping[str, list[str]]) -> tuple[dict[str, str], list[str]]:
    """The offered version of each package that is ``wanted`` upstream, and a sentence for each that has none.

    The revision cannot be guessed: it is -1 on Debian and -0ubuntu1 or -1ubuntu1 on Ubuntu.
    """
    chosen: dict[str, str] = {}
    complaints: list[str] = []
    for name in names:
        version = next((one for one in offered.get(name, []) if upstream(one) == wanted), None)
        if version:
            chosen[name] = version
        elif offered.get(name):
            have = ", ".join(dict.fromkeys(upstream(one) for one in offered[name]))
            complaints.append(
                f"cuda_driver_version is {wanted}, and of {name} the repository has {have}: declare one of these"
            )
        else:
            complaints.append(
                f"the repository has no package {name}: its index is not complete, or NVIDIA has changed the name"
            )
    return chosen, complaints


def steps(simulation: str) -> list[Step]:
    """What ``apt-get --simulate install`` would do, in its order."""
    found = [(match.start(), Step(match[1], match[2] or "", match[3])) for match in _INST.finditer(simulation)]
    found += [(match.start(), Step(match[1], match[2], "")) for match in _REMV.finditer(simulation)]
    return [step for _, step in sorted(found)]


def local_files(uris: str, root: str) -> list[str]:
    """Files below ``root`` that ``apt-get --print-uris install`` would take, relative to it."""
    paths = [unquote(urlsplit(match[1]).path) for match in _URI.finditer(uris)]
    return [path[len(root) :].lstrip("/") for path in paths if path.startswith(root.rstrip("/") + "/")]


def reason(output: str) -> str:
    """Why apt or dpkg failed, in one line, from what it wrote."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if _NOISE.match(line)] or lines[-1:]
    # Of a package that could not be configured the packages that depend on it are told besides; the first is the cause.
    errors = [line for line in told if not line.startswith("W: ")] or told
    return "; ".join(dict.fromkeys(_NOISE.sub("", line) for line in errors[:3])) or "it wrote nothing"
