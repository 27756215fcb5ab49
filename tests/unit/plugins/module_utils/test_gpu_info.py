"""GPUs as nvidia-smi tells of them: outputs written after recordings of several drivers, and the stand-in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import ASK_ALL, ASK_CSV, ASK_TOPOLOGY, Process, Xid

FAKES = Path(__file__).parents[3] / "fakes"
FIRST, SECOND = "00000000:AD:00.0", "00000000:AE:00.0"
FIRST_UUID, SECOND_UUID = (f"GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a000{n}" for n in (1, 2))

#: /proc/driver/nvidia/version with the proprietary and with the open kernel module.
PROPRIETARY = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3)  Sun Jul 27
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
#: Two lines of each form, between others, as the journal (short-iso) has them.
LOG = """\
2026-11-23T17:00:01+0000 gpu1 kernel: nvidia: loading out-of-tree module taints kernel.
2026-11-23T17:10:00+0000 gpu1 kernel: NVRM: Xid (PCI:0000:ad:00): 31, pid=912, name=python3, Ch 00000008, MMU Fault
2026-11-23T17:20:00+0000 gpu1 kernel: NVRM: Xid (PCI:0000:ad:00): 31, pid=913, name=python3, Ch 00000009, MMU Fault
2026-11-23T17:30:00+0000 gpu1 kernel: NVRM: Xid (PCI:0000:ae:00): 79, pid='<unknown>', name=<unknown>, GPU has \
fallen off the bus.
2026-11-23T17:30:00+0000 gpu1 kernel: NVRM: GPU 0000:ae:00.0: GPU has fallen off the bus.
"""


class Script:
    """A runner that answers from a table: a command's first words to (status, output), or to an exception."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def __call__(self, argv, timeout):
        self.asked.append(argv)
        if argv[0] == "nvidia-smi" and "nvidia_smi" not in self.answers:
            return _gpu_info.run_command(argv, timeout)
        key = {tuple(ASK_CSV): "csv", tuple(ASK_TOPOLOGY): "topology"}.get(tuple(argv), argv[0].replace("-", "_"))
        if key == "cat" and "module" in self.answers:
            key = "module"
        answer = self.answers.get(key, (1, ""))
        if isinstance(answer, Exception):
            raise answer
        return (*answer, "")


@pytest.fixture
def stand_in(monkeypatch):
    """Reads facts from the stand-in in a given state. Everything but nvidia-smi is scripted."""
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")

    def read(state, timeout=60.0, **answers):
        monkeypatch.setenv("NVIDIA_SMI_STATE", state)
        run = Script(**{"journalctl": (0, "2026-11-23T17:00:01+0000 gpu1 kernel: Linux\n"), **answers})
        facts = _gpu_info.read(run, timeout, uid_of=lambda pid: None)
        read.asked = run.asked
        return facts

    return read


# One look at a healthy host


def test_everything_about_two_idle_gpus(stand_in):
    facts = stand_in("idle", module=(0, OPEN))
    assert facts.problem == ""
    assert facts.host == _gpu_info.Host(
        driver_version="580.126.09",
        cuda_version="13.0",
        kernel_module_version="580.65.06",
        topology={"GPU0": {"GPU1": "NV12"}, "GPU1": {"GPU0": "NV12"}},
        kernel_log="journal",
    )
    assert facts.gpus[0] == _gpu_info.Gpu(
        pci=FIRST,
        index=0,
        uuid=FIRST_UUID,
        name="NVIDIA H100 NVL",
        total_mib=95830,
        reserved_mib=594,
        used_mib=0,
        free_mib=95235,
        compute_capability="9.0",
        ecc_mode="Enabled",
        ecc_uncorrected_volatile=0,
        ecc_uncorrected_aggregate=0,
        remapped_correctable=0,
        remapped_uncorrectable=0,
        remap_pending=False,
        remap_failure=False,
        recovery_action="None",
        mig_mode="Disabled",
        mig_pending="Disabled",
        persistence_mode="Enabled",
        power_cap_w=400.0,
        power_default_w=400.0,
        power_max_w=400.0,
        sm_clock_mhz=345,
        sm_clock_max_mhz=1785,
        throttle_reasons=["gpu_idle"],
        temperature_c=32,
        xids=[],
        links={"1": "NV12"},
        nvlink_peers=[1],
    )
    assert [(gpu.index, gpu.pci, gpu.uuid) for gpu in facts.gpus] == [(0, FIRST, FIRST_UUID), (1, SECOND, SECOND_UUID)]
    assert [argv for argv in stand_in.asked if argv[0] == "nvidia-smi"] == [ASK_ALL, ASK_CSV, ASK_TOPOLOGY]


