# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What ails hosts, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.nvl.vllm.plugins.module_utils._doctor import table

DOCUMENTATION = r"""
name: doctor_table
short_description: What ails hosts, for a terminal
version_added: 0.1.0
description:
  - Each finding with its evidence and what to do, the worst first; a sentence for a healthy host.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: Results of M(nvl.vllm.doctor) by host.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what ails
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: doctor} | nvl.vllm.doctor_table }}"
"""

RETURN = r"""
_value:
  description: The text, several lines.
  type: str
"""


def doctor_table(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """The findings of all hosts, then what could not be looked at."""
    lines = [table({host: result["findings"] for host, result in hosts.items()})]
    lines += [f"Not looked at on {host}: {one}" for host, result in sorted(hosts.items()) for one in result["unknown"]]
    return "\n".join(lines)


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"doctor_table": doctor_table}
