#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Hold what lies on a host's disk against what was installed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drift_content
short_description: Hold what lies on a host's disk against what was installed
version_added: 0.1.0
description:
  - Compares vLLM's environment with the RECORD of each wheel and with the lock file, the checkpoint with the record of
    its verification, files and owners at places of the roles, and packages.
  - Costs a stat of each file. Files that changed since they were installed are read, and of the others as much as a
    budget allows, another part with each O(turn).
  - Changes nothing, in either mode, and keeps nothing on the host. It needs root.
  - What could not be read is in RV(unknown), so that it does not pass for clean.
author: The nvl.vllm authors
options:
  release:
    description: Directory of the release, such as C(/opt/vllm/0.32.0-cuda-1a2b3c4d).
    type: path
    required: true
  root:
    description: Directory that holds the releases and the lock files.
    type: path
    default: /opt/vllm
  lock:
    description: Name of the lock file in C(locks) below O(root).
    type: str
    required: true
  lock_sha256:
    description: SHA-256 of the text of the declared lock file, white space at its end aside.
    type: str
    required: true
  instances:
    description: Names of the declared instances.
    type: list
    elements: str
    required: true
  model_path:
    description: Directory of the checkpoint.
    type: path
    required: true
  model_root:
    description: Directory that holds the revisions; empty where the checkpoint is used in place.
    type: str
    default: ""
  model_exclude:
    description: Patterns of files in the checkpoint's directory that do not count.
    type: list
    elements: str
    default: []
  packages:
    description: Packages that the roles installed.
    type: list
    elements: str
    default: []
  held:
    description: Packages that must be held.
    type: list
    elements: str
    default: []
  owned:
    description: Directories at places of ours that belong to roles which are looked at elsewhere; not looked into.
    type: list
    elements: path
    default: []
  release_hash_budget:
    description:
      - How much (MiB) of the release to read besides what is suspect. V(0) reads nothing besides; otherwise it is one
        file at least.
    type: int
    default: 256
  hash_budget:
    description:
      - How much (MiB) of the checkpoint to read, what is suspect first. V(0) reads nothing; as long as something is
        left of it, one more file is read, whatever its size.
    type: int
    default: 0
  turn:
    description: Which part is read. Successive numbers, as P(nvl.vllm.drift_turn#filter) counts, go through everything.
    type: int
    default: 0
  hash_timeout:
    description: Deadline (s) of reading the release, and of reading the checkpoint.
    type: float
    default: 120.0
  timeout:
    description: Deadline (s) of each command.
    type: float
    default: 20.0
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
  - module: nvl.vllm.drift_facts
"""

EXAMPLES = r"""
- name: Look at what is on disk, and read 4 GiB of the weights, others each time
  nvl.vllm.drift_content:
    release: "{{ vllm_release }}"
    root: "{{ vllm_root }}"
    lock: "{{ vllm_lock | basename }}"
    lock_sha256: "{{ lookup('ansible.builtin.file', vllm_lock) | hash('sha256') }}"
    instances: "{{ vllm_declared.instances | map(attribute='name') }}"
    model_path: "{{ vllm_declared.model.path }}"
    model_root: "{{ vllm_declared.model.root }}"
    packages: "{{ vllm_packages }}"
    hash_budget: 4096
    turn: "{{ '.drift' | nvl.vllm.drift_turn(inventory_hostname) }}"
  register: drift_content
"""

RETURN = r"""
findings:
  description: What is not as it was installed, the worst first; see RV(nvl.vllm.drift_facts#module:findings).
  returned: success
  type: list
  elements: dict
unknown:
  description: What could not be looked at, and why.
  returned: success
  type: list
  elements: str
facts:
  description: How much was compared and read.
  returned: success
  type: dict
"""

import os
import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _drift_content
from ansible_collections.nvl.vllm.plugins.module_utils._drift_kinds import as_result


def main():
    module = AnsibleModule(
        argument_spec={
            "release": {"type": "path", "required": True},
            "root": {"type": "path", "default": "/opt/vllm"},
            "lock": {"type": "str", "required": True},
            "lock_sha256": {"type": "str", "required": True},
            "instances": {"type": "list", "elements": "str", "required": True},
            "model_path": {"type": "path", "required": True},
            "model_root": {"type": "str", "default": ""},
            "model_exclude": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "held": {"type": "list", "elements": "str", "default": []},
            "owned": {"type": "list", "elements": "path", "default": []},
            "release_hash_budget": {"type": "int", "default": 256},
            "hash_budget": {"type": "int", "default": 0},
            "turn": {"type": "int", "default": 0},
            "hash_timeout": {"type": "float", "default": 120.0},
            "timeout": {"type": "float", "default": 20.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    for name in ("timeout", "hash_timeout"):
        if params[name] <= 0:
            module.fail_json(msg=f"{name} is {params[name]:g} s: wanted more than 0")
    if os.geteuid() != 0:
        module.fail_json(
            msg=f"{socket.gethostname()}: drift_content runs as user {os.geteuid()}, and only root may read all files: "
            "run it with become: true"
        )
    report = _drift_content.Look(_drift_content.Wanted(**params)).look()
    module.exit_json(changed=False, **as_result(report))


if __name__ == "__main__":
    main()
