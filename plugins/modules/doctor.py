#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Tell what ails the engines of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: doctor
short_description: Tell what ails the engines of a host
version_added: 0.1.0
description:
  - Watches engines, gateway and GPUs for a while, reads units and journals, asks each engine for one token, and names
    what is wrong, with the evidence and the variable to change.
  - Changes nothing, in either mode. It needs root.
  - docs/doctor.md lists the findings.
author: The nvl.vllm authors
options:
  instances:
    description: Engines to look at.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the instance.
        type: str
        required: true
      unit:
        description: Its systemd unit.
        type: str
        required: true
      url:
        description: Base URL, without C(/v1).
        type: str
        required: true
      gpus:
        description: Its GPUs, as indexes or UUIDs.
        type: list
        elements: raw
        default: []
      arguments:
        description: Its declared arguments, by vLLM's names.
        type: dict
        required: true
      environment:
        description: Its declared environment variables.
        type: dict
        default: {}
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  gateway:
    description: Whether the host has a gateway.
    type: bool
    default: true
  agent_url:
    description: Base URL of the health agent's status.
    type: str
    default: http://127.0.0.1:8405
  statistics_url:
    description: Base URL of the gateway's statistics.
    type: str
    default: http://127.0.0.1:8404
  root:
    description: Directory with the releases.
    type: path
    default: /opt/vllm
  model_path:
    description: Directory of the checkpoint.
    type: path
    required: true
  version:
    description: Version of vLLM; the memory plan of an engine that ran out of memory is for it.
    type: str
    default: ""
  disks:
    description: Directories whose file systems must not be full; those that are not there are left out.
    type: list
    elements: path
    default: []
  window:
    description: How long (s) the engines are watched.
    type: float
    default: 10.0
  interval:
    description: Time (s) between two looks within the window.
    type: float
    default: 1.0
  timeout:
    description: Deadline (s) of each question.
    type: float
    default: 10.0
  limits:
    description: >-
      From where on something is a finding: C(hit_rate), C(gpu_utilization), C(kv_usage), C(free_space) and C(pressure)
      from 0 to 1, C(load_rate) in MiB/s, C(load_size) in GiB, C(restarts) as a count. What is left out has its default.
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: none
    description: Changes nothing.
  idempotent:
    support: full
    description: Changes nothing.
seealso:
  - module: nvl.vllm.status
"""

EXAMPLES = r"""
- name: What ails the engines?
  nvl.vllm.doctor:
    device: cuda
    instances:
      - name: primary
        unit: vllm@primary.service
        url: http://127.0.0.1:8001
        gpus: [0]
        arguments: {max-num-seqs: 8}
    model_path: /srv/models/gpt-oss-120b/current
"""

RETURN = r"""
findings:
  description: >-
    What ails, the worst first; empty on a healthy host. Each has C(name), C(severity) (V(critical) or V(warning)),
    C(where) (a unit, GPU, disk ...), C(evidence) and C(remedy).
  returned: success
  type: list
  elements: dict
unknown:
  description: What could not be looked at, and why.
  returned: success
  type: list
  elements: str
"""

import os
import socket
from dataclasses import fields

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _doctor, _doctor_look
from ansible_collections.nvl.vllm.plugins.module_utils._hint import hint


def main() -> None:
    """Ansible's entry point."""
    instance = {
        "name": {"type": "str", "required": True},
        "unit": {"type": "str", "required": True},
        "url": {"type": "str", "required": True},
        "gpus": {"type": "list", "elements": "raw", "default": []},
        "arguments": {"type": "dict", "required": True},
        "environment": {"type": "dict", "default": {}},
    }
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "options": instance, "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "gateway": {"type": "bool", "default": True},
            "agent_url": {"type": "str", "default": "http://127.0.0.1:8405"},
            "statistics_url": {"type": "str", "default": "http://127.0.0.1:8404"},
            "root": {"type": "path", "default": "/opt/vllm"},
            "model_path": {"type": "path", "required": True},
            "version": {"type": "str", "default": ""},
            "disks": {"type": "list", "elements": "path", "default": []},
            "window": {"type": "float", "default": 10.0},
            "interval": {"type": "float", "default": 1.0},
            "timeout": {"type": "float", "default": 10.0},
            "limits": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = dict(module.params)
    for name in ("window", "interval", "timeout"):
        if params[name] <= 0:
            module.fail_json(msg=f"{name} is {params[name]:g} s: wanted more than 0")
    known = [field.name for field in fields(_doctor.Limits)]
    given = params.pop("limits")
    for name, value in given.items():
        if name not in known:
            module.fail_json(msg=f"limits names {name}, which is no limit{hint(name, known)}")
        try:
            given[name] = float(value)
        except (TypeError, ValueError):
            module.fail_json(msg=f"limits.{name} is {value!r}: wanted a number")
    if os.geteuid() != 0:
        module.fail_json(
            msg=f"{socket.gethostname()}: doctor runs as user {os.geteuid()}, and only root may read journals and "
            "processes: run it with become: true"
        )
    observed, unknown = _doctor_look.Look(_doctor_look.Wanted(**params)).look()
    findings = _doctor.diagnose(observed, _doctor.Limits(**given))
    module.exit_json(changed=False, findings=_doctor.as_dicts(findings), unknown=unknown)


if __name__ == "__main__":
    main()
