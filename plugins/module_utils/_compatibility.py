# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Which NVIDIA driver a release of vLLM wants, and which one a CUDA toolkit: published figures. Pure.

vLLM's wheel on PyPI pins one version of torch, and torch's wheel there brings the libraries of one
CUDA version. CUDA's minor-version compatibility lets these run on any driver from the first one of
their major version on. What a toolkit compiles to PTX is not covered by that: it wants a driver
that knows the toolkit's own minor version.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class UnknownRelease(ValueError):
    """A release of vLLM that is older than what is known here; the message is one sentence."""


class Build(NamedTuple):
    """What a release of vLLM is built with, and the oldest driver that runs it.

    ``assumed``: the release is newer than what is known here, so this is the newest one that is.
    """

    torch: str
    cuda: str
    driver: str
    assumed: bool = False


#: First release of vLLM, torch that its wheel requires on PyPI, CUDA of that torch's wheel on PyPI.
RELEASES = (
    ((0, 10, 0), "2.7.1", "12.6"),
    ((0, 10, 2), "2.8.0", "12.8"),
    ((0, 11, 1), "2.9.0", "12.8"),
    ((0, 14, 0), "2.9.1", "12.8"),
    ((0, 17, 0), "2.10.0", "12.8"),
    ((0, 20, 0), "2.11.0", "13.0"),
    ((0, 27, 0), "2.13.0", "13.0"),
    ((0, 33, 0), "2.14.0", "13.0"),
)
#: The newest series that was looked up.
NEWEST = (0, 33)

#: Oldest driver by CUDA major version: "CUDA minor version compatibility" of the CUDA toolkit's release notes.
#: They give the branches (525 and 580); these are the first releases of each, which came with 12.0 and 13.0.
MINIMUM = {12: "525.60.13", 13: "580.65.06"}

#: Driver that came with the first release of a series: "CUDA Toolkit and Corresponding Driver Versions" there.
TOOLKITS = (
    ((11, 8), "520.61.05"),
    ((12, 0), "525.60.13"),
    ((12, 1), "530.30.02"),
    ((12, 2), "535.54.03"),
    ((12, 3), "545.23.06"),
    ((12, 4), "550.54.14"),
    ((12, 5), "555.42.02"),
    ((12, 6), "560.28.03"),
    ((12, 8), "570.26"),
    ((12, 9), "575.51.03"),
    ((13, 0), "580.65.06"),
    ((13, 1), "590.44.01"),
    ((13, 2), "595.45.04"),
    ((13, 3), "610.43.02"),
    # Only the branch is published, in the release notes of CUTLASS 4.8.
    ((13, 4), "615"),
)


def version_parts(text: str) -> tuple[int, ...]:
    """(580, 95, 5) from 580.95.05, also from 580.95.05-1. Raises ValueError for a text without a number."""
    match = re.search(r"\d+(?:\.\d+)*", text)
    if match is None:
        raise ValueError(f"the version is {text!r}: wanted numbers with dots between them, such as 580.95.05")
    return tuple(int(part) for part in match[0].split("."))


def at_least(found: str, wanted: str) -> bool:
    """Whether a version can be ``wanted`` or newer. What it leaves open counts as new enough: 580 may be 580.95.05.

    Raises ValueError for what is no version.
    """
    have, need = version_parts(found), version_parts(wanted)
    shared = min(len(have), len(need))
    return have[:shared] >= need[:shared]


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


def _minimum(cuda: str) -> str:
    return MINIMUM[version_parts(cuda)[0]]


def build_of(vllm_version: str) -> Build:
    """What a release is built with; a version without a number, such as nightly, counts as newer than all.

    Raises UnknownRelease for one that is older than what is known.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", vllm_version.strip())
    release = (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (NEWEST[0], NEWEST[1] + 1, 0)
    known = [(torch, cuda) for first, torch, cuda in RELEASES if first <= release]
    if not known:
        first = _dotted(RELEASES[0][0])
        raise UnknownRelease(
            f"the version of vLLM is {vllm_version}, and which driver a release wants is known from {first} on: "
            f"deploy {first} or newer"
        )
    torch, cuda = known[-1]
    return Build(torch, cuda, _minimum(cuda), release[:2] > NEWEST)


def driver_complaint(vllm_version: str, driver_version: str) -> str:
    """Why a driver does not run a release of vLLM, in one sentence; empty where it does.

    Raises UnknownRelease for a release that is too old to be known, and ValueError for a driver that is no version.
    """
    build = build_of(vllm_version)
    if at_least(driver_version, build.driver):
        return ""
    guess = f" (assumed to be as that of {_dotted(NEWEST)}, the newest that is known here)" if build.assumed else ""
    fitting = [at_least(driver_version, _minimum(cuda)) for _, _, cuda in RELEASES]
    older = f", or a vLLM older than {_dotted(RELEASES[fitting.index(False)][0])}" if fitting[0] else ""
    return (
        f"the NVIDIA driver is {driver_version}, which is too old for vLLM {vllm_version}: its torch {build.torch}"
        f"{guess} is built for CUDA {build.cuda}, which wants driver {build.driver} or newer; take such a driver{older}"
    )


def toolkit_complaint(toolkit: str, driver_version: str) -> str:
    """Why a driver may not run what a toolkit (a series such as 13.0) compiles; empty where it does.

    A series that is newer than what is known here wants at least what the newest one does. Raises ValueError for what
    is no series or no version.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)*", toolkit.strip())
    if match is None:
        raise ValueError(f"the CUDA toolkit is {toolkit!r}: wanted a series such as 13.0")
    series = (int(match[1]), int(match[2]))
    needed = [driver for first, driver in TOOLKITS if first <= series]
    if not needed or at_least(driver_version, needed[-1]):
        return ""
    known = [first for first, driver in TOOLKITS if at_least(driver_version, driver)]
    older = f", or toolkit {_dotted(known[-1])} or older" if known else ""
    return (
        f"the CUDA toolkit is {toolkit}, which came with driver {needed[-1]} or newer, and the NVIDIA driver is "
        f"{driver_version}, so programs that it compiles may not run; take such a driver{older}"
    )
