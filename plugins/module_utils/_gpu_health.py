# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What is wrong with a host's NVIDIA GPUs: rules over the facts of ``_gpu_info``. Pure.

A rule gives findings: which device, what was found, what is wanted, what to do. How bad that is, is
a matter of the rule, and of who deploys: ``severities`` overrides it rule by rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ._compatibility import at_least, driver_complaint
from ._gpu_info import Facts, Gpu, Xid, is_failure
from ._hint import hint

#: ``note`` tells without a warning; ``ignore`` does not tell.
SEVERITIES = ("error", "warning", "note", "ignore")

#: What each rule is about, and how bad it is by default.
RULES = {
    "driver_unavailable": "error",
    "driver_library_mismatch": "error",
    "driver_too_old": "error",
    "gpu_lost": "error",
    "fatal_xid": "error",
    "minor_xid": "warning",
    "recovery_needed": "error",
    "remap_failure": "error",
    "remap_pending": "warning",
    "ecc_uncorrected": "error",
    "ecc_uncorrected_past": "note",
    "ecc_off": "warning",
    "inforom_corrupted": "warning",
    "mig_enabled": "error",
    "unexpected_memory": "error",
    "foreign_process": "error",
    "unnamed_memory": "warning",
    "power_cap_below_default": "warning",
    "throttling": "warning",
    "software_power_cap": "note",
    "persistence_off": "warning",
    "nvlink_missing": "warning",
    "unreadable": "warning",
}


#: Rules about what role cuda installs or sets, so that they are no obstacle before it has run.
MENDED = ("driver_unavailable", "driver_library_mismatch", "driver_too_old", "persistence_off", "mig_enabled")
#: Causes of driver_unavailable that no other driver mends: hardware, rights, and what only a reboot ends.
UNMENDED_CAUSES = ("unsupported", "permission", "power_cable", "interrupt", "inforom", "lost", "hang")


class Baseline(NamedTuple):
    """What a healthy GPU of one product looks like: memory (MiB), default power cap (W), whether it has an NVLink."""

    total_mib: int
    power_cap_w: float
    nvlink: bool


#: By name as nvidia-smi gives it. Of products that are not here, the rules judge what needs no baseline.
BASELINES = {
    # 400 W is the product's power cap; boards with a lower one as their own default are sold too (310 W seen).
    "NVIDIA H100 NVL": Baseline(total_mib=95830, power_cap_w=400.0, nvlink=True),
}
#: Difference of memory (MiB) that is none: what the firmware keeps for itself differs between versions.
MEMORY_TOLERANCE_MIB = 256

#: Xids of NVIDIA's catalogue for which it wants the GPU reset, the host rebooted or the hardware looked at.
FATAL_XIDS = {
    46: ("the GPU stopped processing", "reset the GPU"),
    48: ("an uncorrectable (double bit) ECC error", "reset the GPU, and have the board checked where it comes back"),
    54: ("auxiliary power is not connected to the board", "have the power cables checked"),
    62: ("a microcontroller of the GPU halted", "reset the GPU"),
    64: ("a row of memory could not be remapped", "reset the GPU, and have the board replaced where it comes back"),
    74: ("an NVLink error", "reset both GPUs of the link, and have the NVLink bridge checked where it comes back"),
    79: (
        "the GPU fell off the bus",
        "reboot the host; where it comes back, have the seat, the power and the temperature of the board checked",
    ),
    95: ("a memory error that could not be contained, so other data may be wrong too", "reset the GPU"),
    109: ("a context switch timed out", "reset the GPU"),
    110: ("a security fault", "reset the GPU"),
    119: ("the GPU's system processor (GSP) did not answer the driver", "reset the GPU, and update the driver"),
    120: ("an error of the GPU's system processor (GSP)", "reset the GPU, and update the driver"),
    136: ("training of an NVLink failed", "reset the GPU, and have the NVLink bridge checked where it comes back"),
    140: ("an ECC error that could not be recovered from", "reset the GPU"),
    143: ("the GPU could not be initialised", "reset the GPU"),
    155: ("an NVLink error", "reset the GPU"),
    156: ("a part of the GPU was retired", "reset the GPU"),
    158: ("a fatal timeout of the GPU", "reset the GPU"),
}
#: Xids after which the GPU goes on; most are errors of a program. All others count as these.
MINOR_XIDS = {
    13: "a graphics engine exception, as a rule of a program",
    31: "a page fault in GPU memory, as a rule of a program",
    32: "a corrupted stream of commands, as a rule of a program",
    43: "a program's work was stopped, as a rule after an error of its own",
    45: "a program's channels were removed, after another error or as the program was ended",
    63: "a row of memory was recorded for remapping",
    68: "a video decoder exception",
    69: "a graphics engine class error, as a rule of a program",
    92: "many single-bit ECC errors, which were corrected",
    94: "a memory error that was contained: only the program that used it had to end",
    137: "an NVLink access of a program was refused",
    154: "the driver changed what it wants done about the GPU (nvidia-smi -q, GPU Recovery Action)",
}

