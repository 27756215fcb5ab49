#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Tell how engines, gateway and GPUs of a host do right now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: status
short_description: Tell how engines, gateway and GPUs of a host do right now
version_added: 0.1.0
description:
  - Looks twice at the counters of each engine, and at the states that health agent, gateway and C(nvidia-smi) tell.
  - What cannot be asked is null, with the reason in RV(problems). The module does not fail for it.
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
      url:
        description: Base URL, without C(/v1).
        type: str
        required: true
  agent_url:
    description: Base URL of the health agent's status; empty where there is none.
    type: str
    default: ""
  statistics_url:
    description: Base URL of the gateway's statistics; empty where there is none.
    type: str
    default: ""
  gpus:
    description: Whether to ask C(nvidia-smi).
    type: bool
    default: false
  window:
    description: Time (s) between the two looks that rates are made from.
    type: float
    default: 1.0
  timeout:
    description: Deadline (s) of each question.
    type: float
    default: 5.0
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
"""

EXAMPLES = r"""
- name: Look at the engines
  nvl.vllm.status:
    instances:
      - {name: primary, url: "http://127.0.0.1:8001"}
    statistics_url: http://127.0.0.1:8404
"""

RETURN = r"""
instances:
  description: >-
    Figures of each engine by name. C(running) and C(waiting) requests, C(kv_usage) and C(hit_rate) from 0 to 1,
    C(prompt_tokens_per_second) and C(generation_tokens_per_second), C(ttft_seconds) (mean of the window),
    C(preemptions) and C(uptime_seconds) since the engine's start. Null is what could not be told.
  returned: success
  type: dict
agent:
  description: What the health agent tells the gateway of each engine; null where it was not asked or does not answer.
  returned: success
  type: dict
gateway:
  description: >-
    C(sessions), C(queue), C(retries), C(errors_5xx) of the gateway, the state of each of its C(servers), and in
    C(queues) how many requests each of them could take from the queue.
  returned: success
  type: dict
gpus:
  description: >-
    C(index), C(name), C(utilization) (percent), C(used_mib), C(total_mib), C(temperature_c) (degrees Celsius),
    C(power_w) and C(power_cap_w) of each GPU.
  returned: success
  type: list
  elements: dict
problems:
  description: What could not be asked, and why.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _status
from ansible_collections.nvl.vllm.plugins.module_utils._http import Endpoint, endpoints_of


def main() -> None:
    """Ansible's entry point."""
    instance = {"name": {"type": "str", "required": True}, "url": {"type": "str", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "options": instance, "required": True},
            "agent_url": {"type": "str", "default": ""},
            "statistics_url": {"type": "str", "default": ""},
            "gpus": {"type": "bool", "default": False},
            "window": {"type": "float", "default": 1.0},
            "timeout": {"type": "float", "default": 5.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    for name in ("window", "timeout"):
        if params[name] <= 0:
            module.fail_json(msg=f"{name} is {params[name]:g} s: wanted more than 0")
    try:
        endpoints = endpoints_of(params["instances"], None)
        agent = Endpoint("health agent", params["agent_url"]) if params["agent_url"] else None
        statistics = Endpoint("gateway", params["statistics_url"]) if params["statistics_url"] else None
        found = _status.read(endpoints, agent, statistics, params["gpus"], params["window"], params["timeout"])
    except ValueError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
