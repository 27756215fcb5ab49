"""Facts of a real GPU: recorded answers of its nvidia-smi (``tests/unit/data/nvidia-smi/README.md``), read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_health, _gpu_info, _plan_inputs
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_budget as budgets
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_plan as planning
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Process
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import built_in

DATA = Path(__file__).parents[2] / "data" / "nvidia-smi"
#: The process of the busy state, as CUDA's driver counts it: 60 GiB, and 518 MiB for its CUDA context.
HOLDER = Process(652, "python3", 61958, 0)


class Replay:
    """A runner that answers as the recorded host did. What was not asked there was not installed there."""

    def __init__(self, directory):
        self.directory = directory
        self.calls = {tuple(call["argv"]): call for call in json.loads((directory / "calls.json").read_text())}

    def __call__(self, argv, timeout):
        call = self.calls.get(tuple(argv))
        if call is None:
            raise FileNotFoundError(argv[0])
        return call["status"], (self.directory / call["file"]).read_text(), call["stderr"]


def facts(state):
    return _gpu_info.read(Replay(DATA / state), uid_of=lambda pid: 0)


def device(state):
    (given,) = _plan_inputs.gpu_devices(facts(state).gpus, own_uids=[999])
    processes = tuple(budgets.Process(one["name"], one["pid"], one["mib"]) for one in given.pop("processes"))
    return budgets.Device(**given, processes=processes)


@pytest.mark.parametrize("state", ["h200-580-idle", "h200-580-busy"])
def test_an_h200(state):
    found = facts(state)
    (gpu,) = found.gpus
    assert (found.problem, found.host.problems, gpu.problems) == ("", [], [])
    assert (found.host.driver_version, found.host.kernel_module_version, found.host.cuda_version) == (
        "580.159.04",
        "580.159.04",
        "13.0",
    )
    assert found.host.kernel_log == "dmesg"
    assert (gpu.index, gpu.name, gpu.pci, gpu.compute_capability) == (0, "NVIDIA H200", "00000000:00:06.0", "9.0")
    assert (gpu.total_mib, gpu.reserved_mib) == (143771, 616)
    assert (gpu.ecc_mode, gpu.mig_mode, gpu.mig_pending, gpu.persistence_mode) == (
        "Enabled",
        "Disabled",
        "Disabled",
        "Enabled",
    )
    assert (gpu.ecc_uncorrected_volatile, gpu.ecc_uncorrected_aggregate) == (0, 0)
    assert (gpu.remap_pending, gpu.remap_failure, gpu.recovery_action) == (False, False, "None")
    assert (gpu.power_cap_w, gpu.power_default_w, gpu.power_max_w) == (700, 700, 700)
    assert gpu.sm_clock_max_mhz == 1980
    assert (gpu.xids, gpu.links) == ([], {})


def test_what_differs_where_a_program_holds_memory():
    (idle,), (busy,) = facts("h200-580-idle").gpus, facts("h200-580-busy").gpus
    assert (idle.used_mib, idle.free_mib, idle.processes) == (0, 143156, [])
    assert (busy.used_mib, busy.free_mib, busy.processes) == (61967, 81190, [HOLDER])
    assert (idle.throttle_reasons, busy.throttle_reasons) == (["gpu_idle"], [])
    assert (idle.temperature_c, busy.temperature_c) == (35, 36)
    assert (idle.sm_clock_mhz, busy.sm_clock_mhz) == (345, 1980)


def test_findings():
    wanted = _gpu_health.Wanted(min_driver="580", own_uids=[999])
    assert _gpu_health.findings(facts("h200-580-idle"), wanted, {}) == []
    (finding,) = _gpu_health.findings(facts("h200-580-busy"), wanted, {})
    assert (finding.rule, finding.severity) == ("foreign_process", "error")
    assert "process 652 (python3, user 0) holds 61958 MiB" in finding.sentence


def test_the_total_is_that_of_cuda():
    # torch.cuda.get_device_properties on the same host: total_memory 143155 MB; vLLM's log: 139.8 GiB.
    assert device("h200-580-idle").total_gib == 143155 / 1024
    assert device("h200-580-idle").foreign_gib == 0
    assert device("h200-580-busy").foreign_gib == pytest.approx(61967 / 1024, abs=0.01)


def test_a_plan_beside_a_program_names_it():
    wanted = planning.Wanted("primary", (0,), {"max-model-len": 131072}, {})
    for state, fits in (("h200-580-idle", True), ("h200-580-busy", False)):
        plan = planning.plan(planning.Host((device(state),), built_in("gpt-oss-120b"), (wanted,)))
        assert plan.fits is fits
        assert [True for error in plan.errors if "end python3 (652)" in error] == ([] if fits else [True])


@pytest.mark.parametrize(("utilization", "free", "wanted"), [(0.6127, 76.23, 85.66), (0.5661, 76.37, 79.14)])
def test_what_vllm_said_beside_an_engine_that_was_left_over(utilization, free, wanted):
    # vLLM 0.32.0 on the same host: "Free memory on device cuda:0 (76.23/139.8 GiB) on startup is less than desired GPU
    # memory utilization (0.6127, 85.66 GiB)", with 64454 MiB held by process 4085.
    gpu = replace(device("h200-580-idle"), free_mib=-1, processes=(budgets.Process("VLLM::EngineCore", 4085, 64454),))
    facts_of_model = built_in("gpt-oss-120b")
    settings = budgets.settings_of({"gpu-memory-utilization": utilization}, facts_of_model, gpu)
    mine = budgets.budget(facts_of_model, settings, gpu)
    shortage = budgets.start_shortage(settings, gpu, mine, budgets.PINNED)
    assert shortage.available == pytest.approx(free, abs=0.15)
    assert mine.requested_gib == pytest.approx(wanted, abs=0.005)
    assert shortage.free < 0