@pytest.mark.parametrize(
    ("state", "driver", "cuda"),
    [("driver535", "535.216.01", "12.2"), ("driver550", "550.54.14", "12.4"), ("driver610", "610.57.04", "13.3")],
)
def test_other_branches_tell_the_same_of_a_gpu(stand_in, state, driver, cuda):
    facts = stand_in(state)
    assert (facts.host.driver_version, facts.host.cuda_version) == (driver, cuda)
    today, other = stand_in("idle").gpus[0], facts.gpus[0]
    if state != "driver610":  # before branch 560 nothing was told where nothing is to do
        assert other.recovery_action is None
    assert _gpu_info.replace(other, recovery_action="None") == today


def test_one_gpu_alone_has_no_links(stand_in):
    (gpu,) = stand_in("one").gpus
    assert (gpu.links, gpu.nvlink_peers) == ({}, [])


def test_processes_are_told_with_their_users(monkeypatch):
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("NVIDIA_SMI_STATE", "busy pid=77 process=/opt/x/bin/python3 mib=4096")
    facts = _gpu_info.read(Script(), 60.0, uid_of={77: 1000}.get)
    assert facts.gpus[0].processes == [Process(77, "/opt/x/bin/python3", 4096, 1000)]
    assert facts.gpus[0].used_mib == 4096
    assert facts.gpus[1].processes == []


def test_mig_on(stand_in):
    gpu = stand_in("mig").gpus[0]
    assert (gpu.mig_mode, gpu.mig_pending, gpu.used_mib) == ("Enabled", "Enabled", 64)
    assert stand_in("mig_pending").gpus[0].mig_mode == "Disabled"


@pytest.mark.parametrize(
    ("state", "expected"),
    [("remap_pending", (1, True, False, "Reset")), ("remap_failure", (8, False, True, "None"))],
)
def test_row_remapping(stand_in, state, expected):
    gpu = stand_in(state).gpus[1]
    assert (gpu.remapped_uncorrectable, gpu.remap_pending, gpu.remap_failure, gpu.recovery_action) == expected


def test_ecc_errors_are_summed_over_memories(stand_in):
    gpu = stand_in("ecc_errors").gpus[0]
    assert (gpu.ecc_uncorrected_volatile, gpu.ecc_uncorrected_aggregate) == (2, 5)


def test_the_three_counters_of_newer_drivers_are_one_number():
    body = (
        "<ecc_errors><volatile><sram_correctable>9</sram_correctable>"
        "<sram_uncorrectable_parity>1</sram_uncorrectable_parity>"
        "<sram_uncorrectable_secded>2</sram_uncorrectable_secded><dram_correctable>9</dram_correctable>"
        "<dram_uncorrectable>4</dram_uncorrectable></volatile></ecc_errors>"
    )
    assert _gpu_info.parse_gpu(FIRST, body).ecc_uncorrected_volatile == 7


def test_ecc_that_is_off_counts_nothing(stand_in):
    gpu = stand_in("ecc_off").gpus[0]
    assert (gpu.ecc_mode, gpu.ecc_uncorrected_volatile) == ("Disabled", None)


