#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Hold what runs on a host against what is declared."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_facts
short_description: Hold what runs on a host against what is declared
version_added: 0.1.0
description:
  - Looks at units, processes, engines, health agent, gateway, listening sockets, clock, and on GPU hosts at the driver
    and the GPUs, and tells what is not as declared. Files are not compared with the declaration; a run of the roles in
    check mode does that.
  - Changes nothing, in either mode. It needs root.
  - What could not be looked at is in RV(unknown), so that it does not pass for clean.
  - Secrets are compared and never returned.
author: The nvl.vllm authors
options:
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  version:
    description: Version of vLLM that the engines are to be of.
    type: str
    required: true
  instances:
    description: The instances of RV(nvl.vllm.declaration#module:instances), with these keys only.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the instance.
        type: str
        required: true
      unit:
        description: Its unit.
        type: str
        required: true
      port:
        description: Its TCP port.
        type: int
        required: true
      url:
        description: Its base URL as seen on the host.
        type: str
        required: true
      gpus:
        description: Its GPUs, by index or UUID.
        type: list
        elements: raw
        default: []
      arguments:
        description: Its engine arguments.
        type: dict
        default: {}
  served_model_name:
    description: Name under which clients ask for the model.
    type: str
    required: true
  model_path:
    description: Directory of the checkpoint.
    type: path
    required: true
  root:
    description: Directory with the C(current) link to the release.
    type: path
    default: /opt/vllm
  user:
    description: The user that engines run as.
    type: str
    default: vllm
  api_key_sha256:
    description: SHA-256 of the key that engines ask for, in hexadecimal; empty for no key.
    type: str
    default: ""
  health:
    description: Whether the host has a health agent.
    type: bool
    default: true
  health_agent_port:
    description: Port where HAProxy asks the health agent.
    type: int
    default: 8403
  health_status_port:
    description: Port of the health agent's status.
    type: int
    default: 8405
  gateway:
    description: Whether the host has a gateway. Where it has not, one that runs is a finding.
    type: bool
    default: true
  gateway_host:
    description: Address that the gateway listens on.
    type: str
    default: 127.0.0.1
  gateway_port:
    description: Port that the gateway listens on.
    type: int
    default: 8000
  driver_version:
    description: Declared version of NVIDIA's driver; empty where the host brings its own.
    type: str
    default: ""
  gpu_settings:
    description: Declared settings of the GPUs, as in M(nvl.vllm.gpu_settings). Left out, they are not compared.
    type: dict
    suboptions:
      persistence:
        description: Persistence mode.
        type: bool
        default: true
      mig:
        description: MIG.
        type: str
        choices: ["off", leave]
        default: "off"
      compute_mode:
        description: Compute mode.
        type: str
        choices: [default, exclusive_process, leave]
        default: leave
      power_limit:
        description: Power limit (W), V(default), or V(leave).
        type: str
        default: leave
  foreign_mib:
    description: GPU memory (MiB) that a process which is no engine may hold before it is told.
    type: int
    default: 512
  restarts:
    description: Restarts of a unit by systemd that are not worth a note.
    type: int
    default: 3
  controller_time:
    description:
      - The controller's time, in seconds since the epoch, as the task begins. Left out, the clocks are not compared.
      - The time to reach the host counts as a difference, as it cannot be told from one.
    type: float
  clock_tolerance:
    description: Difference (s) of the clocks that is none.
    type: float
    default: 5.0
  timeout:
    description: Deadline (s) of each reading.
    type: float
    default: 10.0
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: none
    description: Changes nothing. Drop-ins are shown in the findings.
  idempotent:
    support: full
    description: Changes nothing.
seealso:
  - module: nvl.vllm.drift_content
"""

EXAMPLES = r"""
- name: Look at what runs
  nvl.vllm.drift_facts:
    device: "{{ vllm_device }}"
    version: "{{ vllm_version }}"
    # Without the environment, which may hold secrets and would be logged.
    instances: >-
      {{ vllm_declared.instances | map('dict2items')
         | map('selectattr', 'key', 'in', ['name', 'unit', 'port', 'url', 'gpus', 'arguments']) | map('items2dict') }}
    served_model_name: "{{ vllm_served_model_name }}"
    model_path: "{{ vllm_declared.model.path }}"
    api_key_sha256: "{{ vllm_api_key | hash('sha256') if vllm_api_key else '' }}"
    controller_time: "{{ now().timestamp() }}"
  register: drift_facts
"""

RETURN = r"""
findings:
  description: What is not as declared, the worst first.
  returned: success
  type: list
  elements: dict
  contains:
    kind:
      description: Kind of finding; docs/drift.md lists them.
      type: str
      sample: stale_process
    severity:
      description: V(critical), V(warning) or V(note).
      type: str
    source:
      description: V(runtime).
      type: str
    where:
      description: Unit, GPU, port or the like; with host and kind it names the finding.
      type: str
      sample: vllm@primary.service
    found:
      description: What was found.
      type: str
    wanted:
      description: What is declared.
      type: str
    remedy:
      description: What to do.
      type: str
    diff:
      description: Text of a drop-in, without secrets.
      returned: for some kinds
      type: str
unknown:
  description: What could not be looked at, and why.
  returned: success
  type: list
  elements: str
facts:
  description: What was seen, by part. Parts that do not apply are left out.
  returned: success
  type: dict
"""

import os
import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_facts, _gpu_settings
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import as_result


def main():
    instance = {
        "name": {"type": "str", "required": True},
        "unit": {"type": "str", "required": True},
        "port": {"type": "int", "required": True},
        "url": {"type": "str", "required": True},
        "gpus": {"type": "list", "elements": "raw", "default": []},
        "arguments": {"type": "dict", "default": {}},
    }
    settings = {
        "persistence": {"type": "bool", "default": True},
        "mig": {"type": "str", "choices": ["off", "leave"], "default": "off"},
        "compute_mode": {"type": "str", "choices": ["default", "exclusive_process", "leave"], "default": "leave"},
        "power_limit": {"type": "str", "default": "leave"},
    }
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "version": {"type": "str", "required": True},
            "instances": {"type": "list", "elements": "dict", "options": instance, "required": True},
            "served_model_name": {"type": "str", "required": True},
            "model_path": {"type": "path", "required": True},
            "root": {"type": "path", "default": "/opt/vllm"},
            "user": {"type": "str", "default": "vllm"},
            "api_key_sha256": {"type": "str", "default": "", "no_log": True},
            "health": {"type": "bool", "default": True},
            "health_agent_port": {"type": "int", "default": 8403},
            "health_status_port": {"type": "int", "default": 8405},
            "gateway": {"type": "bool", "default": True},
            "gateway_host": {"type": "str", "default": "127.0.0.1"},
            "gateway_port": {"type": "int", "default": 8000},
            "driver_version": {"type": "str", "default": ""},
            "gpu_settings": {"type": "dict", "options": settings},
            "foreign_mib": {"type": "int", "default": 512},
            "restarts": {"type": "int", "default": 3},
            "controller_time": {"type": "float"},
            "clock_tolerance": {"type": "float", "default": 5.0},
            "timeout": {"type": "float", "default": 10.0},
        },
        supports_check_mode=True,
    )
    params = dict(module.params)
    if params["timeout"] <= 0:
        module.fail_json(msg=f"timeout is {params['timeout']:g} s: wanted more than 0")
    if os.geteuid() != 0:
        module.fail_json(
            msg=f"{socket.gethostname()}: drift_facts runs as user {os.geteuid()}, and only root may look at processes "
            "and keys: run it with become: true"
        )
    if params["gpu_settings"] is not None:
        params["gpu_settings"] = _gpu_settings.Wanted(prefix="cuda_", **params["gpu_settings"])
    params["agent_port"] = params.pop("health_agent_port")
    params["status_port"] = params.pop("health_status_port")
    report = _drift_facts.Look(_drift_facts.Wanted(**params)).look()
    module.exit_json(changed=False, **as_result(report))


if __name__ == "__main__":
    main()
