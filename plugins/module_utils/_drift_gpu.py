# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Driver and GPUs of a host against what is declared. Pure; _driver, _gpu_info and _gpu_settings ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from . import _driver, _gpu_health, _gpu_info, _gpu_settings
from ._drift_kinds import Report

#: Rules of _gpu_health that tell a fault. Those of settings that are declared are compared with the declaration.
_FAULTS = ("driver_library_mismatch", "fatal_xid", "recovery_needed", "remap_failure", "ecc_uncorrected")
_KINDS = {
    **dict.fromkeys(_FAULTS, "gpu_fault"),
    "gpu_lost": "gpu_missing",
    "ecc_off": "gpu_ecc_off",
    "foreign_process": "gpu_foreign_process",
}
_WANTED = {"gpu_lost": "a GPU that answers", "ecc_off": "ECC on", "foreign_process": "engines only"}


def compare_driver(facts: _driver.Facts, version: str, report: Report) -> None:
    """Loaded, installed and declared driver, and the holds of its packages.

    Without a version none is declared: the host brings its own, and what is loaded must be what is on disk.
    """
    if not version:
        if facts.loaded != facts.on_disk:
            report.add(
                "driver_not_loaded",
                "driver",
                f"{facts.loaded or 'no driver'} is loaded",
                f"{facts.on_disk or 'no driver'}, which is on disk",
                "reboot the host, as programs of one version do not work with a module of another",
            )
        return
    if facts.loaded != version:
        report.add(
            "driver_not_loaded",
            "driver",
            f"{facts.loaded or 'no driver'} is loaded",
            version,
            _driver.activation(facts, version).reason or "run playbooks/cuda.yml",
        )
    if facts.on_disk != version:
        report.add(
            "driver_not_installed",
            "driver",
            f"{facts.on_disk or 'no module nvidia'} is on disk for kernel {facts.kernel.release}",
            version,
        )
    for package in facts.packages:
        if _driver.other_driver_version(package.upstream, version):
            report.add("driver_package", package.name, f"{package.name} {package.version}", version)
    for name in _driver.holds_missing(facts, version):
        report.add("package_not_held", name, "an upgrade may replace it", "held", f"run apt-mark hold {name}")


def compare_identity(
    declared: Mapping[str, Sequence[int | str]],
    recorded: Mapping[str, Sequence[str]],
    gpus: Iterable[_gpu_info.Gpu],
    report: Report,
) -> None:
    """The GPUs of each instance: as declared, as the deploy recorded them (UUIDs), and as they are now."""
    present = {gpu.index: gpu.uuid for gpu in gpus if not gpu.lost and gpu.index is not None and gpu.uuid}
    have = ", ".join(f"{index} ({uuid})" for index, uuid in sorted(present.items())) or "none"
    for name, wanted in declared.items():
        was = list(recorded.get(name, ()))
        for place, gpu in enumerate(wanted):
            where = f"{name} GPU {gpu}"
            now = present.get(gpu) if isinstance(gpu, int) else (gpu if gpu in present.values() else None)
            old = was[place] if place < len(was) else ""
            if not old.startswith("GPU-"):
                report.blind(f"/etc/vllm/{name}.env does not tell the UUID of GPU {gpu}: run site.yml, which writes it")
            if now is None:
                report.add("gpu_missing", where, f"the host has {have}", old or str(gpu))
            elif old.startswith("GPU-") and old not in present.values():
                report.add("gpu_swapped", where, f"{now} is there now", old)
            elif old.startswith("GPU-") and now != old:
                report.add("gpu_renumbered", where, f"GPU {gpu} is {now} now", old)


def compare_settings(changes: Iterable[_gpu_settings.Change], report: Report) -> None:
    """What role cuda would change of the GPUs' settings."""
    for change in changes:
        report.add(
            "gpu_setting", f"{change.gpu} {change.setting}", f"{change.setting} is {change.before}", change.after
        )


def compare_health(found: Iterable[_gpu_health.Finding], report: Report) -> None:
    """Findings of the preflight's rules that are drift or a fault. What cannot be read is unknown."""
    for item in found:
        if item.rule in ("unreadable", "driver_unavailable"):
            report.blind(item.sentence)
        elif item.rule in _KINDS:
            what, _, remedy = item.sentence.rpartition(": ")
            where = f"GPU {item.device}" if item.device else "driver"
            if _KINDS[item.rule] == "gpu_fault":
                where += f" {item.rule}"
            report.add(_KINDS[item.rule], where, what, _WANTED.get(item.rule, "no such error"), remedy)
