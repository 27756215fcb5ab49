# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Which part of a host's files the drift check reads next."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ansible_collections.nvl.vllm.plugins.module_utils._drift import History, turn_of

DOCUMENTATION = r"""
name: drift_turn
short_description: Which part of a host's files the drift check reads next
version_added: 0.1.0
description:
  - Counts the looks at a host, from the reports that are kept on the controller. 0 where there are none.
author: The nvl.vllm authors
positional: host
options:
  _input:
    description: Directory of the reports, as in O(nvl.vllm.drift_report#module:directory).
    type: path
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Look at what is on disk
  nvl.vllm.drift_content:
    turn: "{{ '.drift' | nvl.vllm.drift_turn(inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: The number.
  type: int
"""


def drift_turn(directory: str, host: str) -> int:
    """The number of earlier looks at the disk of this host."""
    return turn_of(History(os.path.abspath(os.path.expanduser(directory))).reports(), host)


class FilterModule:
    """Makes the filter known to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"drift_turn": drift_turn}
