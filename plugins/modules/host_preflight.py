#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Check that a host can carry the declared instances, before anything is changed on it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_preflight
short_description: Check that a host can carry the declared instances
version_added: 0.1.0
description:
  - Checks operating system, architecture, Python, free disk space, ports and GPUs, and that a checkpoint that is used
    in place is there. Reads only.
  - All findings are reported at once, each with what was found, what is wanted and the remedy.
author: The nvl.vllm authors
options:
  device:
    description: What the engines run on. GPUs are looked up on C(cuda) only.
    type: str
    choices: [cuda, cpu]
    required: true
  instances:
    description: Instances as M(nvl.vllm.declaration) returns them.
    type: list
    elements: dict
    required: true
  services:
    description: What listens beside the engines.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: What to call it in a message, such as the variable that has its port.
        type: str
        required: true
      port:
        description: Its TCP port.
        type: int
        required: true
      unit:
        description: Its systemd unit, which may have the port already.
        type: str
        required: true
      user:
        description: The user who makes its socket.
        type: str
        required: true
  user:
    description: The engines' user, who may have the ports already.
    type: str
    required: true
  python:
    description: Interpreter that vLLM's environment is made from.
    type: path
    required: true
  release:
    description: Directory of the release of vLLM. Where it is complete, no space is needed for it.
    type: path
    required: true
  required_space:
    description: Free space (MiB) that a new release needs.
    type: int
    required: true
  model:
    description: The checkpoint as M(nvl.vllm.declaration) returns it. Where its directory is there, no space is needed.
    type: dict
    default: {}
  timeout:
    description: Longest time (s) that one call of nvidia-smi may take.
    type: float
    default: 20
  version:
    description: Version of vLLM to be deployed, which decides which driver is new enough; empty for no such check.
    type: str
    default: ""
  min_driver:
    description: Oldest driver that is taken, in place of the one that O(version) wants.
    type: str
    default: ""
  driver_managed:
    description:
      - Whether role C(cuda) is going to install the driver and to set up the GPUs after this check. What it mends is
        then told as a note, and no reason to stop.
      - Where the driver cannot be asked yet, the GPUs are taken from the PCI bus.
    type: bool
    default: false
  sys:
    description: Where the kernel shows the PCI bus.
    type: path
    default: /sys
  severities:
    description: Severity by rule (V(error), V(warning), V(note), V(ignore)), as M(nvl.vllm.gpu_info) takes it.
    type: dict
    default: {}
  fail:
    description: Whether findings fail the module. Otherwise they are only returned.
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
    description: Changes nothing.
"""

EXAMPLES = r"""
- name: Check the host
  nvl.vllm.host_preflight:
    device: cuda
    instances: "{{ vllm_declared.instances }}"
    user: vllm
    python: /usr/bin/python3
    release: /opt/vllm/0.32.0-cuda-1a2b3c4d
    required_space: 14336
    model: "{{ vllm_declared.model }}"
"""

RETURN = r"""
errors:
  description: What does not fit, one sentence each, without the host's name.
  returned: always
  type: list
  elements: str
gpus:
  description: UUIDs of each instance's GPUs, by name of the instance. Empty where the driver cannot be asked.
  returned: always
  type: dict
  sample: {"primary": ["GPU-8a6f1c0e-0000-0000-0000-000000000000"]}
findings:
  description:
    - What is not as it should be about the GPUs, as M(nvl.vllm.gpu_info) returns it.
    - Where RV(provisional), also notes of rule V(provisional) on what the PCI bus tells and what it does not.
  returned: always
  type: list
  elements: dict
devices:
  description: GPUs, or the host's memory, as M(nvl.vllm.gpu_memory) takes them.
  returned: always
  type: list
  elements: dict
checkpoint:
  description: C(config) and C(weight_bytes) of the checkpoint; empty where it is not there yet.
  returned: always
  type: dict
calibration:
  description: What vLLM measured here with this release, checkpoint and arguments, as M(nvl.vllm.gpu_memory) takes it.
  returned: always
  type: dict
gpu_problem:
  description:
    - Why the driver could not list the host's GPUs; in check mode on a bare host, and with O(driver_managed), no error.
  returned: always
  type: str
provisional:
  description: Whether the GPUs were taken from the PCI bus, as there is no driver yet.
  returned: always
  type: bool
