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
  - Makes a table of instances with their state, a line about the gateway, the verdict of each failover
    drill, and a command to try the gateway, or without one the first instance.
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
  drills:
    description: Results of M(nvl.vllm.failover_drill) from a loop whose items have a C(name).
    type: list
    elements: dict
    required: true
  model:
    description: Served name.
    type: str
    required: true
  key:
    description: What stands for the API key in the command; empty where engines want none.
    type: str
    default: ""
  gateway:
    description:
      - The gateway's C(url) and the names of the instances that it has in use (C(used)), null where it
        was not asked. Without it there is none.
    type: dict
"""

EXAMPLES = r"""
- name: Show what was deployed
  ansible.builtin.debug:
    msg: "{{ instances | nvl.vllm.report(health.endpoints, drills.results, 'gpt-oss-120b') }}"
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


def failovers(drills: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line about each drill, with its name where there are several."""
    if len(drills) > 1:
        return [f"{drill['item']['name']} {failover(drill)}" for drill in drills]
    return [failover(drill) for drill in drills] or ["not drilled"]


def door(gateway: Mapping[str, Any], names: Sequence[str]) -> str:
    """One line about the gateway."""
    if gateway["used"] is None:
        return f"{gateway['url']} not asked in check mode"
    used = [name for name in names if name in gateway["used"]]
    return f"{gateway['url']} serves, {len(used)} of {len(names)} engines up"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def report(
    instances: Sequence[Mapping[str, Any]],
    endpoints: Sequence[Mapping[str, Any]],
    drills: Sequence[Mapping[str, Any]],
    model: str,
    key: str = "",
    gateway: Mapping[str, Any] | None = None,
) -> str:
    """The table, lines about the gateway and the drills, and a command, as text of several lines."""
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
    lines = [f"Gateway   {door(gateway, [instance['name'] for instance in instances])}"] if gateway else []
    lines += [f"{'' if number else 'Failover':8}  {line}" for number, line in enumerate(failovers(drills))]
    url = gateway["url"] if gateway else instances[0]["url"]
    return "\n".join(
        [
            *table(rows),
            "",
            *lines,
            f"Try it    curl -s {url}/v1/chat/completions{header} \\",
            "            -H 'Content-Type: application/json' \\",
            f"            -d '{body}'",
        ]
    )


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"report": report}
