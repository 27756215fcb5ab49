# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Kinds of drift that are found on a host itself: how bad each is, what it means, what to do. Pure.

A finding is a dictionary: ``kind``, ``severity``, ``source``, ``where``, ``found``, ``wanted``,
``remedy`` and at times ``diff``. ``where`` is short and stays the same from run to run, since host,
kind and ``where`` are what a finding is known by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SEVERITIES = ("critical", "warning", "note")


class Kind(NamedTuple):
    """How bad a kind of drift is by default, what it means, and what to do about it."""

    severity: str
    meaning: str
    remedy: str


_DEPLOY = "run site.yml, which mends it"
_REBUILD = "stop the engines (systemctl stop vllm.target), remove the release and run site.yml, which builds it again"

#: What runs, against what is declared.
RUNTIME: Mapping[str, Kind] = {
    # Units.
    "unit_not_active": Kind("critical", "A declared unit does not run.", "read journalctl -u UNIT, then run site.yml"),
    "unit_starting": Kind("warning", "A unit is starting or stopping.", "look again in some minutes"),
    "unit_not_enabled": Kind("warning", "A unit runs and would not come at boot.", _DEPLOY),
    "unit_override": Kind(
        "warning",
        "A drop-in, or a unit file at another place, changes a unit (systemctl edit).",
        "run systemctl revert UNIT, then site.yml; what is to stay belongs into the inventory",
    ),
    "unit_not_reloaded": Kind(
        "warning", "A unit's files changed and systemd has not read them.", "run systemctl daemon-reload, then site.yml"
    ),
    "unit_restarts": Kind("note", "systemd restarted a unit often.", "read journalctl -u UNIT for the reason"),
    "undeclared_unit": Kind("warning", "A unit of ours runs or is enabled that nobody declared.", _DEPLOY),
    # Processes.
    "undeclared_engine": Kind(
        "critical",
        "A vLLM runs outside of the declared units; it takes memory of the engines.",
        "stop it, or declare it in vllm_instances",
    ),
    "stale_process": Kind("warning", "A process was started from other files than those on disk.", _DEPLOY),
    "program_replaced": Kind(
        "warning", "The program of a process was replaced on disk, as by an upgrade.", "restart the unit"
    ),
    "process_arguments": Kind(
        "critical", "A process has other arguments than its unit gives it.", "remove the override, then run site.yml"
    ),
    "process_environment": Kind(
        "warning", "A process has other environment variables than its files give it.", "restart the unit with site.yml"
    ),
    "inherited_environment": Kind(
        "note",
        "A process has variables of systemd's own environment (DefaultEnvironment, systemctl set-environment).",
        "declare them in vllm_environment, or unset them",
    ),
    # What the engine says of itself.
    "engine_version": Kind("critical", "An engine is of another version of vLLM.", "restart the unit with site.yml"),
    "engine_configuration": Kind(
        "critical", "An engine works with another setting than declared.", "restart the unit with site.yml"
    ),
    "engine_drained": Kind(
        "warning", "A drain file keeps an engine out of use.", "remove /run/nvl-vllm/drain/NAME when the work is done"
    ),
    "engine_ejected": Kind(
        "warning", "The health agent has taken an engine out of use.", "read journalctl -u vllm-health"
    ),
    # The gateway.
    "gateway_server_missing": Kind("critical", "The running gateway does not know a declared engine.", _DEPLOY),
    "gateway_server_undeclared": Kind("critical", "The running gateway sends to a server nobody declared.", _DEPLOY),
    "gateway_server_state": Kind(
        "critical",
        "An engine was drained or put into maintenance at HAProxy's socket.",
        "run systemctl restart vllm-gateway; a reload would keep it",
    ),
    "gateway_server_down": Kind("critical", "The gateway does not use an engine.", "look at the engine and its unit"),
    "gateway_server_changed": Kind(
        "warning",
        "Weight, address, limit or check of an engine was changed at HAProxy's socket.",
        "run systemctl restart vllm-gateway",
    ),
    "gateway_keys": Kind(
        "critical",
        "The running gateway takes other keys than its file names.",
        "run systemctl restart vllm-gateway, and find out who changed them",
    ),
    # Sockets and the clock.
    "undeclared_socket": Kind("warning", "A process of ours listens where nobody declared it.", "stop it"),
    "socket_address": Kind("critical", "A service listens on another address than declared.", "restart the unit"),
    "socket_missing": Kind("critical", "A unit runs and does not listen on its port.", "read journalctl -u UNIT"),
    "clock_offset": Kind("warning", "The host's clock differs from the controller's.", "set up time synchronisation"),
    "clock_not_synchronised": Kind("warning", "Nothing sets the host's clock.", "install systemd-timesyncd or chrony"),
    "clock_not_managed": Kind("note", "The host is a container, whose clock is that of its host.", "look there"),
    # Driver and GPUs.
    "driver_not_loaded": Kind(
        "critical", "Another driver is loaded than declared, or than is on disk.", "run playbooks/cuda.yml"
    ),
    "driver_not_installed": Kind(
        "critical", "The kernel would load another driver at its next boot than declared.", "run playbooks/cuda.yml"
    ),
    "driver_package": Kind("warning", "A package of the driver is of another version.", "run playbooks/cuda.yml"),
    "package_not_held": Kind(
        "warning", "An upgrade of the host may replace a package that is to stay.", "run apt-mark hold PACKAGE"
    ),
    "gpu_missing": Kind("critical", "A declared GPU is not there, or lost.", "look for NVRM in the kernel log"),
    "gpu_swapped": Kind(
        "critical",
        "Another board has the place of the GPU that an engine was deployed on.",
        "run site.yml, which writes the UUID of the new one",
    ),
    "gpu_renumbered": Kind(
        "warning", "The index of an engine's GPU is another one than at the deploy.", "run site.yml"
    ),
    "gpu_setting": Kind("warning", "A setting of a GPU is not as declared.", "run playbooks/cuda.yml"),
    "gpu_ecc_off": Kind("warning", "ECC is off: memory errors go unnoticed.", "run nvidia-smi -e 1, and reboot"),
    "gpu_foreign_process": Kind("critical", "A process that is no engine holds GPU memory.", "end it"),
    "gpu_fault": Kind("critical", "The driver tells an error of a GPU.", "see docs/preflight.md"),
}

