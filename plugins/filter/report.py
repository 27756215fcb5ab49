# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The short table at the end of a deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DOCUMENTATION = r"""
name: report
short_description: The short table at the end of a deploy
version_added: 0.1.0
description:
  - Makes a table of instances with their state, the verdict of the last failover drill, and a
    command to try the first one.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: Instances as M(nvl.vllm.declaration) returns them.
    type: list
    elements: dict
    required: true
  endpoints:
    description: Endpoints as M(nvl.vllm.vllm_health) returns them.
    type: list
    elements: dict
    required: true
  drill:
    description: Result of M(nvl.vllm.failover_drill).
    type: dict
    required: true
  model:
    description: Served name.
    type: str
    required: true
  key:
    description: What stands for the API key in the command; empty where engines want none.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Show what was deployed
  ansible.builtin.debug:
    msg: "{{ instances | nvl.vllm.report(health.endpoints, drill, 'gpt-oss-120b') }}"
"""

RETURN = r"""
_value:
  description: The table, several lines.
  type: str
"""


def failover(drill: Mapping[str, Any]) -> str:
    """One line about the last drill, or why there was none."""
    if "verdict" not in drill:
        return str(drill.get("msg") or "not drilled")
    numbers = (
        f"{drill['verdict']}: {drill['sent']} requests, {drill['lost']} lost, {drill['retried']} retried, "
        f"{drill['truncated']} cut mid-stream; {drill['target']} served again after {drill['seconds_to_recover']} s"
    )
    return f"{numbers} (drill of {drill['proven']}, nothing changed since)" if drill.get("proven") else numbers


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def report(
    instances: Sequence[Mapping[str, Any]],
    endpoints: Sequence[Mapping[str, Any]],
    drill: Mapping[str, Any],
    model: str,
    key: str = "",
) -> str:
    """The table, the drill's line and a command, as text of several lines."""
    health = {endpoint["name"]: endpoint for endpoint in endpoints}
    rows = [("INSTANCE", "PORT", "DEVICE", "STATE", "MODEL", "FIRST TOKEN")]
    for instance in instances:
        found = health[instance["name"]]
        serves = found["serves"]
        device = ", ".join(f"GPU {gpu}" for gpu in instance["gpus"]) or "CPU"
        state = "serves" if found["healthy"] else "not healthy"
        first = f"{serves['ttft_seconds'] * 1000:.0f} ms" if "ttft_seconds" in serves else "-"
        rows.append((instance["name"], str(instance["port"]), device, state, serves.get("model", "-"), first))
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 40}}'
    return "\n".join(
        [
            *table(rows),
            "",
            f"Failover  {failover(drill)}",
            f"Try it    curl -s {instances[0]['url']}/v1/chat/completions{header} \\",
            "            -H 'Content-Type: application/json' \\",
            f"            -d '{body}'",
        ]
    )


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"report": report}
