#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Set persistence mode, MIG, compute mode and power limit of a host's NVIDIA GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_settings
short_description: Set persistence mode, MIG, compute mode and power limit of a host's NVIDIA GPUs
version_added: 0.1.0
description:
  - Compares what C(nvidia-smi) tells of each GPU with what is wanted, changes only what differs, and reads it back.
    Where a setting did not take, the module fails, whatever the exit status of C(nvidia-smi) was.
  - All wanted values are checked against each board before anything is changed.
  - A board that does not have a setting is left alone, and RV(notes) tells so. Where another value than the default is
    wanted there, it is an error.
  - The driver forgets these settings at a reboot; RV(commands) sets them again.
  - Locked clocks are not set here, because the driver does not tell them, so that they could not be checked.
author: The nvl.vllm authors
options:
  persistence:
    description:
      - Whether the driver keeps a GPU initialised while nothing uses it. Without, it forgets the other settings then.
      - Where C(nvidia-persistenced) has turned it on, there is nothing to change.
    type: bool
    default: true
  mig:
    description:
      - V(off) turns MIG off, as engines use whole GPUs here. V(leave) leaves it.
      - MIG is not changed while processes use the GPU, and its instances are not destroyed. Where the board wants a
        reset first, the module fails and says so.
    type: str
    choices: ["off", leave]
    default: "off"
  compute_mode:
    description:
      - V(default) lets any number of processes use a GPU, V(exclusive_process) one. V(leave) leaves it.
    type: str
    choices: [default, exclusive_process, leave]
    default: default
  power_limit:
    description:
      - Power limit (W) within the range of the board, V(default) for the board's own default, or V(leave).
    type: str
    default: default
  gpus:
    description: The GPUs to set, by index or UUID. Empty for all.
    type: list
    elements: str
    default: []
  timeout:
    description: Deadline (seconds) of each call of C(nvidia-smi) and of each other command.
    type: float
    default: 20.0
  variable_prefix:
    description: What the options' variables are called before O(persistence) and so on, for messages.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: Reports the changes. Reads the GPUs, so it needs a driver that works.
  diff_mode:
    support: full
    description: Shows the settings of each GPU before and after.
  idempotent:
    support: full
    description: A second run finds nothing to change.
seealso:
  - module: nvl.vllm.gpu_info
"""

EXAMPLES = r"""
- name: Bring all GPUs to what engines want
  nvl.vllm.gpu_settings:

- name: Limit the power of one GPU, and leave its compute mode
  nvl.vllm.gpu_settings:
    gpus: [0]
    power_limit: 350
    compute_mode: leave
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode. On failure also what was tried and did not take.
  returned: always, also on failure
  type: list
  elements: dict
  contains:
    gpu:
      description: Index and PCI address.
      type: str
      sample: GPU 0 (00000000:AD:00.0)
    uuid:
      description: UUID.
      type: str
    setting:
      description: Name of the option.
      type: str
      sample: power_limit
    before:
      description: What it was.
      type: str
      sample: 400.00 W
    after:
      description: What was set.
      type: str
      sample: 350.00 W
    argv:
      description: The command.
      type: list
      elements: str
      sample: [nvidia-smi, -i, GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001, -pl, "350"]
gpus:
  description:
    - The settings of each chosen GPU afterwards, in check mode as they would be. What the board does not have is null.
    - On failure as they were read last.
  returned: always, also on failure where they could be read
  type: list
  elements: dict
  contains:
    gpu:
      description: Index and PCI address.
      type: str
    index:
      description: Index of nvidia-smi.
      type: int
    uuid:
      description: UUID.
      type: str
    persistence_mode:
      description: V(Enabled) or V(Disabled).
      type: str
    mig_mode:
      description: V(Enabled) or V(Disabled).
      type: str
    mig_pending:
      description: The mode after the next reset.
      type: str
    compute_mode:
      description: V(Default), V(Exclusive_Process) or V(Prohibited).
      type: str
    power_limit_w:
      description: Power limit (W) that is set.
      type: float
    power_default_w:
      description: Power limit (W) of the board by default.
      type: float
    power_min_w:
      description: Lowest power limit (W) that can be set.
      type: float
    power_max_w:
      description: Highest power limit (W) that can be set.
      type: float
    unreadable:
      description: Values that could not be read, by name, as nvidia-smi wrote them.
      type: dict
commands:
  description:
    - The commands that set all of it from scratch, such as at boot, in this order. Each names its GPU by UUID, and each
      is without effect where the setting is so already.
  returned: on success
  type: list
  elements: list
  sample: [[nvidia-smi, -i, GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001, -pm, "1"]]
notes:
  description: What is wanted and does nothing, as the board does not have the setting.
  returned: on success
  type: list
  elements: str
"""

import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_info, _gpu_settings


def main():
    module = AnsibleModule(
        argument_spec={
            "persistence": {"type": "bool", "default": True},
            "mig": {"type": "str", "choices": ["off", "leave"], "default": "off"},
            "compute_mode": {
                "type": "str",
                "choices": ["default", "exclusive_process", "leave"],
                "default": "default",
            },
            "power_limit": {"type": "str", "default": "default"},
            "gpus": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 20.0},
            "variable_prefix": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    prefix, timeout = params["variable_prefix"], params["timeout"]
    wanted = _gpu_settings.Wanted(
        persistence=params["persistence"],
        mig=params["mig"],
        compute_mode=params["compute_mode"],
        power_limit=params["power_limit"],
        gpus=tuple(params["gpus"]),
        prefix=prefix,
    )
    tried = []
    result = {"changed": False, "changes": []}

    def refuse_if(sentences):
        if sentences:
            host = socket.gethostname()
            module.fail_json(msg="\n".join(f"{host}: {sentence}" for sentence in sentences), **result)

    def told(changes, settings):
        return {
            "changed": bool(changes),
            "changes": [change._asdict() for change in changes],
            "gpus": _gpu_info.as_dict(settings),
        }

    refuse_if(_gpu_settings.value_complaints(wanted))
    if timeout <= 0:
        refuse_if([f"{prefix}timeout is {timeout:g} s: wanted more than 0"])
    facts = _gpu_info.read(timeout=timeout)
    if facts.problem:
        refuse_if([facts.problem])
    gpus, complaints = _gpu_settings.select(facts.gpus, wanted)
    refuse_if(complaints)
    before = after = []
    failures: list[str] = []
    try:
        before = after = _gpu_settings.ask(gpus, _gpu_info.run_command, timeout)
        result = told([], before)
        refuse_if(_gpu_settings.complaints(before, wanted, gpus))
        if module.check_mode:
            tried = _gpu_settings.plan(before, wanted)
            after = _gpu_settings.predicted(before, wanted)
        else:
            after, failures = _gpu_settings.bring(gpus, before, wanted, _gpu_info.run_command, timeout, tried)
    except _gpu_settings.SettingsError as error:
        failures = [str(error)]
    result = told(tried, after)
    refuse_if(failures)
    module.exit_json(
        **result,
        commands=_gpu_settings.commands(after, wanted),
        notes=_gpu_settings.notes(after, wanted),
        diff={"before": _gpu_settings.describe(before), "after": _gpu_settings.describe(after)},
    )


if __name__ == "__main__":
    main()
