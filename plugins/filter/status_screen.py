# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Status of hosts as one screen."""

from __future__ import annotations

from typing import Any

from ansible_collections.nvl.vllm.plugins.module_utils._status import screen

DOCUMENTATION = r"""
name: status_screen
short_description: Status of hosts as one screen
version_added: 0.1.0
description:
  - Tables of engines, gateway and GPUs of each host.
author: The nvl.vllm authors
positional: _input
options:
  _input:
    description: Results of M(nvl.vllm.status) by host; one without C(instances) was not reached, its C(msg) says why.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show how the hosts do
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: status} | nvl.vllm.status_screen }}"
"""

RETURN = r"""
_value:
  description: The screen, several lines, without colours.
  type: str
"""


class FilterModule:
    """Ansible's way to find the filter."""

    def filters(self) -> dict[str, Any]:
        return {"status_screen": screen}
