#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Tell what a host's NVIDIA GPUs are, and what is wrong with them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_info
short_description: Tell what a host's NVIDIA GPUs are, and what is wrong with them
version_added: 0.1.0
description:
  - Reads what C(nvidia-smi), the kernel log and C(/proc) tell of each GPU and of the driver, of branches 535 to 610,
    and holds it against rules. Reads only.
  - A GPU that is lost, and a value that cannot be read, hide nothing of the rest. A driver that hangs is told after
    O(timeout).
  - The kernel log is for root; without it V(xids) are not known.
author: The nvl.vllm authors
options:
  timeout:
    description: Deadline (seconds) of each call of C(nvidia-smi) and of each other command; there are up to seven.
    type: float
    default: 20.0
  min_driver:
    description:
      - Oldest NVIDIA driver that the vLLM to be deployed works with, such as V(580) for vLLM 0.32 and 0.33, whose CUDA
        libraries are of version 13. Empty for any.
    type: str
    default: ""
  own_user:
    description:
      - The user that our engines run as. What other processes hold of a GPU is told by rule V(foreign_process).
        A user that is not there owns nothing.
    type: str
    default: vllm
  own_pids:
    description: Processes that are ours too, by number.
    type: list
    elements: int
    default: []
  foreign_mib:
    description: GPU memory (MiB) that a process which is none of ours may hold before it is told.
    type: int
    default: 512
  severities:
    description:
      - How bad a finding is, by rule, in place of the default. V(error), V(warning), V(note), or V(ignore) to leave it
        out.
      - "Errors by default: V(driver_unavailable), V(driver_library_mismatch), V(driver_too_old), V(gpu_lost),
        V(fatal_xid), V(recovery_needed), V(remap_failure), V(ecc_uncorrected), V(mig_enabled), V(unexpected_memory),
        V(foreign_process)."
      - "Warnings: V(minor_xid), V(remap_pending), V(ecc_off), V(inforom_corrupted), V(unnamed_memory),
        V(power_cap_below_default), V(throttling), V(persistence_off), V(nvlink_missing), V(unreadable)."
      - "Notes: V(ecc_uncorrected_past), V(software_power_cap)."
    type: dict
    default: {}
  fail:
    description: Whether findings of severity V(error) make the module fail, all in one message.
    type: bool
    default: false
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
  - module: nvl.vllm.host_preflight
"""

EXAMPLES = r"""
- name: Look at the GPUs
  nvl.vllm.gpu_info:
  register: gpu

- name: Refuse a host whose GPUs cannot carry vLLM 0.32
  nvl.vllm.gpu_info:
    min_driver: "580"
    fail: true
    severities:
      power_cap_below_default: ignore
      remap_pending: error
"""

RETURN = r"""
gpus:
  description:
    - The GPUs in the order of their index. A value is null where it could not be told.
    - Of a lost GPU only the PCI address, at times the index, and V(xids) are known. Where nvidia-smi does not work at
      all, these are the GPUs of which the kernel log has errors.
  returned: always, also on failure
  type: list
  elements: dict
  contains:
    pci:
      description: PCI address.
      type: str
      sample: "00000000:AD:00.0"
    index:
      description: Index of nvidia-smi.
      type: int
    uuid:
      description: UUID.
      type: str
      sample: GPU-5d1c1f36-9b2f-4a45-8c0a-3f1e6f0a0001
    name:
      description: Name of the product.
      type: str
      sample: NVIDIA H100 NVL
    lost:
      description: Whether the driver cannot reach it any more.
      type: bool
    total_mib:
      description: Memory (MiB).
      type: int
      sample: 95830
    reserved_mib:
      description: Memory (MiB) that the driver and the firmware keep; CUDA sees the total less this.
      type: int
      sample: 594
    used_mib:
      description: Memory (MiB) that is used, the reserved part aside.
      type: int
    free_mib:
      description: Memory (MiB) that is free.
      type: int
    processes:
      description: The processes that use it, as far as nvidia-smi names them.
      type: list
      elements: dict
      contains:
        pid:
          description: Number of the process.
          type: int
        name:
          description: Program, as nvidia-smi names it.
          type: str
        mib:
          description: GPU memory (MiB) that it holds.
          type: int
        uid:
          description: Number of the user that it belongs to; null where /proc does not show the process.
          type: int
    compute_capability:
      description: Compute capability.
      type: str
      sample: "9.0"
    ecc_mode:
      description: V(Enabled) or V(Disabled).
      type: str
    ecc_uncorrected_volatile:
      description: Uncorrected ECC errors since the last reset.
      type: int
    ecc_uncorrected_aggregate:
      description: Uncorrected ECC errors in the life of the board.
      type: int
    remapped_correctable:
      description: Rows of memory that were remapped for correctable errors.
      type: int
    remapped_uncorrectable:
      description: Rows of memory that were remapped for uncorrectable errors.
      type: int
    remap_pending:
      description: Whether a row is to be remapped at the next reset.
      type: bool
    remap_failure:
      description: Whether a row could not be remapped.
      type: bool
    recovery_action:
      description: What the driver wants done, such as V(None), V(Reset), V(Reboot), V(Drain and Reset).
      type: str
    mig_mode:
      description: V(Enabled) or V(Disabled).
      type: str
    mig_pending:
      description: The mode after the next reset.
      type: str
    persistence_mode:
      description: V(Enabled) or V(Disabled).
      type: str
    power_cap_w:
      description: Power cap (W) that is set.
      type: float
      sample: 400.0
    power_default_w:
      description: Power cap (W) of the board by default.
      type: float
    power_max_w:
      description: Highest power cap (W) that can be set.
      type: float
    sm_clock_mhz:
      description: Clock (MHz) of the streaming multiprocessors now.
      type: int
    sm_clock_max_mhz:
      description: Highest clock (MHz) of the streaming multiprocessors.
      type: int
    throttle_reasons:
      description:
        - Why the clock is not higher now, with the names of nvidia-smi's clock event reasons.
      type: list
      elements: str
      sample: [gpu_idle]
    temperature_c:
      description: Temperature (degrees Celsius).
      type: int
    xids:
      description: Errors that the driver logged since boot, by code; null where the kernel log cannot be read.
      type: list
      elements: dict
      contains:
        code:
          description: The Xid.
          type: int
        count:
          description: Lines of the log with it.
          type: int
        last_time:
          description: When it was logged last; empty where the log does not say.
          type: str
        last_message:
          description: What was logged last.
          type: str
    links:
      description: Connection to each other GPU by index, as nvidia-smi topo -m names it.
      type: dict
      sample: {"1": NV12}
    nvlink_peers:
      description: Indexes of the GPUs that it has an NVLink to.
      type: list
      elements: int
      sample: [1]
    problems:
      description: Values that could not be read, and other trouble with this GPU.
      type: list
      elements: str
