#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Make a host's verdict the state that Ansible shows."""

# An action plugin does the work; this is its documentation.

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_verdict
short_description: Make a host's verdict the state that Ansible shows
version_added: 0.1.0
description:
  - A clean host is ok, a drifted one failed, an unknown one unreachable.
  - Ansible makes its exit code of this - 0, 2, or 4 where any host is unknown.
  - Runs on the controller and reaches no host.
author: The nvl.vllm authors
options:
  verdict:
    description: The verdict, as M(nvl.vllm.drift_report) returns it.
    type: str
    choices: [clean, drifted, unknown]
    required: true
  sentence:
    description: What to show with it.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing.
  diff_mode:
    support: none
    description: Changes nothing.
  idempotent:
    support: full
    description: Changes nothing.
seealso:
  - module: nvl.vllm.drift_report
"""

EXAMPLES = r"""
- name: The verdict of each host
  nvl.vllm.drift_verdict:
    verdict: "{{ report.hosts[inventory_hostname].verdict }}"
    sentence: "{{ report.hosts[inventory_hostname].sentence }}"
"""

RETURN = r""" # """
