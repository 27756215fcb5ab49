# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What the memory plan needs to know of a host: its devices and, where it is there already, the checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from typing import Any

from ._checkpoint import RECORDS, read_record
from ._gpu_info import Gpu
from ._structure import inspect

#: Files that limit the memory of all processes here: control groups of version 2 and 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def gpu_devices(gpus: Iterable[Gpu], own_uids: Collection[int]) -> list[dict[str, Any]]:
    """The GPUs as the module gpu_memory takes them, as if none of our engines ran.

    Where one does, what is free says nothing about what will be; then only foreign programs that are
    named count. Sizes in MiB.
    """
    devices = []
    for gpu in gpus:
        if gpu.index is None or gpu.total_mib is None:
            continue  # lost, or not to be read: told as a finding
        foreign = [process for process in gpu.processes if process.uid not in own_uids]
        ours = len(foreign) < len(gpu.processes)
        devices.append(
            {
                "index": gpu.index,
                "uuid": gpu.uuid or "",
                "name": gpu.name or "",
                "total_mib": gpu.total_mib,
                "reserved_mib": -1 if gpu.reserved_mib is None else gpu.reserved_mib,
                "free_mib": -1 if ours or gpu.free_mib is None else gpu.free_mib,
                "processes": [{"name": one.name, "pid": one.pid, "mib": one.mib or 0} for one in foreign],
            }
        )
    return devices


def memory_device(meminfo: str, limits: Iterable[str] = ()) -> dict[str, Any]:
    """The host's memory as a device, from the text of /proc/meminfo and of the files that limit it (bytes)."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    sizes = [int(total[1]) * 1024] if total else []
    sizes += [int(text) for text in limits if text.strip().isdigit()]
    return {"index": 0, "name": "CPU", "total_mib": min(sizes, default=0) // 2**20}


def checkpoint_facts(path: str, records: str = RECORDS) -> dict[str, Any]:
    """``config`` and ``weight_bytes`` of the checkpoint in a directory; empty where none is there yet."""
    record = read_record(path, records)
    if record is not None and os.path.isdir(path):
        return {"config": record.structure["config"], "weight_bytes": record.structure["weight_bytes"]}
    if not os.path.isfile(os.path.join(path, "config.json")):
        return {}
    names = [name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name))]
    found = inspect({name: os.path.join(path, name) for name in names})
    return {"config": found.config, "weight_bytes": found.weight_bytes} if found.weight_bytes else {}
