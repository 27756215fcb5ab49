# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What the memory plan needs to know of a host: its devices and, where it is there already, the checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ._checkpoint import RECORDS, read_record
from ._driver import PciGpu
from ._gpu_info import Gpu
from ._host import match_gpus
from ._memory_budget import MemoryPlanError, device_by_name
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


class BusDevices(NamedTuple):
    """GPUs as gpu_devices gives them, what is wrong with the declared ones, and what to tell besides."""

    devices: list[dict[str, Any]]
    errors: list[str]
    notes: list[str]


def bus_devices(gpus: Sequence[PciGpu], declared: Mapping[str, Iterable[int | str]]) -> BusDevices:
    """The GPUs while no driver can be asked: by the PCI bus, whose order is that of nvidia-smi's indexes.

    ``declared`` are the GPUs of each instance by its name. Where one of them is not there or cannot be planned for,
    there are no devices. Sizes in MiB.
    """
    seen = ", ".join(f"{index} {gpu.name} ({gpu.address})" for index, gpu in enumerate(gpus))
    notes = [f"the GPUs are taken from the PCI bus, before the driver is installed: {seen}"]
    devices = []
    for index, gpu in enumerate(gpus):
        try:
            total = device_by_name(gpu.name).total_mib
        except MemoryPlanError:
            notes.append(
                f"GPU {index} ({gpu.name}) is left out of the memory plan until the driver is installed, as how much "
                "memory such a board has is not known here"
            )
            continue
        devices.append(
            {
                "index": index,
                "uuid": "",
                "name": gpu.name,
                "total_mib": total,
                "reserved_mib": -1,
                "free_mib": -1,
                "processes": [],
            }
        )
    by_index: dict[str, list[int | str]] = {}
    for name, wanted in declared.items():
        by_index[name] = [gpu for gpu in wanted if isinstance(gpu, int)]
        notes += [
            f"GPU {gpu} of instance {name} is looked up, and planned for, once the driver is installed, as only the "
            "driver knows UUIDs"
            for gpu in wanted
            if not isinstance(gpu, int)
        ]
    errors = match_gpus(by_index, {index: gpu.address for index, gpu in enumerate(gpus)})[1]
    planned = {device["index"] for device in devices}
    complete = all(gpu in planned for wanted in declared.values() for gpu in wanted)
    return BusDevices(devices if complete and not errors else [], errors, notes)


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
