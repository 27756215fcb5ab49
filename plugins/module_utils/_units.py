# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What is to do about the units of a host, from what they are and what is declared. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Lines of a journal that tell why an engine ended, most telling first.
_REASONS = (
    re.compile(r"^not ready: (?!the engine ended)(.+)$", re.MULTILINE),
    re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE),
    re.compile(r"^(vllm serve: error: .+)$", re.MULTILINE),
    re.compile(r"^(.*(?:Failed at step|code=exited|Start request repeated).*)$", re.MULTILINE),
)
#: In place of a fingerprint where this run would make the inputs.
PENDING = "new inputs"
#: What vLLM's parent process says after the engine has told the real reason.
_ECHO = "Engine core initialization failed"


class Unit(NamedTuple):
    """One unit as found: ``started_from`` and ``wanted`` are fingerprints of its inputs."""

    name: str
    active: str
    enabled: bool
    stale: bool
    started_from: str
    wanted: str

    @property
    def action(self) -> str:
        """``none``, ``started`` or ``restarted``."""
        if self.active == "active":
            return "none" if self.started_from == self.wanted else "restarted"
        if self.active == "activating" and self.started_from != self.wanted:
            return "restarted"
        return "started"


class Changes(NamedTuple):
    """The difference as a person reads it: one line a fact."""

    lines_before: list[str]
    lines_after: list[str]


def parse_show(text: str) -> dict[str, str]:
    """``systemctl show`` as a dictionary."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def undeclared(known: Iterable[str], declared: Sequence[str]) -> list[str]:
    """Instances that the host has and the declaration has not."""
    return sorted(set(known) - set(declared))


def plan(units: Iterable[Unit], gone: Iterable[str], target_enabled: bool) -> Changes:
    """What would change, as lines before and after; both empty when nothing would."""
    before: list[str] = []
    after: list[str] = []
    for unit in units:
        service = f"vllm@{unit.name}.service"
        if not unit.enabled:
            before.append(f"{service} not enabled\n")
            after.append(f"{service} enabled\n")
        if unit.action == "started":
            before.append(f"{service} {unit.active or 'unknown'}\n")
            after.append(f"{service} active\n")
        elif unit.action == "restarted":
            wanted = unit.wanted if unit.wanted == PENDING else f"inputs {unit.wanted[:12]}"
            before.append(f"{service} runs from inputs {unit.started_from[:12] or 'that nobody noted'}\n")
            after.append(f"{service} runs from {wanted}\n")
    for name in gone:
        before.append(f"vllm@{name}.service is there\n")
        after.append(f"vllm@{name}.service removed, as it is not declared\n")
    if not target_enabled:
        before.append("vllm.target not enabled\n")
        after.append("vllm.target enabled\n")
    return Changes(before, after)


def journal_reason(journal: str) -> str:
    """The line of a unit's journal that best tells why it did not come up."""
    for pattern in _REASONS:
        found: list[str] = [line for line in pattern.findall(journal) if _ECHO not in line]
        if found:
            return found[-1].strip()
    lines = [line for line in journal.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its journal is empty"
