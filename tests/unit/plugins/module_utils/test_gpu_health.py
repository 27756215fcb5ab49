"""The rules, each on facts made for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_health, _gpu_info
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_health import Baseline, Wanted
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Facts, Gpu, Host, Process, Xid

FIRST, SECOND = "00000000:AD:00.0", "00000000:AE:00.0"
#: What gpu_info tells of a healthy H100 NVL that is bridged to GPU 1.
WELL = Gpu(
    pci=FIRST,
    index=0,
    uuid="GPU-1",
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
TWIN = replace(WELL, pci=SECOND, index=1, uuid="GPU-2", links={"0": "NV12"}, nvlink_peers=[0])
HOST = Host(driver_version="580.126.09", cuda_version="13.0", kernel_module_version="580.126.09", kernel_log="journal")
ANY = Wanted()


def find(wanted=ANY, host=HOST, severities=None, problem="", cause="", twin=TWIN, **changes):
    """The findings about a healthy pair of which GPU 0 has ``changes``."""
    facts = Facts([replace(WELL, **changes), *([twin] if twin else [])], host, problem, cause)
    return _gpu_health.findings(facts, wanted, severities or {})


def only(**arguments):
    """The one finding as (rule, severity, device) and its sentence."""
    (finding,) = find(**arguments)
    return finding[:3], finding.sentence


def xid(code, count=1, message="text"):
    return Xid(code, count, "2026-11-23T17:30:00+0000", message)


def test_a_healthy_pair_has_no_findings():
    assert find(Wanted(min_driver="580")) == []


def test_what_is_not_known_is_no_finding():
    unknown = Gpu(FIRST, index=0)
    assert _gpu_health.findings(Facts([unknown, replace(unknown, pci=SECOND, index=1)], Host())) == []


# Xids


@pytest.mark.parametrize("code", sorted(_gpu_health.FATAL_XIDS))
def test_a_fatal_xid_is_an_error_with_a_reason_and_a_remedy(code):
    head, sentence = only(xids=[xid(code)])
    assert head == ("fatal_xid", "error", FIRST)
    what, remedy = _gpu_health.FATAL_XIDS[code]
    assert sentence == (
        f"GPU 0 ({FIRST}): Xid {code} was logged once at 2026-11-23T17:30:00+0000 (text): {what}; {remedy}; "
        "the log has it until the next boot, so after a mere reset set fatal_xid to warning"
    )


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 94, 154, 999])
def test_an_xid_of_a_program_is_a_warning(code):
    head, sentence = only(xids=[xid(code, 3)])
    assert head == ("minor_xid", "warning", FIRST)
    assert f"Xid {code} was logged 3 times, the last at 2026-11-23T17:30:00+0000 (text): " in sentence


def test_fatal_are_those_for_which_nvidia_wants_more_than_a_restart_of_the_program():
    reset = {46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158}
    workflow_or_hardware_or_reboot = {48, 54, 74, 79}
    assert set(_gpu_health.FATAL_XIDS) == reset | workflow_or_hardware_or_reboot


@pytest.mark.parametrize(
    ("code", "words"),
    [(79, "the GPU fell off the bus; reboot"), (94, "was contained"), (119, "(GSP) did not answer"), (63, "remapping")],
)
def test_the_reason_is_that_of_the_code(code, words):
    assert words in only(xids=[xid(code)])[1]


def test_no_xid_is_both_fatal_and_minor():
    assert not set(_gpu_health.FATAL_XIDS) & set(_gpu_health.MINOR_XIDS)


@pytest.mark.parametrize(
    ("codes", "changes", "rules"),
    [
        ([48], {}, {48: "fatal_xid"}),
        ([48, 63], {}, {48: "minor_xid", 63: "minor_xid"}),
        ([48, 63], {"remap_pending": True}, {48: "fatal_xid", 63: "minor_xid"}),
        ([48, 63], {"remap_pending": None}, {48: "fatal_xid", 63: "minor_xid"}),
        ([48, 63], {"remap_failure": True}, {48: "fatal_xid", 63: "minor_xid"}),
        ([48, 63, 64], {}, {48: "fatal_xid", 63: "minor_xid", 64: "fatal_xid"}),
    ],
)
def test_an_uncorrectable_error_is_settled_once_its_row_is_remapped(codes, changes, rules):
    found = find(xids=[xid(code) for code in codes], **changes)
    told = {int(finding.sentence.split("Xid ")[1].split()[0]): finding.rule for finding in found if "Xid" in finding[3]}
    assert told == rules
    assert any("the row has been remapped since" in finding.sentence for finding in found) == (rules[48] == "minor_xid")


def test_a_log_without_time_and_text():
    assert "Xid 79 was logged once (no text): the GPU fell off the bus" in only(xids=[Xid(79, 1, "", "")])[1]


# Memory that fails


def test_remap_failure():
    head, sentence = only(remap_failure=True)
    assert head == ("remap_failure", "error", FIRST)
    assert sentence.endswith("have the board replaced")


def test_remap_pending_is_told_once_though_the_driver_wants_a_reset_for_it():
    head, sentence = only(remap_pending=True, recovery_action="Reset")
    assert head == ("remap_pending", "warning", FIRST)
    assert "nvidia-smi --gpu-reset -i 0" in sentence


@pytest.mark.parametrize(
    ("action", "remedy"),
    [
        ("Reset", "nvidia-smi --gpu-reset -i 0"),
        ("Drain and Reset", "nvidia-smi --gpu-reset"),
        ("Reboot", "; reboot the host"),
    ],
)
def test_what_the_driver_wants_done(action, remedy):
    head, sentence = only(recovery_action=action)
    assert head == ("recovery_needed", "error", FIRST)
    assert f"wants this done about it: {action}; " in sentence
    assert remedy in sentence


def test_a_reboot_that_the_driver_wants_is_told_beside_a_remap():
    assert [finding.rule for finding in find(remap_pending=True, recovery_action="Node Reboot")] == [
        "recovery_needed",
        "remap_pending",
    ]


def test_ecc_errors_since_the_reset_are_an_error_and_past_ones_a_note():
    head, sentence = only(ecc_uncorrected_volatile=2, ecc_uncorrected_aggregate=7)
    assert head == ("ecc_uncorrected", "error", FIRST)
    assert "2 uncorrected ECC errors since the last reset, wanted 0" in sentence
    head, sentence = only(ecc_uncorrected_aggregate=7)
    assert head == ("ecc_uncorrected_past", "note", FIRST)
    assert "7 uncorrected ECC errors" in sentence


def test_ecc_off():
    head, sentence = only(ecc_mode="Disabled", ecc_uncorrected_volatile=None)
    assert head == ("ecc_off", "warning", FIRST)
    assert "nvidia-smi -i 0 -e 1" in sentence


def test_inforom():
    assert only(problems=["infoROM is corrupted"])[0] == ("inforom_corrupted", "warning", FIRST)


# How it is set up


@pytest.mark.parametrize(
    ("now", "pending", "words"), [("Enabled", "Enabled", "MIG is on,"), ("Disabled", "Enabled", "then on,")]
)
def test_mig(now, pending, words):
    head, sentence = only(mig_mode=now, mig_pending=pending, used_mib=5000)
    assert head == ("mig_enabled", "error", FIRST)
    assert words in sentence
    assert "nvidia-smi -i 0 -mig 0" in sentence


def test_persistence_off():
    head, sentence = only(persistence_mode="Disabled")
    assert head == ("persistence_off", "warning", FIRST)
    assert "nvidia-persistenced" in sentence


@pytest.mark.parametrize("default", [400.0, 310.0, None])
def test_a_power_cap_below_the_products_default_whatever_the_board_says(default):
    head, sentence = only(power_cap_w=310.0, power_default_w=default)
    assert head == ("power_cap_below_default", "warning", FIRST)
    assert "its power cap is 310 W and the default of NVIDIA H100 NVL is 400 W" in sentence
    assert "nvidia-smi -i 0 -pl 400" in sentence


def test_more_than_the_highest_power_cap_is_not_wanted():
    assert find(power_cap_w=350.0, power_max_w=350.0) == []


def test_a_gpu_without_baseline_is_held_against_its_own_default():
    head, sentence = only(
        name="NVIDIA H200", total_mib=143771, power_cap_w=500.0, power_default_w=700.0, power_max_w=700.0
    )
    assert head[0] == "power_cap_below_default"
    assert "700 W" in sentence


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (["hw_slowdown"], "as the hardware slows it down"),
        (["hw_slowdown", "hw_thermal_slowdown"], "as it is too hot (hardware) (SM clock"),
        (["sw_thermal_slowdown"], "as it is too hot (driver)"),
        (["hw_power_brake_slowdown"], "(power brake)"),
    ],
)
def test_throttling(reasons, words):
    head, sentence = only(throttle_reasons=reasons, sm_clock_mhz=780, temperature_c=92)
    assert head == ("throttling", "warning", FIRST)
    assert words in sentence
    assert "780 of 1785 MHz, 92 degrees" in sentence


@pytest.mark.parametrize("cap", [400.0, None])
def test_the_power_cap_under_load_is_a_note(cap):
    head, sentence = only(throttle_reasons=["sw_power_cap"], power_cap_w=cap)
    assert head == ("software_power_cap", "note", FIRST)
    assert ("400 W" in sentence) == (cap is not None)


@pytest.mark.parametrize("reason", ["gpu_idle", "applications_clocks_setting", "sync_boost", "display_clocks_setting"])
def test_other_reasons_of_a_clock_are_no_finding(reason):
    assert find(throttle_reasons=[reason]) == []


# What is in its memory


@pytest.mark.parametrize(("total", "words"), [(47915, "has 47915 MiB"), (None, "has an unknown amount")])
def test_memory_that_differs_from_the_baseline(total, words):
    head, sentence = only(total_mib=total)
    assert head == ("unexpected_memory", "error", FIRST)
    assert f"{words} of memory, and NVIDIA H100 NVL has 95830 MiB" in sentence


@pytest.mark.parametrize(("total", "fine"), [(95830 - 256, True), (95830 - 257, False), (95830 + 257, False)])
def test_memory_may_differ_by_what_firmware_keeps(total, fine):
    assert (find(total_mib=total) == []) == fine


def test_a_foreign_process_is_named():
    head, sentence = only(processes=[Process(4242, "python3", 75079, 1000)], used_mib=75079)
    assert head == ("foreign_process", "error", FIRST)
    assert "process 4242 (python3, user 1000) holds 75079 MiB" in sentence


@pytest.mark.parametrize(
    "wanted", [Wanted(own_uids=[998]), Wanted(own_pids=[4242]), Wanted(foreign_mib=75079)], ids=["uid", "pid", "mib"]
)
def test_a_process_of_ours_or_a_small_one_is_no_finding(wanted):
    assert find(wanted, processes=[Process(4242, "VLLM::EngineCore", 75079, 998)], used_mib=75079) == []


def test_512_mib_are_nobodys_trouble():
    assert find(processes=[Process(7, "Xorg", 512, 0)], used_mib=1024) == []
    assert only(processes=[Process(7, "Xorg", 513, 0)], used_mib=513)[0][0] == "foreign_process"
    assert only(used_mib=513)[0][0] == "unnamed_memory"


def test_a_process_whose_user_is_not_known_is_foreign():
    sentence = only(wanted=Wanted(own_uids=[998]), processes=[Process(4242, "python3", 75079, None)], used_mib=75079)[1]
    assert "user unknown here" in sentence


def test_a_process_of_unknown_memory_may_hold_all_that_is_used():
    sentence = only(processes=[Process(4242, "python3", None, 0)], used_mib=75079)[1]
    assert "holds an unknown part of 75079 MiB" in sentence
    assert find(processes=[Process(4242, "python3", None, 0)], used_mib=3) == []


def test_memory_that_no_process_has():
    head, sentence = only(wanted=Wanted(own_uids=[998]), processes=[Process(1, "x", 1000, 998)], used_mib=5000)
    assert head == ("unnamed_memory", "warning", FIRST)
    assert "4000 MiB" in sentence


# The pair


def test_a_missing_bridge():
    apart = replace(TWIN, links={"0": "PHB"}, nvlink_peers=[])
    found = find(links={"1": "PHB"}, nvlink_peers=[], twin=apart)
    assert [finding[:3] for finding in found] == [("nvlink_missing", "warning", pci) for pci in (FIRST, SECOND)]
    assert "(GPU 1 by PHB)" in found[0].sentence


def test_a_single_board_needs_no_bridge():
    assert find(links={}, nvlink_peers=[], twin=None) == []


def test_an_unknown_topology_is_no_missing_bridge():
    assert find(links=None, nvlink_peers=None, twin=replace(TWIN, links=None, nvlink_peers=None)) == []


def test_another_product_needs_no_bridge():
    other = replace(TWIN, name="NVIDIA L40S", total_mib=46068, links={}, nvlink_peers=[])
    assert find(links={"1": "PHB"}, nvlink_peers=[], twin=other) == []


def test_the_partner_of_a_lost_gpu_misses_no_bridge():
    lost = Gpu(SECOND, index=1, lost=True, problems=["GPU is lost"])
    found = find(links={}, nvlink_peers=[], twin=lost)
    assert [finding[:3] for finding in found] == [("gpu_lost", "error", SECOND)]


def test_of_two_pairs_the_partner_of_a_lost_gpu_misses_no_bridge():
    alone, third, fourth = (
        replace(WELL, pci=f"00000000:0{n}:00.0", index=n, links={}, nvlink_peers=peers)
        for n, peers in ((0, []), (2, [3]), (3, [2]))
    )
    facts = Facts([alone, Gpu(SECOND, index=1, lost=True), third, fourth], HOST)
    assert [finding.rule for finding in _gpu_health.findings(facts)] == ["gpu_lost"]


def test_a_lost_gpu_is_told_with_its_address_and_its_xid():
    lost = Gpu(SECOND, index=1, lost=True, xids=[xid(79)], problems=["GPU is lost"])
    found = find(twin=lost)
    assert [finding[:3] for finding in found] == [("fatal_xid", "error", SECOND), ("gpu_lost", "error", SECOND)]
    assert found[1].sentence.startswith(f"GPU 1 ({SECOND}) cannot be reached (GPU is lost): reboot the host")


def test_another_baseline_can_be_given():
    wanted = Wanted(baselines={"NVIDIA H200": Baseline(143771, 700.0, False)})
    found = find(wanted, name="NVIDIA H200", total_mib=100000, power_cap_w=600.0, power_max_w=700.0, twin=None)
    assert [finding.rule for finding in found] == ["unexpected_memory", "power_cap_below_default"]


# The host


@pytest.mark.parametrize(
    ("driver", "wanted", "old"),
    [
        ("575.57.08", "580", True),
        ("580.65.06", "580", False),
        ("610.57.04", "580", False),
        ("580.65.06", "580.65.06", False),
        ("580.65.06", "580.95", True),
        ("580.126.09", "580.95", False),
        ("550.54.14", "", False),
    ],
)
def test_driver_too_old(driver, wanted, old):
    host = replace(HOST, driver_version=driver, kernel_module_version=driver)
    found = find(Wanted(min_driver=wanted), host)
    assert [finding[:3] for finding in found] == ([("driver_too_old", "error", "")] if old else [])
    assert all("install a driver of branch 580 or newer" in finding.sentence for finding in found)


@pytest.mark.parametrize(
    ("driver", "vllm", "old"),
    [
        ("575.57.08", "0.33.0", True),
        ("580.65.05", "0.33.0", True),
        ("580.65.06", "0.33.0", False),
        ("575.57.08", "0.19.1", False),
        ("470.57.02", "", False),
    ],
)
def test_which_driver_is_too_old_is_known_by_the_version_of_vllm(driver, vllm, old):
    host = replace(HOST, driver_version=driver, kernel_module_version=driver)
    found = find(Wanted(vllm_version=vllm), host)
    assert [finding[:3] for finding in found] == ([("driver_too_old", "error", "")] if old else [])
    assert all(f"driver is {driver}, which is too old for vLLM 0.33.0" in finding.sentence for finding in found)
    assert all("CUDA 13.0, which wants driver 580.65.06 or newer" in finding.sentence for finding in found)


def test_a_driver_that_the_operator_takes_wins_over_the_version_of_vllm():
    host = replace(HOST, driver_version="575.57.08", kernel_module_version="575.57.08")
    assert find(Wanted(min_driver="575", vllm_version="0.33.0"), host) == []
    assert "wants 600 or newer" in find(Wanted(min_driver="600", vllm_version="0.19.0"), host)[0].sentence


def test_the_loaded_module_tells_an_old_driver_where_nvidia_smi_does_not_work():
    host = Host(kernel_module_version="535.216.01")
    found = _gpu_health.findings(Facts([], host, "it hangs", "hang"), Wanted(min_driver="580"))
    assert [finding.rule for finding in found] == ["driver_unavailable", "driver_too_old"]


def test_a_module_that_is_not_the_one_of_the_libraries():
    head, sentence = only(host=replace(HOST, kernel_module_version="580.65.06"))
    assert head == ("driver_library_mismatch", "error", "")
    assert "driver 580.126.09, and the loaded kernel module is 580.65.06" in sentence


@pytest.mark.parametrize(
    ("cause", "rule"),
    [("mismatch", "driver_library_mismatch"), ("hang", "driver_unavailable"), ("lost", "driver_unavailable")],
)
def test_a_driver_that_does_not_work(cause, rule):
    found = _gpu_health.findings(Facts([], Host(), "the sentence", cause))
    assert found == [(rule, "error", "", "the sentence")]


def test_a_lost_gpu_is_not_told_twice():
    lost = Gpu(FIRST, lost=True)
    found = _gpu_health.findings(Facts([lost], Host(), "a GPU has fallen off the bus", "lost"))
    assert [finding.rule for finding in found] == ["gpu_lost"]


def test_values_that_fail_are_told_and_values_that_there_are_not_are_not():
    assert find(problems=["fan_speed is N/A", "compute_cap is not told"]) == []
    head, sentence = only(problems=["fan_speed is N/A", "temperature/gpu_temp is ERR!", "uuid is Unknown Error"])
    assert head == ("unreadable", "warning", FIRST)
    assert "(temperature/gpu_temp is ERR!, uuid is Unknown Error)" in sentence


# Before role cuda has run


def test_what_role_cuda_mends_is_a_note_before_it_has_run():
    host = replace(HOST, driver_version="575.57.08")  # and another kernel module
    changes = {"mig_mode": "Enabled", "persistence_mode": "Disabled", "remap_failure": True}
    found = find(Wanted(vllm_version="0.33.0"), host, **changes)
    errors = {"driver_library_mismatch", "driver_too_old", "remap_failure", "mig_enabled"}
    assert {finding.rule for finding in found if finding.severity == "error"} == errors
    eased = _gpu_health.before_driver(found)
    assert [(finding.rule, finding.severity) for finding in eased] == [
        ("remap_failure", "error"),
        ("driver_library_mismatch", "note"),
        ("driver_too_old", "note"),
        ("mig_enabled", "note"),
        ("persistence_off", "note"),
    ]
    assert {finding.sentence.endswith(" (role cuda sees to it)") for finding in eased[1:]} == {True}
    assert "role cuda" not in eased[0].sentence


@pytest.mark.parametrize(
    ("cause", "severity"),
    [
        ("missing", "note"),
        ("not_loaded", "note"),
        ("nvml_missing", "note"),
        ("mismatch", "note"),
        ("driver", "note"),
        ("hang", "error"),
        ("power_cable", "error"),
        ("permission", "error"),
    ],
)
def test_a_driver_that_does_not_answer_is_an_obstacle_only_where_no_driver_helps(cause, severity):
    found = _gpu_health.before_driver(_gpu_health.findings(Facts([], Host(), "the sentence", cause)), cause)
    assert [finding.severity for finding in found] == [severity]


def test_an_old_driver_that_hangs_is_still_replaced():
    facts = Facts([], Host(kernel_module_version="535.216.01"), "it hangs", "hang")
    found = _gpu_health.before_driver(_gpu_health.findings(facts, Wanted(vllm_version="0.33.0")), "hang")
    assert [finding[:2] for finding in found] == [("driver_unavailable", "error"), ("driver_too_old", "note")]


def test_the_rules_and_causes_that_are_mended_or_not_are_known_ones():
    assert set(_gpu_health.MENDED) <= set(_gpu_health.RULES)
    known = {cause for cause, _ in _gpu_info._CAUSES.values()} | {_gpu_info.hang(1).cause, _gpu_info.MISSING.cause}
    assert set(_gpu_health.UNMENDED_CAUSES) <= known


# Severities


def test_severities_are_overridden_rule_by_rule():
    changes = {"persistence_mode": "Disabled", "ecc_mode": "Disabled", "remap_failure": True}
    severities = {"persistence_off": "error", "ecc_off": "ignore", "remap_failure": "warning"}
    found = find(severities=severities, **changes)
    assert [finding[:2] for finding in found] == [("persistence_off", "error"), ("remap_failure", "warning")]


def test_errors_come_first():
    found = find(persistence_mode="Disabled", throttle_reasons=["sw_power_cap"], mig_mode="Enabled")
    assert [finding.severity for finding in found] == ["error", "warning", "note"]


@pytest.mark.parametrize(
    ("severities", "complaint"),
    [
        (
            {"persistance_off": "error"},
            "severities names persistance_off, which is no rule; did you mean persistence_off?",
        ),
        ({"xyzzy": "error"}, "severities names xyzzy, which is no rule"),
        (
            {"ecc_off": "warn"},
            "severities.ecc_off is warn: wanted error, warning, note, ignore; did you mean warning?",
        ),
        ({"ecc_off": None}, "severities.ecc_off is None: wanted error, warning, note, ignore"),
    ],
)
def test_unknown_rules_and_severities_are_refused(severities, complaint):
    assert _gpu_health.severity_complaints(severities) == [complaint]
    with pytest.raises(ValueError, match="severities") as caught:
        find(severities=severities)
    assert str(caught.value) == complaint


def test_every_rule_has_a_known_default():
    assert set(_gpu_health.RULES.values()) <= set(_gpu_health.SEVERITIES)