#: What lies on disk, against what was installed.
CONTENT: Mapping[str, Kind] = {
    "release_file_changed": Kind(
        "critical",
        "A file of vLLM's environment is not what its wheel brought.",
        _REBUILD,
    ),
    "release_file_missing": Kind("critical", "A file of vLLM's environment is gone.", _REBUILD),
    "release_file_added": Kind(
        "warning",
        "A file in vLLM's environment came with no wheel.",
        "remove it, and restart the engines",
    ),
    "release_package": Kind(
        "critical",
        "A package of vLLM's environment is not that of the lock file.",
        _REBUILD,
    ),
    "release_incomplete": Kind("critical", "There is no complete release at its place.", _DEPLOY),
    "lock_changed": Kind("warning", "The lock file on the host is not the one of the release.", "copy it again"),
    "model_file_changed": Kind(
        "critical",
        "A file of the checkpoint has another size, time or inode than when it was verified.",
        "run site.yml, which hashes it and brings it again where it is damaged",
    ),
    "model_file_damaged": Kind(
        "critical", "A file of the checkpoint has another SHA-256 than its manifest.", "run playbooks/verify_model.yml"
    ),
    "model_file_unread": Kind(
        "warning",
        "The inode of a file of the checkpoint changed since it was verified, though size and time are the same.",
        "run playbooks/verify_model.yml, which reads it, or give hash_budget",
    ),
    "model_file_touched": Kind(
        "note",
        "The inode or time of a file of the checkpoint changed; it was read, and its content is right.",
        "run playbooks/verify_model.yml, which takes note of it",
    ),
    "model_file_missing": Kind("critical", "A file of the checkpoint is gone.", _DEPLOY),
    "model_file_added": Kind("warning", "A file in the checkpoint's directory is in no manifest.", "remove it"),
    "model_not_recorded": Kind("warning", "Nothing tells that the checkpoint was ever verified.", _DEPLOY),
    "model_link": Kind("warning", "The link current does not lead to the declared revision.", _DEPLOY),
    "owner_changed": Kind(
        "warning",
        "A file or directory belongs to somebody else, or others may write it, or read what is secret.",
        "set it back by hand",
    ),
    "undeclared_file": Kind("warning", "A file at a place of ours was written by no role.", "remove it"),
    "package_missing": Kind("critical", "A package that a role installed is gone or broken.", _DEPLOY),
    "package_file_changed": Kind(
        "critical",
        "A file of a package is not what the package brought.",
        "install the package again (apt --reinstall)",
    ),
}
KINDS: Mapping[str, Kind] = {**RUNTIME, **CONTENT, "package_not_held": RUNTIME["package_not_held"]}

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTHORIZATION", re.IGNORECASE)
#: A name that tells of a secret, and what follows it on the line.
_SECRET_LINE = re.compile(rf"([\w.-]*(?:{_SECRET.pattern})[\w.-]*[\"']?(?:\s*[=:]\s*|\s+))\S.*", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(://)[^/\s@]+@")
MASK = "********"


def is_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _SECRET.search(name) is not None


def masked(text: str) -> str:
    """The text without what may be a secret: on each line all after a name that tells of one."""
    return "\n".join(_USER_IN_URL.sub(rf"\1{MASK}@", _SECRET_LINE.sub(rf"\1{MASK}", line)) for line in text.split("\n"))


class Report:
    """What one look at a host came to."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.facts: dict[str, Any] = {}
        self.findings: list[dict[str, Any]] = []
        self.unknown: list[str] = []

    def add(self, kind: str, where: str, found: str, wanted: str, remedy: str = "", diff: str = "") -> None:
        """A finding of a kind of ``KINDS``, whose remedy counts where none is given. It must hold no secret."""
        item = {
            "kind": kind,
            "severity": KINDS[kind].severity,
            "source": self.source,
            "where": where,
            "found": found,
            "wanted": wanted,
            "remedy": remedy or KINDS[kind].remedy,
        }
        if diff:
            item["diff"] = diff
        self.findings.append(item)

    def blind(self, sentence: str) -> None:
        """Something that could not be looked at, and why."""
        if sentence not in self.unknown:
            self.unknown.append(sentence)

    def sorted(self) -> list[dict[str, Any]]:
        """The findings, the worst first, and in an order that does not change from run to run."""
        return sorted(self.findings, key=lambda item: (SEVERITIES.index(item["severity"]), item["kind"], item["where"]))


def as_result(report: Report) -> dict[str, Any]:
    """What the module returns. It goes through JSON, so that a value which cannot is noticed here."""
    result = {"facts": report.facts, "findings": report.sorted(), "unknown": report.unknown}
    return dict(json.loads(json.dumps(result)))
