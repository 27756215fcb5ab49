"""The machines that the locks are for: CPython on x86_64 Linux with glibc 2.34 or newer (Debian 12, Ubuntu 22.04, RHEL 9).

Shared by ``tools/lock``, which picks wheels for such a machine, and ``tools/wheelhouse``, which fetches them on a
controller that may be another kind of machine with another Python.
"""

from __future__ import annotations

from packaging.markers import Environment, Marker
from packaging.tags import Tag, compatible_tags, cpython_tags

# PEP 600: a host runs the wheels of its own glibc and of every older one; three old versions have a second name.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)] + [
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
    "linux_x86_64",
]
ABIS = ("abi3", "none")


def supported_tags(python: str) -> list[Tag]:
    """Return the wheel tags that ``python`` (``3.11``) can use there, the most specific one first."""
    major, minor = (int(part) for part in python.split("."))
    version, interpreter = (major, minor), f"cp{major}{minor}"
    return [
        *cpython_tags(version, abis=[interpreter, *ABIS], platforms=PLATFORMS),
        *compatible_tags(version, interpreter, PLATFORMS),
    ]


def applies(marker: Marker | None, python: str) -> bool:
    """Return whether a requirement with this marker is wanted by ``python`` (``3.11``) there."""
    if marker is None:
        return True
    environment: Environment = {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    return marker.evaluate(dict(environment))