"""

import os
import platform
import pwd
import shutil
import socket
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_health, _gpu_info, _host
from ansible_collections.nvl.vllm.plugins.module_utils._calibration import host_figures
from ansible_collections.nvl.vllm.plugins.module_utils._compatibility import UnknownRelease, build_of, version_parts
from ansible_collections.nvl.vllm.plugins.module_utils._driver import pci_gpus
from ansible_collections.nvl.vllm.plugins.module_utils._plan_inputs import (
    LIMITS,
    bus_devices,
    checkpoint_facts,
    gpu_devices,
    memory_device,
)
from ansible_collections.nvl.vllm.plugins.module_utils._venv import read_marker


def staged_mib(model):
    """Space (MiB) that files of an interrupted run take already."""
    folder = f"{model['root']}/.staging/{os.path.basename(model['path'])}"
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sum(os.stat(file).st_blocks * 512 for file in files) // 2**20


def uid_of(user):
    """The user's number; None where there is no such user yet."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def main():
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "instances": {"type": "list", "elements": "dict", "required": True},
            "services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                    "unit": {"type": "str", "required": True},
                    "user": {"type": "str", "required": True},
                },
            },
            "user": {"type": "str", "required": True},
            "python": {"type": "path", "required": True},
            "release": {"type": "path", "required": True},
            "required_space": {"type": "int", "required": True},
            "model": {"type": "dict", "default": {}},
            "timeout": {"type": "float", "default": 20.0},
            "version": {"type": "str", "default": ""},
            "min_driver": {"type": "str", "default": ""},
            "driver_managed": {"type": "bool", "default": False},
            "sys": {"type": "path", "default": "/sys"},
            "severities": {"type": "dict", "default": {}},
            "fail": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    instances = params["instances"]
    errors = []
    complaints = _gpu_health.severity_complaints(params["severities"])
    if params["min_driver"]:
        try:
            version_parts(params["min_driver"])
        except ValueError as error:
            complaints.append(f"gpu_preflight_min_driver cannot be read: {error}")
    if complaints:
        module.fail_json(msg="\n".join(complaints))

    if shutil.which("dpkg-query") is None:
        errors.append("this is no Debian or Ubuntu, the distributions that this collection knows")
    if platform.machine() != "x86_64":
        errors.append(f"the machine is {platform.machine()}, the lock files are for x86_64")

    def run(argv):
        return module.run_command(argv, handle_exceptions=False)

    try:
        version = run([params["python"], "-c", "import platform; print(platform.python_version())"])[1].strip()
    except OSError:
        version = ""
    complaint = _host.python_complaint(version, params["python"])
    if complaint:
        errors.append(complaint)

    needs = []
    if read_marker(params["release"]) is None:
        needs.append((params["release"], params["required_space"], "vllm_root"))
    model = params["model"]
    if model.get("root") and not os.path.isdir(model["path"]):
        needs.append((model["path"], model["required_space"] - staged_mib(model), "vllm_model_root"))
    errors += _host.space_complaints(needs)
    if model.get("source") == "host" and not os.path.isfile(f"{model['path']}/config.json"):
        errors.append(
            f"vllm_model_directory is {model['path']}, which is no checkpoint: it holds no config.json. Put one there, "
            "mount it, or set another vllm_model_source"
        )

    own_uid = uid_of(params["user"])
    errors += _host.foreign_listeners({instance["name"]: instance["port"] for instance in instances}, own_uid)
    errors += _host.taken_ports({**item, "uid": uid_of(item["user"])} for item in params["services"])

    result: dict[str, Any] = {"gpus": {}, "gpu_problem": "", "findings": [], "devices": [], "provisional": False}
    if params["device"] == "cuda":
        facts = _gpu_info.read(timeout=params["timeout"])
        own_uids = [] if own_uid is None else [own_uid]
        release = params["version"]
        if release and not params["min_driver"]:
            try:
                build_of(release)
            except UnknownRelease as error:
                errors.append(f"{error}, or set gpu_preflight_min_driver to the oldest driver that it runs on")
                release = ""
        wanted = _gpu_health.Wanted(min_driver=params["min_driver"], vllm_version=release, own_uids=own_uids)
        findings = _gpu_health.findings(facts, wanted, params["severities"])
        declared = {instance["name"]: instance["gpus"] for instance in instances}
        if params["driver_managed"]:
            findings = _gpu_health.before_driver(findings, facts.cause)
            result["provisional"] = bool(facts.problem) and facts.cause not in _gpu_health.UNMENDED_CAUSES
        elif facts.problem and module.check_mode:
            # A bare host is to be looked at before it has a driver.
            findings = [finding for finding in findings if finding.rule != "driver_unavailable"]
        present = {gpu.index: gpu.uuid for gpu in facts.gpus if gpu.index is not None and gpu.uuid}
        if result["provisional"]:
            on_bus = pci_gpus(params["sys"])
            if on_bus:
                result["devices"], missing, notes = bus_devices(on_bus, declared)
                errors += missing
                findings += [_gpu_health.Finding("provisional", "note", "", note) for note in notes]
            else:
                errors.append(
                    "vllm_device is cuda, and the host has no NVIDIA GPU on its PCI bus: see lspci -d 10de:, put one "
                    "in or pass one through to this virtual machine, or set vllm_device to cpu"
                )
        elif not facts.problem:
            result["gpus"], missing = _host.match_gpus(declared, present)
            errors += missing
            # Without its GPUs there is nothing to plan.
            result["devices"] = [] if missing else gpu_devices(facts.gpus, own_uids)
        # Trouble of a GPU that no instance uses is worth telling, and no reason to stop.
        used = {uuid for uuids in result["gpus"].values() for uuid in uuids}
        spare = {gpu.pci for gpu in facts.gpus if gpu.uuid and gpu.uuid not in used} if used else set()
        findings = [
            finding._replace(severity="warning") if finding.severity == "error" and finding.device in spare else finding
            for finding in findings
        ]
        errors += [finding.sentence for finding in findings if finding.severity == "error"]
        result["gpu_problem"] = facts.problem
        result["findings"] = [finding._asdict() for finding in findings]
    else:
        texts = [_host.read_text(path) for path in LIMITS]
        result["devices"] = [memory_device(_host.read_text("/proc/meminfo"), texts)]
    result["checkpoint"] = checkpoint_facts(model["path"]) if model else {}
    result["calibration"] = host_figures(instances, params["release"], model["path"]) if model else {}

    if errors and params["fail"]:
        host = socket.gethostname()
        module.fail_json(msg="\n".join(f"{host}: {error}" for error in errors), errors=errors, **result)
    module.exit_json(changed=False, errors=errors, **result)


if __name__ == "__main__":
    main()
