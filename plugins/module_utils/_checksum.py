# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Checksums of large files: at the speed of the disk, in little memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

from ._manifest import File

#: Bytes read at a time. hashlib lets other threads run while it works on a piece of this size.
CHUNK = 1 << 20


class Stopped(Exception):
    """Another file's failure ended the work on this one."""


def workers() -> int:
    """How many files to work on at a time: one a processor; more than 8 would not read faster."""
    return min(8, len(os.sched_getaffinity(0)))


def digest(
    path: str,
    git: bool = False,
    advance: Callable[[int], object] = lambda _: None,
    stop: threading.Event | None = None,
) -> File:
    """Size and SHA-256 of a file, with ``git`` also the identifier that git gives its content.

    ``advance`` is told of the bytes as they are read. Raises Stopped once ``stop`` is set.
    """
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        sums = [hashlib.sha256()]
        if git:
            sums.append(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
        buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
        done = 0
        while count := stream.readinto(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            for one in sums:
                one.update(buffer[:count])
            done += count
            advance(count)
    return File(done, sums[0].hexdigest(), sums[1].hexdigest() if git else "")


def complaint(found: File, wanted: File) -> str:
    """What is wrong with a file, or the empty string."""
    if found.size != wanted.size:
        return f"has {found.size} bytes, wanted {wanted.size}"
    if wanted.sha256 and found.sha256 != wanted.sha256:
        return f"has SHA-256 {found.sha256}, wanted {wanted.sha256}"
    if wanted.git_sha1 and found.git_sha1 != wanted.git_sha1:
        return f"has the git blob {found.git_sha1}, wanted {wanted.git_sha1}"
    return ""