def test_throttle_reasons_under_their_old_name():
    body = (
        "<clocks_throttle_reasons><clocks_throttle_reason_gpu_idle>Not Active</clocks_throttle_reason_gpu_idle>"
        "<clocks_throttle_reason_hw_slowdown>Active</clocks_throttle_reason_hw_slowdown></clocks_throttle_reasons>"
    )
    assert _gpu_info.parse_gpu(FIRST, body).throttle_reasons == ["hw_slowdown"]


def test_a_throttle_reason_that_is_not_told_is_noted():
    reason = "clocks_event_reason_sw_power_cap"
    gpu = _gpu_info.parse_gpu(FIRST, f"<clocks_event_reasons><{reason}>N/A</{reason}></clocks_event_reasons>")
    assert (gpu.throttle_reasons, gpu.problems) == ([], [f"clocks_event_reasons/{reason} is N/A"])


def test_a_gpu_is_called_by_its_index_where_that_is_known():
    assert str(_gpu_info.Gpu(FIRST)) == f"GPU {FIRST}"
    assert str(_gpu_info.Gpu(FIRST, index=0)) == f"GPU 0 ({FIRST})"


def test_power_under_its_old_names():
    body = (
        "<power_readings><power_limit>310.00 W</power_limit><default_power_limit>400.00 W</default_power_limit>"
        "<enforced_power_limit>300.00 W</enforced_power_limit><max_power_limit>400.00 W</max_power_limit>"
        "</power_readings>"
    )
    gpu = _gpu_info.parse_gpu(FIRST, body)
    assert (gpu.power_cap_w, gpu.power_default_w, gpu.power_max_w) == (300.0, 400.0, 400.0)


def test_a_reset_that_older_drivers_want():
    body = "<gpu_reset_status><reset_required>Yes</reset_required></gpu_reset_status>"
    assert _gpu_info.parse_gpu(FIRST, body).recovery_action == "Reset"


# What cannot be read


def test_values_that_are_not_told_are_none_and_noted(stand_in):
    first, second = stand_in("unreadable").gpus
    assert (first.reserved_mib, first.power_cap_w, first.temperature_c, first.compute_capability) == (None,) * 4
    assert (first.remap_pending, first.remapped_correctable) == (None, None)
    assert first.problems == [
        "fb_memory_usage/reserved is N/A",
        "remapped_rows is N/A",
        "gpu_power_readings/current_power_limit is N/A",
        "temperature/gpu_temp is ERR!",
        "compute_cap is not told",
    ]
    assert (first.total_mib, first.lost) == (95830, False)
    assert second.problems == []


@pytest.mark.parametrize(
    "said",
    ["N/A", "[N/A]", "[Not Supported]", "ERR!", "Unknown Error", "Insufficient Permissions", "", "Some new words"],
)
def test_no_word_in_place_of_a_value_is_an_error(said):
    values = {
        "uuid": said,
        "persistence_mode": said,
        "mig_mode": f"<current_mig>{said}</current_mig>",
        "fb_memory_usage": f"<total>{said}</total>",
        "ecc_errors": f"<volatile><dram_uncorrectable>{said}</dram_uncorrectable></volatile>",
        "remapped_rows": said,
        "clocks_event_reasons": said,
        "temperature": f"<gpu_temp>{said}</gpu_temp>",
    }
    body = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    gpu = _gpu_info.parse_gpu(FIRST, body)
    assert gpu.total_mib is gpu.temperature_c is gpu.mig_mode is gpu.persistence_mode is None
    assert gpu.ecc_uncorrected_volatile is gpu.remap_pending is gpu.throttle_reasons is None
    assert f"fb_memory_usage/total is {said.strip('[]') or 'empty'}" in gpu.problems
    assert not gpu.lost


def test_an_element_that_a_driver_does_not_have_is_no_problem():
    assert _gpu_info.parse_gpu(FIRST, "<uuid>GPU-1</uuid>") == _gpu_info.Gpu(FIRST, uuid="GPU-1")


