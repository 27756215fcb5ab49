"""Devices and checkpoint as the memory plan takes them."""

from __future__ import annotations

import json
import struct

from ansible_collections.nvl.vllm.plugins.module_utils._driver import PciGpu
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Gpu, Process
from ansible_collections.nvl.vllm.plugins.module_utils._memory_budget import Device
from ansible_collections.nvl.vllm.plugins.module_utils._plan_inputs import (
    bus_devices,
    checkpoint_facts,
    gpu_devices,
    memory_device,
)

OURS = 998
GPU = Gpu(
    pci="00000000:AD:00.0",
    index=0,
    uuid="GPU-1",
    name="NVIDIA H100 NVL",
    total_mib=95830,
    reserved_mib=594,
    free_mib=95235,
)


def with_processes(*processes, free_mib):
    return Gpu(**{**GPU.__dict__, "processes": list(processes), "free_mib": free_mib})


def test_an_idle_gpu_is_taken_as_it_is():
    assert gpu_devices([GPU], [OURS]) == [
        {
            "index": 0,
            "uuid": "GPU-1",
            "name": "NVIDIA H100 NVL",
            "total_mib": 95830,
            "reserved_mib": 594,
            "free_mib": 95235,
            "processes": [],
        }
    ]


def test_what_our_engine_holds_is_free_for_its_successor():
    busy = with_processes(Process(41, "VLLM::EngineCore", 79000, OURS), free_mib=16235)
    (device,) = gpu_devices([busy], [OURS])
    assert (device["free_mib"], device["processes"]) == (-1, [])


def test_what_others_hold_is_not():
    engine, other = Process(41, "VLLM::EngineCore", 60000, OURS), Process(42, "python3", 9000, 1000)
    (device,) = gpu_devices([with_processes(engine, other, free_mib=26000)], [OURS])
    assert (device["free_mib"], device["processes"]) == (-1, [{"name": "python3", "pid": 42, "mib": 9000}])
    (device,) = gpu_devices([with_processes(other, free_mib=86000)], [OURS])
    assert device["free_mib"] == 86000


def test_a_lost_gpu_is_no_device():
    assert gpu_devices([Gpu(pci="00000000:AE:00.0", lost=True)], [OURS]) == []


# Before there is a driver

FIRST = PciGpu("0000:ad:00.0", "2321", "NVIDIA H100 NVL")
SECOND = PciGpu("0000:ae:00.0", "2321", "NVIDIA H100 NVL")
STRANGE = PciGpu("0000:af:00.0", "ffff", "NVIDIA device 10de:ffff")
SEEN = (
    "the GPUs are taken from the PCI bus, before the driver is installed: 0 NVIDIA H100 NVL (0000:ad:00.0), "
    "1 NVIDIA H100 NVL (0000:ae:00.0)"
)


def test_gpus_on_the_bus_are_idle_boards_of_their_name():
    devices, errors, notes = bus_devices([FIRST, SECOND], {"primary": [0], "secondary": [1]})
    assert devices == [
        {
            "index": index,
            "uuid": "",
            "name": "NVIDIA H100 NVL",
            "total_mib": 95830,
            "reserved_mib": -1,
            "free_mib": -1,
            "processes": [],
        }
        for index in (0, 1)
    ]
    assert (errors, notes) == ([], [SEEN])


def test_a_board_on_the_bus_is_planned_as_the_driver_would_tell_it():
    (device,) = bus_devices([FIRST], {"primary": [0]}).devices
    keys = ("index", "name", "total_mib", "reserved_mib", "free_mib")
    planned = Device(**{key: device[key] for key in keys})
    told = Device(0, "NVIDIA H100 NVL", 95830, reserved_mib=594, free_mib=95235)
    assert abs(planned.total_gib - told.total_gib) < 0.1
    assert planned.foreign_gib == 0


def test_a_declared_gpu_that_is_not_on_the_bus_is_an_error_and_there_is_no_plan():
    devices, errors, _ = bus_devices([FIRST, SECOND], {"primary": [0], "secondary": [2]})
    assert devices == []
    assert errors == ["GPU 2 of instance secondary is not there: the host has 0 (0000:ad:00.0), 1 (0000:ae:00.0)"]


def test_a_gpu_that_is_declared_twice_is_an_error():
    devices, errors, _ = bus_devices([FIRST], {"primary": [0, 0]})
    assert devices == []
    assert errors == ["GPU 0 of instance primary is 0000:ad:00.0, which it has already: name each GPU once"]


def test_a_gpu_that_is_declared_by_uuid_is_no_error_but_cannot_be_planned():
    devices, errors, notes = bus_devices([FIRST, SECOND], {"primary": [0], "secondary": ["GPU-5d1c"]})
    assert (devices, errors) == ([], [])
    assert notes == [
        SEEN,
        "GPU GPU-5d1c of instance secondary is looked up, and planned for, once the driver is installed, as only the "
        "driver knows UUIDs",
    ]


def test_an_unknown_board_that_nobody_uses_is_left_out():
    devices, errors, notes = bus_devices([STRANGE, FIRST], {"primary": [1]})
    assert ([device["index"] for device in devices], errors) == ([1], [])
    assert notes[1:] == [
        "GPU 0 (NVIDIA device 10de:ffff) is left out of the memory plan until the driver is installed, as how much "
        "memory such a board has is not known here"
    ]


def test_an_unknown_board_that_is_declared_leaves_no_plan():
    devices, errors, notes = bus_devices([STRANGE, SECOND], {"primary": [0], "secondary": [1]})
    assert (devices, errors, len(notes)) == ([], [], 2)


def test_memory_is_that_of_the_host_or_of_its_limit():
    meminfo = "MemTotal:       24685000 kB\nMemFree: 1 kB\n"
    assert memory_device(meminfo) == {"index": 0, "name": "CPU", "total_mib": 24106}
    assert memory_device(meminfo, ["max\n", ""])["total_mib"] == 24106
    assert memory_device(meminfo, [f"{8 * 2**30}\n"])["total_mib"] == 8192


def test_a_checkpoint_without_a_record_is_read_from_its_files(tmp_path):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x" * 12)
    assert checkpoint_facts(str(tmp_path), str(tmp_path / "records")) == {}
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    assert checkpoint_facts(str(tmp_path), str(tmp_path / "records")) == {
        "config": {"model_type": "gpt_oss"},
        "weight_bytes": 12,
    }
