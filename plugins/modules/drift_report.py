#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Judge what a drift run has found, show it, and keep it on the controller."""

# An action plugin does the work; this is its documentation.

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_report
short_description: Judge what a drift run has found, show it, and keep it on the controller
version_added: 0.1.0
description:
  - Joins what the callback plugin C(nvl.vllm.drift) recorded in this run and what M(nvl.vllm.drift_facts) and
    M(nvl.vllm.drift_content) returned, and gives each host a verdict - C(clean), C(drifted) or C(unknown).
  - Prints a table, and writes the report as JSON and HTML, its history, and where wanted a text file for Prometheus.
  - Runs on the controller and reaches no host. Run it once for all hosts (C(run_once)).
  - The variables C(vllm_drift_accepted) and C(vllm_drift_severities) are read for each host from the inventory.
author: The nvl.vllm authors
options:
  hosts:
    description: Names of the hosts to judge.
    type: list
    elements: str
    required: true
  expected:
    description:
      - For each group what must have been looked at on its hosts. C(roles) names the roles, C(results) has for each
        module that looks at hosts the variable in which its result was registered.
      - Hosts of these groups that were not looked at now keep their last state in O(textfile).
    type: dict
    required: true
  refusals:
    description: The variable that holds the objections of roles to a deploy, as a list of sentences for each role.
    type: str
    required: true
  reviewed:
    description: Tasks that check mode may leave out.
    type: list
    elements: dict
    required: true
    suboptions:
      role:
        description: Name of the role.
        type: str
        required: true
      tasks:
        description: Names of its tasks, as they are written there.
        type: list
        elements: str
        required: true
      why:
        description: Why nothing stays unseen.
        type: str
        required: true
  directory:
    description:
      - Directory of the reports, made where needed, for its user alone.
      - A relative path begins where Ansible was started.
    type: path
    required: true
  keep:
    description: Reports that the history keeps, 1 or more.
    type: int
    default: 100
  textfile:
    description: File for Prometheus' node exporter; empty for none.
    type: path
    default: ""
attributes:
  check_mode:
    support: full
    description: Does the same in either mode; its files are the report, on the controller.
  diff_mode:
    support: none
    description: Changes no host.
  idempotent:
    support: none
    description: Each run is one more report in the history.
seealso:
  - module: nvl.vllm.drift_verdict
"""

EXAMPLES = r"""
- name: Judge all hosts, and show and keep the report (on the controller)
  nvl.vllm.drift_report:
    hosts: "{{ ansible_play_hosts_all }}"
    expected:
      vllm:
        roles: [vllm, vllm_instances]
        results:
          nvl.vllm.drift_facts: __vllm_drift_facts
    refusals: objections
    reviewed: []
    directory: .drift
  run_once: true
"""

RETURN = r"""
verdict:
  description: The worst verdict of all hosts.
  returned: success
  type: str
  sample: drifted
hosts:
  description: Of each host the C(verdict) and a C(sentence) about it.
  returned: success
  type: dict
json:
  description: Path of the report, on the controller.
  returned: success
  type: str
  sample: /home/operator/deploy/.drift/latest.json
"""
