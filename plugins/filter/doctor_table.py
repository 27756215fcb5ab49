# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What ails hosts, for a terminal."""

from __future__ import annotations

from typing import Any

from ansible_collections.nvl.vllm.plugins.module_utils._doctor import table

DOCUMENTATION = r"""
name: doctor_table
short_description: What ails hosts, for a terminal
version_added: 0.1.0
description:
  - Each finding with its evidence and what to do, the worst first, then what could not be looked at. A healthy host is
    one line.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: By host C(findings) and C(unknown), as M(nvl.vllm.doctor) returns them.
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


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"doctor_table": table}