#: Throttle reasons that show a fault outside of the GPU or a limit of the host, in words.
_SLOWDOWNS = {
    "hw_thermal_slowdown": "it is too hot (hardware)",
    "sw_thermal_slowdown": "it is too hot (driver)",
    "hw_power_brake_slowdown": "the power supply asks for less (power brake)",
    "hw_slowdown": "the hardware slows it down",
}


class Finding(NamedTuple):
    """One thing that is not as it should be. ``device`` is a PCI address, or empty for the host."""

    rule: str
    severity: str
    device: str
    sentence: str


@dataclass(frozen=True)
class Wanted:
    """What the facts are held against.

    ``min_driver`` is the oldest driver that is taken; where it is empty, the one that ``vllm_version``
    wants, and any where that is empty too. Processes of ``own_uids`` and ``own_pids`` are our engines;
    any other that holds more than ``foreign_mib`` (MiB) of a GPU is in their way.
    """

    min_driver: str = ""
    vllm_version: str = ""
    own_uids: Collection[int] = ()
    own_pids: Collection[int] = ()
    foreign_mib: int = 512
    baselines: Mapping[str, Baseline] = field(default_factory=lambda: BASELINES)


def severity_complaints(severities: Mapping[str, Any]) -> list[str]:
    """A sentence for each rule that there is not, and for each severity that there is not."""
    complaints = []
    for rule, severity in severities.items():
        if rule not in RULES:
            complaints.append(f"severities names {rule}, which is no rule{hint(rule, RULES)}")
        elif severity not in SEVERITIES:
            complaints.append(
                f"severities.{rule} is {severity}: wanted {', '.join(SEVERITIES)}{hint(str(severity), SEVERITIES)}"
            )
    return complaints


def findings(facts: Facts, wanted: Wanted = Wanted(), severities: Mapping[str, str] = {}) -> list[Finding]:
    """All findings, errors first.

    Raises ValueError where ``severities`` names what there is not, and for a vLLM that is too old to be known.
    """
    complaints = severity_complaints(severities)
    if complaints:
        raise ValueError("; ".join(complaints))
    found = [
        Finding(rule, severities.get(rule, RULES[rule]), device, sentence)
        for rule, device, sentence in _all(facts, wanted)
    ]
    return _sorted(finding for finding in found if finding.severity != "ignore")


def before_driver(found: Iterable[Finding], cause: str = "") -> list[Finding]:
    """The findings on a host whose driver role cuda is about to install: what it mends becomes a note.

    ``cause`` is that of the facts.
    """
    stays = {"driver_unavailable"} if cause in UNMENDED_CAUSES else set()
    return _sorted(
        finding._replace(severity="note", sentence=f"{finding.sentence} (role cuda sees to it)")
        if finding.rule in MENDED and finding.rule not in stays
        else finding
        for finding in found
    )