def test_a_process_name_that_breaks_the_xml_costs_the_processes_only():
    body = "<uuid>GPU-1</uuid><processes><process_info><pid>1</pid><process_name>a<b & c</process_name>"
    gpu = _gpu_info.parse_gpu(FIRST, body + "</process_info></processes>")
    assert gpu.uuid == "GPU-1"
    assert gpu.problems == ["processes cannot be read: a process name breaks nvidia-smi's XML"]


def test_an_answer_that_breaks_off_keeps_the_gpus_before():
    text = f'<gpu id="{FIRST}"><uuid>GPU-1</uuid></gpu>\n<gpu id="{SECOND}"><uuid>GPU-'
    first, second = _gpu_info.parse_all(text)
    assert first.uuid == "GPU-1"
    assert (second.pci, second.uuid) == (SECOND, None)
    assert second.problems == ["nvidia-smi's answer breaks off within this GPU: Unknown Error"]


def test_xml_that_is_none_is_no_error():
    (gpu,) = _gpu_info.parse_all(f'<gpu id="{FIRST}"><uuid></gpu>')
    assert gpu.problems == [f"nvidia-smi's XML of {FIRST} cannot be read"]


# Lost GPUs


@pytest.mark.parametrize(
    ("line", "index", "pci", "reason"),
    [
        (
            "Unable to determine the device handle for GPU 0000:05:00.0: GPU is lost.  Reboot the system to recover "
            "this GPU",
            None,
            "00000000:05:00.0",
            "GPU is lost. Reboot the system to recover this GPU",
        ),
        (
            "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error",
            1,
            "00000000:34:00.0",
            "Unknown Error",
        ),
        (
            "Unable to determine the device handle for GPU0000:cb:00.0: Unknown Error",
            None,
            "00000000:CB:00.0",
            "Unknown Error",
        ),
        ("Unable to determine the device handle for GPU 3: Unknown Error", 3, "address unknown", "Unknown Error"),
    ],
)
def test_each_form_of_the_message_about_a_lost_gpu(line, index, pci, reason):
    (gpu,) = _gpu_info.lost_gpus(f"before\n{line}\nafter")
    assert (gpu.index, gpu.pci, gpu.lost, gpu.problems) == (index, pci, True, [reason])


@pytest.mark.parametrize(("state", "lost"), [("lost", 1), ("lost_xml", 1), ("lost_first", 0)])
def test_a_lost_gpu_hides_nothing_of_the_healthy_one(stand_in, state, lost):
    facts = stand_in(state)
    assert facts.problem == ""
    assert [(gpu.index, gpu.lost) for gpu in facts.gpus] == [(0, lost == 0), (1, lost == 1)]
    gone, well = facts.gpus[lost], facts.gpus[1 - lost]
    assert gone.pci == (FIRST, SECOND)[lost]
    assert gone.problems[0].startswith("GPU is lost")
    assert len(gone.problems) == 1
    assert (well.total_mib, well.compute_capability, well.problems) == (95830, "9.0", [])
    assert facts.host.driver_version == "580.126.09"
    assert facts.host.problems == []


def test_where_nvidia_smi_stops_at_the_lost_gpu_the_others_are_asked_alone(stand_in):
    facts = stand_in("lost_stops", ls=(0, "0000:ad:00.0\n0000:ae:00.0\n"))
    first, second = facts.gpus
    assert (first.pci, first.total_mib, first.lost) == (FIRST, 95830, False)
    assert (second.pci, second.index, second.lost) == (SECOND, 1, True)
    assert facts.problem == ""
    assert [*ASK_ALL, "--id=0000:ad:00.0"] in stand_in.asked
    assert [*ASK_ALL, "--id=0000:ae:00.0"] not in stand_in.asked


