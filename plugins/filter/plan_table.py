# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""The memory plan as a table that is read at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DOCUMENTATION = r"""
name: plan_table
short_description: The memory plan as a table that is read at a glance
version_added: 0.1.0
description:
  - Draws a budget bar for each device (weights, other needs of the engine, KV cache, memory that others
    hold, free) and tells for each instance the verdict, its KV cache and what its arguments leave unused.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: Plan as M(nvl.vllm.gpu_memory) returns it.
    type: dict
    required: true
  findings:
    description: Findings about the GPUs as M(nvl.vllm.gpu_info) returns them.
    type: list
    elements: dict
    default: []
  problem:
    description: Why there is no plan, as M(nvl.vllm.gpu_memory) returns it.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Show the plan
  ansible.builtin.debug:
    msg: "{{ planned.plan | nvl.vllm.plan_table }}"
"""

RETURN = r"""
_value:
  description: The table, several lines.
  type: str
"""

WIDTH = 40
#: Parts of a bar: key in the plan, heading, sign.
PARTS = (
    ("weights_gib", "WEIGHTS", "█"),
    ("overhead_gib", "OTHER", "▓"),
    ("kv_gib", "KV CACHE", "▒"),
    ("foreign_gib", "FOREIGN", "x"),
    ("free_gib", "FREE", "·"),
)


def bar(sizes: Sequence[float], total: float, width: int = WIDTH) -> str:
    """The parts as a line of signs. Each is as long as its share, rounded so that the ends lie where the sums do."""
    line, done, end = "", 0, 0.0
    for size, (_, _, sign) in zip(sizes, PARTS):
        end += max(0.0, size)
        place = min(width, round(end / total * width)) if total else 0
        line += sign * (place - done)
        done = place
    return line


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def plan_table(plan: Mapping[str, Any], findings: Sequence[Mapping[str, Any]] = (), problem: str = "") -> str:
    """The table of a plan, and a line for each finding. Without a plan the reason, and the findings."""
    told = [f"{finding['severity'].capitalize()}: {finding['sentence']}" for finding in findings]
    if not plan:
        return "\n".join([f"There is no memory plan: {problem or 'GPUs or model are not known yet'}", *told])
    devices = [["DEVICE", "GiB", *(heading for _, heading, _ in PARTS), ""]]
    for device in plan["devices"]:
        sizes = [float(device[key]) for key, _, _ in PARTS]
        name = f"{device['index']} {device['name']}"
        figures = [f"{size:.1f}" if abs(size) >= 0.05 else "-" for size in sizes]
        total = float(device["total_gib"])
        short = " too little" if device["free_gib"] < 0 else ""
        devices.append([name, f"{total:.1f}", *figures, bar(sizes, total) + short])
    lines = columns(devices)
    lines.append("█ weights  ▓ CUDA, activations, graphs  ▒ KV cache  x held by others  · free")

    instances = [["INSTANCE", "DEVICE", "VERDICT", "KV CACHE", "AT ONCE", "ROOM FOR"]]
    for one in plan["instances"]:
        budget = one["budget"]
        low, high = budget["kv_low_gib"], budget["kv_high_gib"]
        tokens = f"{one['kv_tokens']:,} tokens" if one["kv_tokens"] else "none"
        instances.append(
            [
                one["name"],
                ",".join(str(index) for index in one["devices"]),
                one["verdict"],
                f"{budget['kv_gib']:.1f} GiB ({low:.1f} to {high:.1f}), {tokens}",
                f"{one['max_concurrency']:.1f} requests of {one['max_model_len']} tokens",
                f"max-model-len up to {one['largest_max_model_len']}, max-num-seqs {one['recommended_max_num_seqs']}",
            ]
        )
    lines += ["", *columns(instances)]
    for heading, sentences in (("Does not fit", plan["errors"]), ("Note", plan["warnings"])):
        lines += ["", *(f"{heading}: {sentence}" for sentence in sentences)] if sentences else []
    return "\n".join([*lines, *([""] if told else []), *told])


class FilterModule:
    """The filter for Ansible."""

    def filters(self) -> dict[str, Any]:
        return {"plan_table": plan_table}