host:
  description: What is the same for all GPUs.
  returned: always, also on failure
  type: dict
  contains:
    driver_version:
      description: Version of the driver, from nvidia-smi.
      type: str
      sample: 580.126.09
    cuda_version:
      description: Newest version of CUDA that the driver carries.
      type: str
      sample: "13.0"
    kernel_module_version:
      description: Version of the kernel module that is loaded, from /proc.
      type: str
    topology:
      description: Connection of each GPU to each other one.
      type: dict
      sample: {"GPU0": {"GPU1": NV12}, "GPU1": {"GPU0": NV12}}
    kernel_log:
      description: Where Xids are from, V(journal) or V(dmesg); empty where neither can be read.
      type: str
    problems:
      description: What could not be asked, and why.
      type: list
      elements: str
findings:
  description: What is not as it should be, errors first.
  returned: always, also on failure
  type: list
  elements: dict
  contains:
    rule:
      description: The rule, as in O(severities).
      type: str
      sample: persistence_off
    severity:
      description: V(error), V(warning) or V(note).
      type: str
    device:
      description: PCI address of the GPU; empty for the host.
      type: str
    sentence:
      description: What was found, what is wanted, and the remedy.
      type: str
problem:
  description: Why no GPU could be asked; empty where one could.
  returned: always, also on failure
  type: str
"""

import pwd
import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_health, _gpu_info


def main():
    module = AnsibleModule(
        argument_spec={
            "timeout": {"type": "float", "default": 20.0},
            "min_driver": {"type": "str", "default": ""},
            "own_user": {"type": "str", "default": "vllm"},
            "own_pids": {"type": "list", "elements": "int", "default": []},
            "foreign_mib": {"type": "int", "default": 512},
            "severities": {"type": "dict", "default": {}},
            "fail": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    params = module.params
    complaints = _gpu_health.severity_complaints(params["severities"])
    if complaints:
        module.fail_json(msg="\n".join(complaints))
    if params["timeout"] <= 0:
        module.fail_json(msg=f"timeout is {params['timeout']:g} s: wanted more than 0")

    try:
        own_uids = [pwd.getpwnam(params["own_user"]).pw_uid]
    except KeyError:
        own_uids = []
    facts = _gpu_info.read(timeout=params["timeout"])
    wanted = _gpu_health.Wanted(
        min_driver=params["min_driver"],
        own_uids=own_uids,
        own_pids=params["own_pids"],
        foreign_mib=params["foreign_mib"],
    )
    findings = _gpu_health.findings(facts, wanted, params["severities"])
    result = {
        "gpus": _gpu_info.as_dict(facts.gpus),
        "host": _gpu_info.as_dict(facts.host),
        "findings": [finding._asdict() for finding in findings],
        "problem": facts.problem,
    }
    errors = [finding.sentence for finding in findings if finding.severity == "error"]
    if params["fail"] and errors:
        host = socket.gethostname()
        module.fail_json(msg="\n".join(f"{host}: {error}" for error in errors), **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
