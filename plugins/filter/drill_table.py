# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Failover drills as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.nvl.vllm.plugins.filter.report import table

DOCUMENTATION = r"""
name: drill_table
short_description: Failover drills as a table
version_added: 0.1.0
description:
  - A row for each drill with its numbers. C(RETRIED) counts what the client or the gateway sent again.
    Where the drills come from a loop whose items have a C(name), a drill is called by that, else by
    what was done.
  - Below the table a sentence for each limit that was not kept, and one for each drill that was
    skipped or refused.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: Results of M(nvl.vllm.failover_drill), such as C(results) of a task with a loop.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what users noticed
  ansible.builtin.debug:
    msg: "{{ drills.results | nvl.vllm.drill_table }}"
"""

RETURN = r"""
_value:
  description: The table, several lines; times in seconds.
  type: str
"""

HEADER = (
    *("DRILL", "VIA", "VERDICT", "SENT", "OK", "LOST", "RETRIED", "CUT"),
    *("P50", "P99", "WORST", "EJECT", "FIRST OK", "RECOVER"),
)


def named(drill: Mapping[str, Any]) -> str:
    """The name of the loop's item that the drill is the result of; empty where it has none."""
    item = drill.get("item")
    return str(item.get("name", "")) if isinstance(item, Mapping) else ""


def drill_table(drills: Sequence[Mapping[str, Any]]) -> str:
    """The table as text of several lines."""
    rows: list[Sequence[str]] = [HEADER]
    notes = []
    for drill in drills:
        name = named(drill)
        if "verdict" not in drill:
            notes.append(f"No drill: {f'{name}: ' if name else ''}{drill.get('msg') or 'skipped'}")
            continue
        latency = drill["latency"]
        retried = drill["retried"] + (drill["retried_by_gateway"] or 0)
        counts = (drill["sent"], drill["completed"], drill["lost"], retried, drill["truncated"])
        times = (
            *(latency["p50"], latency["p99"], latency["worst"]),
            *(drill["seconds_to_eject"], drill["seconds_to_first_success"], drill["seconds_to_recover"]),
        )
        name = name.removesuffix(f" via {drill['via']}") or drill["fault"]
        verdict = (name, drill["via"], drill["verdict"])
        rows.append((*verdict, *map(str, counts), *("-" if value is None else f"{value:.2f}" for value in times)))
        notes += [f"Not kept: {name}, {drill['via']}: {sentence}" for sentence in drill["broken"]]
    return "\n".join([*(table(rows) if len(rows) > 1 else []), *notes])


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"drill_table": drill_table}