def test_where_all_gpus_are_lost_the_problem_says_so():
    text = "Unable to determine the device handle for GPU0: 0000:ad:00.0: Unknown Error\nNo devices were found\n"
    facts = _gpu_info.read(Script(nvidia_smi=(6, text), journalctl=(0, LOG)), 1.0)
    (gpu,) = facts.gpus
    assert (gpu.pci, gpu.lost, [xid.code for xid in gpu.xids]) == (FIRST, True, [31])
    assert facts.cause == "lost"


def test_a_gpu_that_is_lost_only_after_it_has_answered_is_lost():
    well = _gpu_info.Gpu(SECOND, index=1, uuid="GPU-2")
    (gpu,) = _gpu_info.merge([well], _gpu_info.lost_gpus("device handle for GPU1: 0000:AE:00.0: Unknown Error"))
    assert (gpu.uuid, gpu.lost, gpu.problems) == ("GPU-2", True, ["Unknown Error"])


def test_an_inforom_warning_comes_with_the_facts(stand_in):
    facts = stand_in("inforom")
    assert facts.problem == ""
    assert [gpu.problems for gpu in facts.gpus] == [[], ["infoROM is corrupted"]]
    assert len(facts.host.problems) == 1


# Failures of nvidia-smi as a whole


@pytest.mark.parametrize(
    ("state", "cause", "words"),
    [
        ("not_loaded", "not_loaded", "the NVIDIA driver is not loaded: run modprobe nvidia"),
        ("mismatch", "mismatch", "different versions (libraries 580.173, kernel module 580.65.06): reboot the host"),
        ("no_nvml", "nvml_missing", "libnvidia-ml.so cannot be found or loaded: install"),
        ("no_devices", "no_devices", "nvidia-smi finds no GPU: lspci -d 10de:"),
        ("crash", "driver", "an internal error: look for NVRM in the kernel log"),
    ],
)
def test_a_failure_is_one_sentence_with_the_remedy(stand_in, state, cause, words):
    facts = stand_in(state, module=(0, OPEN))
    assert (facts.gpus, facts.cause) == ([], cause)
    assert words in facts.problem
    assert "\n" not in facts.problem
    assert facts.host.kernel_module_version == "580.65.06"


@pytest.mark.parametrize("status", [2, 3, 4, 6, 8, 9, 10, 12, 13, 14, 15, 18, 255])
def test_each_exit_status_of_the_manual_page_has_a_remedy(status):
    failure = _gpu_info.explain(status, "")
    assert failure.cause != "unknown"
    assert ": " in failure.sentence
    assert "{" not in failure.sentence


def test_the_text_decides_before_the_exit_status():
    assert _gpu_info.explain(255, "Failed to initialize NVML: Driver/library version mismatch").cause == "mismatch"
    assert _gpu_info.explain(1, 'Field "x" is not a valid field to query.').cause == "usage"
    assert _gpu_info.explain(255, "Failed to initialize NVML: Insufficient Permissions").cause == "permission"


def test_an_unknown_failure_is_quoted():
    assert _gpu_info.explain(77, "who\nknows").sentence == (
        "nvidia-smi failed with status 77 and said who knows: look for NVRM in the kernel log"
    )
    assert "was ended by signal 11 and said nothing" in _gpu_info.explain(-11, "").sentence


def test_no_nvidia_smi():
    facts = _gpu_info.read(Script(nvidia_smi=FileNotFoundError()), 1.0)
    assert facts.problem == "nvidia-smi is not there: install the NVIDIA driver"
    assert facts.gpus == []


def test_an_nvidia_smi_that_cannot_be_started():
    facts = _gpu_info.read(Script(nvidia_smi=PermissionError(13, "Permission denied")), 1.0)
    assert "Permission denied" in facts.problem


def test_an_answer_without_gpus_is_a_failure_too():
    facts = _gpu_info.read(Script(nvidia_smi=(0, "<attached_gpus>0</attached_gpus>")), 1.0)
    assert facts.cause == "no_devices"