def _sorted(found: Iterable[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _all(facts: Facts, wanted: Wanted) -> Iterator[tuple[str, str, str]]:
    yield from _host(facts, wanted)
    for gpu in facts.gpus:
        yield from _xids(gpu)
        if gpu.lost:
            yield "gpu_lost", gpu.pci, _lost(gpu)
            continue  # the rest of a lost GPU says nothing
        for rule in _GPU_RULES:
            for name, sentence in rule(gpu, wanted):
                yield name, gpu.pci, f"{gpu}: {sentence}"
    yield from _nvlink(facts, wanted)


# The host


def _host(facts: Facts, wanted: Wanted) -> Iterator[tuple[str, str, str]]:
    host = facts.host
    if facts.problem:
        rule = "driver_library_mismatch" if facts.cause == "mismatch" else "driver_unavailable"
        # A lost GPU has a finding of its own.
        if not (facts.cause == "lost" and facts.gpus):
            yield rule, "", facts.problem
    driver, module = host.driver_version, host.kernel_module_version
    if driver and module and driver != module:
        yield (
            "driver_library_mismatch",
            "",
            f"nvidia-smi tells driver {driver}, and the loaded kernel module is {module}: reboot the host",
        )
    # What is loaded is what vLLM will find, also where nvidia-smi itself does not work.
    version = driver or module
    if not version:
        return
    if wanted.min_driver:
        if not at_least(version, wanted.min_driver):
            yield (
                "driver_too_old",
                "",
                f"the NVIDIA driver is {version}, and the vLLM to be deployed wants {wanted.min_driver} or newer: "
                f"install a driver of branch {wanted.min_driver.partition('.')[0]} or newer, or deploy an older vLLM",
            )
    elif wanted.vllm_version:
        complaint = driver_complaint(wanted.vllm_version, version)
        if complaint:
            yield "driver_too_old", "", complaint


def _nvlink(facts: Facts, wanted: Wanted) -> Iterator[tuple[str, str, str]]:
    """Boards that are sold in pairs and have no partner. The partner of a lost GPU has none to look for."""
    if any(gpu.lost for gpu in facts.gpus):
        return
    paired = {name for name, baseline in wanted.baselines.items() if baseline.nvlink}
    pairable = [gpu for gpu in facts.gpus if gpu.name in paired]
    if len(pairable) < 2:
        return
    for gpu in pairable:
        if gpu.nvlink_peers is not None and not gpu.nvlink_peers:
            ways = ", ".join(f"GPU {index} by {link}" for index, link in (gpu.links or {}).items())
            yield (
                "nvlink_missing",
                gpu.pci,
                f"{gpu}: it has no NVLink to another GPU ({ways}), and {gpu.name} is sold in pairs with a bridge: "
                "have the bridge checked, and see nvidia-smi nvlink -s; engines on one GPU each work without it",
            )


# One GPU


def _lost(gpu: Gpu) -> str:
    why = f" ({gpu.problems[0]})" if gpu.problems else ""
    return (
        f"{gpu} cannot be reached{why}: reboot the host; where it comes back, check its seat and power, and have the "
        "board replaced"
    )


def _xids(gpu: Gpu) -> Iterator[tuple[str, str, str]]:
    codes = {xid.code for xid in gpu.xids or ()}
    for xid in gpu.xids or ():
        if xid.code in FATAL_XIDS and not _settled(xid, gpu, codes):
            what, remedy = FATAL_XIDS[xid.code]
            # After a reset without a reboot the log still has it, and nothing tells the one from the other.
            after = "the log has it until the next boot, so after a mere reset set fatal_xid to warning"
            yield "fatal_xid", gpu.pci, f"{gpu}: {_logged(xid)}: {what}; {remedy}; {after}"
        else:
            what = (
                MINOR_XIDS.get(xid.code) or FATAL_XIDS.get(xid.code, ("not a fault of the GPU that is known here",))[0]
            )
            if _settled(xid, gpu, codes):
                what += ", and the row has been remapped since"
            yield "minor_xid", gpu.pci, f"{gpu}: {_logged(xid)}: {what}; look at it where it comes back"


def _settled(xid: Xid, gpu: Gpu, codes: Collection[int]) -> bool:
    """An uncorrectable error (48) whose row was recorded (63) and then remapped: a reset has done it all."""
    return xid.code == 48 and 63 in codes and 64 not in codes and gpu.remap_pending is False and not gpu.remap_failure


def _logged(xid: Xid) -> str:
    often = "once" if xid.count == 1 else f"{xid.count} times, the last"
    when = f" at {xid.last_time}" if xid.last_time else ""
    return f"Xid {xid.code} was logged {often}{when} ({xid.last_message or 'no text'})"


def _id(gpu: Gpu) -> str:
    return gpu.pci if gpu.index is None else str(gpu.index)


def _reset(gpu: Gpu) -> str:
    return f"stop all that uses it and run nvidia-smi --gpu-reset -i {_id(gpu)}, or reboot the host"


def _memory_errors(gpu: Gpu, _wanted: Wanted) -> Iterator[tuple[str, str]]:
    action = gpu.recovery_action or "None"
    reboot = "reboot" in action.lower()
    # That a reset is wanted for remapping has a rule of its own.
    if action != "None" and (reboot or not gpu.remap_pending):
        remedy = "reboot the host" if reboot else _reset(gpu)
        yield "recovery_needed", f"the driver wants this done about it: {action}; {remedy}"
    if gpu.remap_failure:
        yield "remap_failure", "a faulty row of its memory could not be remapped: have the board replaced"
    if gpu.remap_pending:
        yield "remap_pending", f"a faulty row of its memory is to be remapped at the next reset: {_reset(gpu)}"
    if gpu.ecc_uncorrected_volatile:
        yield (
            "ecc_uncorrected",
            f"{gpu.ecc_uncorrected_volatile} uncorrected ECC errors since the last reset, wanted 0: {_reset(gpu)}; "
            "where they come back, have the board replaced",
        )
    elif gpu.ecc_uncorrected_aggregate:
        yield (
            "ecc_uncorrected_past",
            f"{gpu.ecc_uncorrected_aggregate} uncorrected ECC errors in its life, none since the last reset",
        )
    if gpu.ecc_mode == "Disabled":
        yield (
            "ecc_off",
            f"ECC is off, so errors of its memory go unnoticed: run nvidia-smi -i {_id(gpu)} -e 1, and reboot",
        )
    if any("infoROM" in problem for problem in gpu.problems):
        yield "inforom_corrupted", "its infoROM is corrupted: reset it, and have the board replaced where that stays"


def _set_up(gpu: Gpu, wanted: Wanted) -> Iterator[tuple[str, str]]:
    if "Enabled" in (gpu.mig_mode, gpu.mig_pending):
        state = "on" if gpu.mig_mode == "Enabled" else "off until the next reset, then on"
        yield (
            "mig_enabled",
            f"MIG is {state}, and an engine wants the whole GPU: remove its instances (nvidia-smi mig -dci, "
            f"nvidia-smi mig -dgi), run nvidia-smi -i {_id(gpu)} -mig 0, and reset it",
        )
    if gpu.persistence_mode == "Disabled":
        yield (
            "persistence_off",
            "persistence mode is off, so the driver gives the GPU up between programs and each start takes seconds "
            "longer: run systemctl enable --now nvidia-persistenced",
        )
    baseline = wanted.baselines.get(gpu.name or "")
    default = max(gpu.power_default_w or 0.0, baseline.power_cap_w if baseline else 0.0)
    if gpu.power_max_w is not None:
        default = min(default, gpu.power_max_w)  # more cannot be set
    if gpu.power_cap_w is not None and gpu.power_cap_w < default:
        yield (
            "power_cap_below_default",
            f"its power cap is {gpu.power_cap_w:g} W and the default of {gpu.name or 'such a GPU'} is {default:g} W, "
            f"so it computes slower under load: run nvidia-smi -i {_id(gpu)} -pl {default:g}, or leave it where the "
            "host cannot cool or feed more",
        )


def _clocks(gpu: Gpu, _wanted: Wanted) -> Iterator[tuple[str, str]]:
    active = [reason for reason in _SLOWDOWNS if reason in (gpu.throttle_reasons or ())]
    if len(active) > 1 and "hw_slowdown" in active:
        active.remove("hw_slowdown")  # the others are why
    clocks = f"{gpu.sm_clock_mhz} of {gpu.sm_clock_max_mhz} MHz" if gpu.sm_clock_mhz is not None else "unknown"
    if active:
        heat = f", {gpu.temperature_c} degrees" if gpu.temperature_c is not None else ""
        yield (
            "throttling",
            f"it is slowed down, as {' and '.join(_SLOWDOWNS[reason] for reason in active)} (SM clock {clocks}{heat}): "
            "have the host's fans, air flow and power supplies checked",
        )
    if "sw_power_cap" in (gpu.throttle_reasons or ()):
        yield (
            "software_power_cap",
            f"it is at its power cap of {gpu.power_cap_w:g} W (SM clock {clocks}), as is usual under full load"
            if gpu.power_cap_w is not None
            else f"it is at its power cap (SM clock {clocks}), as is usual under full load",
        )


def _memory(gpu: Gpu, wanted: Wanted) -> Iterator[tuple[str, str]]:
    baseline = wanted.baselines.get(gpu.name or "")
    if baseline and (gpu.total_mib is None or abs(gpu.total_mib - baseline.total_mib) > MEMORY_TOLERANCE_MIB):
        found = "an unknown amount" if gpu.total_mib is None else f"{gpu.total_mib} MiB"
        yield (
            "unexpected_memory",
            f"it has {found} of memory, and {gpu.name} has {baseline.total_mib} MiB: see nvidia-smi -q -i {_id(gpu)}; "
            "a part of a GPU (vGPU) does not carry an engine, and a board that lost memory is to be replaced",
        )
    if "Enabled" in (gpu.mig_mode, gpu.mig_pending):
        return  # what its instances hold goes away with them
    for process in gpu.processes:
        mib = gpu.used_mib if process.mib is None else process.mib
        own = process.pid in wanted.own_pids or process.uid in wanted.own_uids
        if not own and mib is not None and mib > wanted.foreign_mib:
            amount = f"{mib} MiB" if process.mib is not None else f"an unknown part of {mib} MiB"
            user = "unknown here" if process.uid is None else str(process.uid)
            yield (
                "foreign_process",
                f"process {process.pid} ({process.name}, user {user}) holds {amount} of its memory and is no engine "
                "of ours: end it, or declare another GPU",
            )
    rest = (gpu.used_mib or 0) - sum(process.mib or 0 for process in gpu.processes)
    if rest > wanted.foreign_mib and all(process.mib is not None for process in gpu.processes):
        yield (
            "unnamed_memory",
            f"{rest} MiB of its memory are used by no process that nvidia-smi names: a program in a container, or one "
            f"that is ending; look with fuser -v /dev/nvidia*, and reset the GPU where nothing has it open",
        )


def _unreadable(gpu: Gpu, _wanted: Wanted) -> Iterator[tuple[str, str]]:
    failed = [problem for problem in gpu.problems if is_failure(problem) or "cannot be read" in problem]
    if failed:
        yield (
            "unreadable",
            f"nvidia-smi fails to read values ({', '.join(failed)}): look for NVRM in the kernel log; {_reset(gpu)}",
        )


_GPU_RULES: tuple[Callable[[Gpu, Wanted], Iterator[tuple[str, str]]], ...] = (
    _memory_errors,
    _set_up,
    _clocks,
    _memory,
    _unreadable,
)
