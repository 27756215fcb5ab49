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
gpus:
  description: UUIDs of each instance's GPUs, by name of the instance.
  returned: always
  type: dict
  sample: {"primary": ["GPU-8a6f1c0e-0000-0000-0000-000000000000"]}
gpu_problem:
  description: Why the host's GPUs could not be listed; in check mode on a bare host no error.
  returned: always
  type: str
"""

import os
import platform
import pwd
import shutil
import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _host
from ansible_collections.nvl.vllm.plugins.module_utils._venv import read_marker


def staged_mib(model):
    """Space (MiB) that files of an interrupted run take already."""
    folder = f"{model['root']}/.staging/{os.path.basename(model['path'])}"
    files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sum(os.stat(file).st_blocks * 512 for file in files) // 2**20


def main():
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "instances": {"type": "list", "elements": "dict", "required": True},
            "user": {"type": "str", "required": True},
            "python": {"type": "path", "required": True},
            "release": {"type": "path", "required": True},
            "required_space": {"type": "int", "required": True},
            "model": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = module.params
    instances = params["instances"]
    errors = []

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

    try:
        own_uid = pwd.getpwnam(params["user"]).pw_uid
    except KeyError:
        own_uid = None
    errors += _host.foreign_listeners({instance["name"]: instance["port"] for instance in instances}, own_uid)

    gpus: dict[str, list[str]] = {}
    problem = ""
    if params["device"] == "cuda":
        present, problem = _host.gpus(run)
        if not problem:
            gpus, missing = _host.match_gpus({i["name"]: i["gpus"] for i in instances}, present)
            errors += missing
        elif not module.check_mode:
            errors.append(problem)

    if errors:
        host = socket.gethostname()
        module.fail_json(msg="\n".join(f"{host}: {error}" for error in errors), errors=errors)
    module.exit_json(changed=False, gpus=gpus, gpu_problem=problem)


if __name__ == "__main__":
    main()