def test_a_query_that_fails_beside_the_xml_is_noted_only():
    xml = f'<gpu id="{FIRST}"><uuid>GPU-1</uuid></gpu>'
    facts = _gpu_info.read(Script(nvidia_smi=(0, xml), csv=(2, 'Field "compute_cap" is not a valid field')), 1.0)
    assert facts.problem == ""
    assert facts.gpus[0].uuid == "GPU-1"
    assert facts.host.problems[0].startswith("nvidia-smi --query-gpu=index,pci.bus_id,compute_cap")


# Deadlines


def test_a_driver_that_hangs_is_told_with_the_xid_that_the_log_has():
    run = Script(nvidia_smi=TimeoutError(), journalctl=(0, LOG))
    facts = _gpu_info.read(run, 7.0)
    assert facts.cause == "hang"
    assert facts.problem.startswith("nvidia-smi did not answer within 7 s, so the NVIDIA driver hangs: ")
    assert [(gpu.pci, gpu.lost) for gpu in facts.gpus] == [(FIRST, False), (SECOND, True)]
    assert [argv for argv in run.asked if argv[0] == "nvidia-smi"] == [ASK_ALL]


def test_after_a_hang_nvidia_smi_is_not_asked_again():
    xml = f'<gpu id="{FIRST}"><uuid>GPU-1</uuid></gpu>'
    run = Script(nvidia_smi=(0, xml), csv=TimeoutError())
    facts = _gpu_info.read(run, 7.0)
    assert facts.gpus[0].uuid == "GPU-1"
    assert facts.problem == ""
    assert "did not answer within 7 s" in facts.host.problems[0]
    assert ASK_TOPOLOGY not in run.asked


def test_a_file_of_the_driver_that_hangs_holds_up_nothing(stand_in):
    facts = stand_in("idle", module=TimeoutError())
    assert facts.host.kernel_module_version is None
    assert len(facts.gpus) == 2


def test_the_runner_returns_what_a_command_says():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert _gpu_info.run_command([sys.executable, "-c", code], 60.0) == (3, "out\n", "err\n")


def test_the_runner_says_when_a_command_is_missing():
    with pytest.raises(FileNotFoundError):
        _gpu_info.run_command(["/nowhere/nvidia-smi"], 1.0)


def test_the_runner_kills_what_hangs_and_ignores_sigterm(monkeypatch):
    monkeypatch.setenv("NVIDIA_SMI_STATE", "hang")
    killed = []
    killpg = os.killpg
    monkeypatch.setattr(_gpu_info.os, "killpg", lambda pid, number: (killed.append(pid), killpg(pid, number)))
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.5 s"):
        _gpu_info.run_command([str(FAKES / "nvidia-smi")], 0.5)
    (pid,) = killed
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        for process in list(_gpu_info._STUCK):  # on a slow machine it was not gone at once
            if process.poll() is not None:
                _gpu_info._STUCK.remove(process)
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_the_runner_does_not_wait_for_a_process_that_does_not_die(monkeypatch):
    """As a process in uninterruptible sleep: the signal is sent, and nothing comes of it."""
    sent = []
    monkeypatch.setattr(_gpu_info.os, "killpg", lambda pid, number: sent.append(number))
    with pytest.raises(TimeoutError):
        _gpu_info.run_command(["sleep", "600"], 0.1)
    assert sent == [signal.SIGKILL]
    process = _gpu_info._STUCK.pop()
    assert process.poll() is None
    process.kill()
    process.wait()


# Kernel log, topology, versions


