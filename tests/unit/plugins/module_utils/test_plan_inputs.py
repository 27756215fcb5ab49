"""Devices and checkpoint as the memory plan takes them."""

from __future__ import annotations

import json
import struct

from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Gpu, Process
from ansible_collections.nvl.vllm.plugins.module_utils._plan_inputs import checkpoint_facts, gpu_devices, memory_device

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
