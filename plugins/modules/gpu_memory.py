#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Plan the memory of a host's engines before anything is installed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_memory
short_description: Plan the memory of a host's engines before anything is installed
version_added: 0.1.0
description:
  - Works out whether vLLM will start with the given arguments on the given GPUs, and with how much KV cache.
  - What vLLM computes exactly is exact here; weights, activation, CUDA graphs and what CUDA itself takes are estimates,
    each with its uncertainty. O(calibration) replaces them by what vLLM reported on this host.
  - Reads nothing but its arguments and needs no GPU, so it runs on the controller as well.
author: The nvl.vllm authors
options:
  device:
    description: What the engines run on. On C(cpu) the first of O(devices) is the host's memory.
    type: str
    choices: [cuda, cpu]
    default: cuda
  devices:
    description:
      - The GPUs of the host, each with C(index), C(uuid), C(name), C(total_mib), C(reserved_mib), C(free_mib) and
        C(processes), as C(nvidia-smi) has them. Other keys are ignored, and what is null is not known.
      - Of a known board the index and the name suffice; it is then idle.
      - Each of C(processes) has C(name), C(pid) and C(mib), and C(own) where it is an engine of the plan that runs
        already. All others are in the way.
      - On C(cpu), C(total_mib) is the limit of the engines' control group, or the host's memory.
    type: list
    elements: dict
    required: true
  model:
    description:
      - The model, with C(name) of a built-in one (gpt-oss-120b, gpt-oss-20b), or with C(config), the content of its
        C(config.json), and C(weight_bytes), the size of its tensors.
    type: dict
    required: true
  instances:
    description: Instances as M(nvl.vllm.declaration) returns them, in the order in which they start.
    type: list
    elements: dict
    required: true
  version:
    description: Version of vLLM.
    type: str
    default: 0.32.0
  calibration:
    description:
      - What vLLM reported when it started with this model on this host (GiB per GPU). C(weights_gib), C(non_torch_gib),
        C(peak_activation_gib), C(graph_gib), and C(available_kv_gib) with the C(gpu_memory_utilization) of that start.
    type: dict
    default: {}
  fail:
    description:
      - Whether to fail where an engine would not start. Otherwise what cannot be planned is no failure either.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: none
    description: Changes nothing.
  idempotent:
    support: full
    description: The same arguments give the same plan.
"""

EXAMPLES = r"""
- name: Plan the memory of the declared instances
  nvl.vllm.gpu_memory:
    devices: "{{ gpus }}"
    model:
      name: openai/gpt-oss-120b
    instances: "{{ vllm_declared.instances }}"

- name: Would two H100 NVL do?
  nvl.vllm.gpu_memory:
    devices:
      - {index: 0, name: H100 NVL}
      - {index: 1, name: H100 NVL}
    model:
      config: "{{ lookup('ansible.builtin.file', 'config.json') | from_json }}"
      weight_bytes: 65248815744
    instances:
      - {name: primary, gpus: [0], arguments: {max-model-len: 128K}}
      - {name: secondary, gpus: [1], arguments: {max-model-len: 128K}}
    fail: false
  delegate_to: localhost
"""

RETURN = r"""
problem:
  description: Why there is no plan, with O(fail=false); otherwise empty.
  returned: success
  type: str