def test_xids_are_counted_for_each_gpu():
    assert _gpu_info.parse_xids(LOG) == {
        "0000:ad:00": [Xid(31, 2, "2026-11-23T17:20:00+0000", "pid=913, name=python3, Ch 00000009, MMU Fault")],
        "0000:ae:00": [
            Xid(
                79,
                1,
                "2026-11-23T17:30:00+0000",
                "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            )
        ],
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[  123.4] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.", ("", "GPU has fallen off the bus.")),
        (
            "2026-11-23T18:05:38,123456+00:00 NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.",
            ("2026-11-23T18:05:38,123456+00:00", "GPU has fallen off the bus."),
        ),
        ("NVRM: Xid (0000:01:00): 79, pid=1122, gone", ("", "pid=1122, gone")),
    ],
)
def test_other_forms_of_a_gpu_off_the_bus(line, expected):
    assert _gpu_info.parse_xids(line) == {"0000:01:00": [Xid(79, 1, *expected)]}


def test_an_xid_of_an_nvswitch_is_none_of_a_gpu():
    assert _gpu_info.parse_xids("nvidia-nvswitch1: SXid (PCI:0000:aa:00.0): 24007, Severity 1") == {}


def test_xids_are_matched_to_their_gpu(stand_in):
    facts = stand_in("idle", journalctl=(0, LOG))
    assert [[xid.code for xid in gpu.xids] for gpu in facts.gpus] == [[31], [79]]


@pytest.mark.parametrize("journal", [(1, ""), (0, ""), (0, "-- No entries --\n"), FileNotFoundError(), TimeoutError()])
def test_without_a_journal_the_kernels_own_log_is_read(stand_in, journal):
    facts = stand_in("idle", journalctl=journal, dmesg=(0, LOG))
    assert facts.host.kernel_log == "dmesg"
    assert [xid.code for xid in facts.gpus[0].xids] == [31]


def test_where_no_log_can_be_read_xids_are_not_known(stand_in):
    facts = stand_in("idle", journalctl=(1, ""), dmesg=(1, ""))
    assert facts.host.kernel_log == ""
    assert [gpu.xids for gpu in facts.gpus] == [None, None]
    assert facts.host.problems == [
        "neither journalctl nor dmesg shows the kernel log, so Xids are not known: run this as root"
    ]


