"""The machines that the locks are for: CPython on x86_64 Linux with glibc 2.34 or newer.

Those are Debian 12, Ubuntu 22.04, RHEL 9 and later. Shared by ``tools/lock``, which picks wheels
for such a machine, and ``tools/wheelhouse``, which fetches them on a controller that may be another
kind of machine with another Python.
"""

from __future__ import annotations

from functools import lru_cache

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags

PYTHONS = ("3.11", "3.12", "3.13")
ABIS = ("abi3", "none")
# PEP 600: a host runs the wheels of its own glibc and of every older one; three have an older name.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


@lru_cache
def supported_tags(python: str) -> tuple[Tag, ...]:
    """Return the wheel tags that ``python`` (``3.11``) can use there, the best one first."""
    major, minor = (int(part) for part in python.split("."))
    version, interpreter = (major, minor), f"cp{major}{minor}"
    return (
        *cpython_tags(version, abis=[interpreter, *ABIS], platforms=PLATFORMS),
        *compatible_tags(version, interpreter, PLATFORMS),
    )


def applies(marker: Marker | None, python: str) -> bool:
    """Return whether a requirement with this marker is wanted by ``python`` (``3.11``) there."""
    there = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    return marker is None or marker.evaluate(there)