plan:
  description: The plan; empty where there is none. Sizes in GiB per GPU.
  returned: always, unless the arguments cannot be planned with
  type: dict
  contains:
    fits: {description: Whether all engines start., type: bool}
    version: {description: Version that was planned for., type: str}
    instances:
      description: One for each instance; what has no devices is in C(errors) only.
      type: list
      elements: dict
      contains:
        name: {description: Name of the instance., type: str}
        devices: {description: Indexes of its GPUs., type: list}
        verdict: {description: 'C(fits), C(tight), C(wasteful) or C(does not fit).', type: str}
        sentences: {description: Why., type: list}
        changes: {description: Single changes that would fit., type: list}
        budget: {description: The terms of the budget with uncertainty and source., type: dict}
        max_model_len: {description: 'As declared, or chosen for C(auto).', type: int}
        largest_max_model_len: {description: The largest that fits with certainty., type: int}
        max_num_seqs: {description: As declared or by default., type: int}
        recommended_max_num_seqs: {description: Requests of max-model-len that fit at once., type: int}
        kv_tokens_low: {description: Tokens of the KV cache at the lower end., type: int}
        kv_tokens: {description: 'Tokens of the KV cache, as the log will have them.', type: int}
        max_concurrency: {description: 'Requests of max-model-len, as the log will have them.', type: float}
        idle_kv_gib: {description: KV cache that max-num-seqs leaves idle., type: float}
        calibrated: {description: Whether measured terms were used., type: bool}
    devices:
      description: One for each device; weights + overhead + kv + foreign + free = total.
      type: list
      elements: dict
      contains:
        index: {description: Index of the GPU., type: int}
        name: {description: Its name., type: str}
        total_gib: {description: Total as CUDA reports it., type: float}
        weights_gib: {description: Weights of its engines., type: float}
        overhead_gib: {description: 'Activation, CUDA graphs and what CUDA takes.', type: float}
        kv_gib: {description: KV cache., type: float}
        foreign_gib: {description: What programs outside the plan hold., type: float}
        free_gib: {description: The rest; negative where it is missing., type: float}
        instances: {description: Names of its engines., type: list}
    errors: {description: Why an engine does not start., type: list}
    warnings: {description: 'What is tight, or wasteful.', type: list}
"""

import socket
from dataclasses import asdict, fields

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_budget as budgets
from ansible_collections.nvl.vllm.plugins.module_utils import _memory_plan as planning
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import built_in, from_config


def model_of(model):
    """The model's facts. Raises ValueError."""
    if model.get("config"):
        return from_config(model["config"], int(model.get("weight_bytes") or 0), str(model.get("name") or ""))
    return built_in(str(model.get("name") or ""))


def device_of(given):
    """A device; what is None is not known. Raises ValueError."""
    index = given.get("index")
    if isinstance(index, bool) or not str(index).isdigit():
        raise ValueError(f"devices has an index {index!r}: wanted a whole number")
    numbers = {}
    for name, unknown in (("total_mib", 0.0), ("reserved_mib", -1.0), ("free_mib", -1.0)):
        value = given.get(name)
        try:
            numbers[name] = unknown if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} of device {index} is {value!r}: wanted MiB") from None
    try:
        processes = tuple(
            budgets.Process(str(p["name"]), int(p["pid"]), float(p["mib"] or 0), bool(p.get("own")))
            for p in given.get("processes") or ()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"processes of device {index}: wanted name, pid and mib of each") from None
    name = str(given.get("name") or "")
    if not numbers["total_mib"]:
        numbers["total_mib"] = budgets.device_by_name(name).total_mib
    return budgets.Device(int(index), name, uuid=str(given.get("uuid") or ""), processes=processes, **numbers)


def calibration_of(given):
    """What was measured. Raises ValueError."""
    known = [field.name for field in fields(budgets.Calibration)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"calibration.{name} is not known: wanted some of {', '.join(known)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"calibration.{name} is {value!r}: wanted GiB")
    return budgets.Calibration(**given)


def main():
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "str", "choices": ["cuda", "cpu"], "default": "cuda"},
            "devices": {"type": "list", "elements": "dict", "required": True},
            "model": {"type": "dict", "required": True},
            "instances": {"type": "list", "elements": "dict", "required": True},
            "version": {"type": "str", "default": "0.32.0"},
            "calibration": {"type": "dict", "default": {}},
            "fail": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    host = socket.gethostname()
    try:
        wanted = [
            planning.Wanted(
                name=str(instance.get("name") or f"instance {number}"),
                gpus=tuple(instance.get("gpus") or ()),
                arguments=instance.get("arguments") or {},
                environment=instance.get("environment") or {},
            )
            for number, instance in enumerate(params["instances"])
        ]
        plan = planning.plan(
            planning.Host(
                devices=tuple(device_of(device) for device in params["devices"]),
                model=model_of(params["model"]),
                instances=tuple(wanted),
                version=params["version"],
                device=params["device"],
                calibration=calibration_of(params["calibration"]),
            )
        )
    except ValueError as error:
        if params["fail"]:
            module.fail_json(msg=f"{host}: {error}")
        module.exit_json(changed=False, plan={}, problem=str(error))
    if plan.errors and params["fail"]:
        module.fail_json(msg="\n".join(f"{host}: {error}" for error in plan.errors), plan=asdict(plan))
    module.exit_json(changed=False, plan=asdict(plan), problem="")


if __name__ == "__main__":
    main()