HEAD = "\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
ROWS = """\
GPU0\t X \tNV12\tPHB\tPHB\t0-253\t0-1\t\tN/A
GPU1\tNV12\t X \tPHB\tPHB\t0-253\t0-1\t\tN/A
GPU2\tPHB\tPHB\t X \tNV12\t0-253\t0-1\t\tN/A
GPU3\tPHB\tPHB\tNV12\t X \t0-253\t0-1\t\tN/A

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.mark.parametrize("head", [HEAD, HEAD.lstrip(), f"\x1b[4m{HEAD.rstrip()}\x1b[0m\n"])
def test_topology(head):
    found = _gpu_info.parse_topology(head + ROWS)
    assert found["GPU2"] == {"GPU0": "PHB", "GPU1": "PHB", "GPU3": "NV12"}
    gpu = _gpu_info.with_links(_gpu_info.Gpu(FIRST, index=2), found)
    assert (gpu.links, gpu.nvlink_peers) == ({"0": "PHB", "1": "PHB", "3": "NV12"}, [3])


def test_network_cards_are_no_gpus():
    text = "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV6\tPIX\t0-9\nGPU1\tNV6\t X \tSYS\t0-9\nNIC0\tPIX\tSYS\t X \n"
    assert _gpu_info.parse_topology(text) == {"GPU0": {"GPU1": "NV6"}, "GPU1": {"GPU0": "NV6"}}


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "550.54.14"), (OPEN, "580.65.06"), ("", None)])
def test_version_of_the_kernel_module(text, version):
    assert _gpu_info.parse_module_version(text) == version


def test_pci_addresses_of_all_sources_meet():
    assert {_gpu_info.pci_key(text) for text in ("00000000:AD:00.0", "0000:ad:00.0", "0000:ad:00")} == {"0000:ad:00"}
    assert _gpu_info.pci_key("00010000:01:00.0") == "10000:01:00"
    assert _gpu_info.pci_address("0000:ad:00") == FIRST


def test_the_owner_of_a_process():
    assert _gpu_info.owner_of(os.getpid()) == os.getuid()
    assert _gpu_info.owner_of(2**30) is None


def test_facts_become_what_json_can_hold(stand_in):
    facts = _gpu_info.as_dict(stand_in("idle", journalctl=(0, LOG)))
    assert facts["gpus"][0]["xids"][0]["code"] == 31
    assert facts["host"]["topology"]["GPU0"] == {"GPU1": "NV12"}


# The stand-in


@pytest.fixture
def smi(monkeypatch):
    def run(state, *argv, program="nvidia-smi"):
        monkeypatch.setenv("NVIDIA_SMI_STATE", state)
        done = subprocess.run([str(FAKES / program), *argv], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_stand_in_answers_the_preflight(smi):
    out = f"0, {FIRST_UUID}\n1, {SECOND_UUID}\n"
    assert smi("idle", "--query-gpu=index,uuid", "--format=csv,noheader") == (0, out, "")


def test_the_stand_in_answers_the_units(smi):
    query = ["--query-gpu=memory.total,memory.reserved,memory.free", "--format=csv,noheader,nounits"]
    assert smi("idle", f"--id={SECOND_UUID}", *query)[1] == "95830, 594, 95235\n"
    assert smi("idle", f"--id={FIRST_UUID},{SECOND_UUID}", *query)[1] == "95830, 594, 95235\n" * 2
    assert smi("unreadable", f"--id={FIRST_UUID}", *query)[1] == "95830, [N/A], 95235\n"
    assert smi("idle", "--id=7", *query)[:2] == (6, "No devices were found\n")


def test_the_stand_in_writes_headers_and_units_as_recorded(smi):
    out = smi("idle driver=580.178.04", "--id=0", "--query-gpu=name,memory.total,driver_version", "--format=csv")[1]
    assert out == "name, memory.total [MiB], driver_version\nNVIDIA H100 NVL, 95830 MiB, 580.178.04\n"


def test_the_stand_in_refuses_a_field_that_there_is_not(smi):
    assert smi("idle", "--query-gpu=cuda_version", "--format=csv")[:2] == (
        2,
        'Field "cuda_version" is not a valid field to query.\n\n',
    )


def test_the_stand_in_takes_its_state_from_a_file(smi, monkeypatch, tmp_path):
    (tmp_path / "state").write_text("mismatch\n")
    monkeypatch.setenv("NVIDIA_SMI_STATE_FILE", str(tmp_path / "state"))
    assert smi("")[0] == 18
    assert smi("nonsense")[0] == 1
    (tmp_path / "state").unlink()
    assert smi("", "-L")[1].startswith("GPU 0: NVIDIA H100 NVL (UUID: ")


def test_the_stand_in_is_dmesg_too_where_it_is_called_so(monkeypatch, tmp_path):
    shutil.copy(FAKES / "nvidia-smi", tmp_path / "dmesg")
    monkeypatch.setenv("NVIDIA_SMI_STATE", "lost")
    out = subprocess.run([str(tmp_path / "dmesg"), "--time-format", "iso"], capture_output=True, text=True, check=True)
    (xid,) = _gpu_info.parse_xids(out.stdout)["0000:ae:00"]
    assert (xid.code, xid.last_time) == (79, "2026-11-23T18:05:38,123456+00:00")


def test_every_state_of_the_stand_in_is_read_without_an_error(stand_in, smi):
    states = [line.split()[0] for line in smi("idle", "--states")[1].splitlines()]
    assert len(states) > 20
    for state in states:
        if state != "hang":
            facts = stand_in(state)
            assert facts.gpus or facts.problem, state


def test_the_stand_in_says_what_it_is():
    head = (FAKES / "nvidia-smi").read_text().splitlines()[:3]
    assert "STAND-IN" in head[1]
