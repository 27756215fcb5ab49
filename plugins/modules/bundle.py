#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Check a bundle before anything is taken from it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle
short_description: Check a bundle before anything is taken from it
version_added: 0.1.0
description:
  - Checks that a directory is a bundle as C(playbooks/bundle.yml) writes it, that all its files are
    there, that the small ones are as C(SHA256SUMS) says, and that it was made for this deployment.
  - Wheels, weights and Debian packages are checked where they are used, against what the small files say.
author: The nvl.vllm authors
options:
  inventory_hostname:
    description: Host that the bundle is for; it begins each error.
    type: str
    required: true
  path:
    description: Directory of the bundle.
    type: path
    required: true
  sha256:
    description: SHA-256 that C(SHA256SUMS) must have; empty for no such check.
    type: str
    default: ""
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  version:
    description: Version of vLLM that is declared.
    type: str
    required: true
  lock:
    description: Lock file that is declared.
    type: path
    required: true
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
- name: Check the bundle
  nvl.vllm.bundle:
    inventory_hostname: "{{ inventory_hostname }}"
    path: /media/usb/bundle
    device: cuda
    version: 0.32.0
    lock: roles/vllm/files/locks/cuda-0.32.0.txt
  delegate_to: localhost
"""

RETURN = r"""
bundle:
  description: What C(bundle.json) says.
  returned: success
  type: dict
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._bundle import DESCRIPTION, complaints
from ansible_collections.nvl.vllm.plugins.module_utils._checksum import digest
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import read_object


def main():
    module = AnsibleModule(
        argument_spec={
            "inventory_hostname": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "sha256": {"type": "str", "default": ""},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "version": {"type": "str", "required": True},
            "lock": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    if not os.path.isfile(params["lock"]):
        module.fail_json(msg=f"{params['inventory_hostname']}: vllm_lock is {params['lock']}, which is no file")
    wanted = {
        "vllm_device": params["device"],
        "vllm_version": params["version"],
        "lock_sha256": digest(params["lock"]).sha256,
    }
    errors = complaints(params["path"], params["sha256"], wanted)
    if errors:
        module.fail_json(msg="\n".join(f"{params['inventory_hostname']}: {error}" for error in errors), errors=errors)
    module.exit_json(changed=False, bundle=read_object(os.path.join(params["path"], DESCRIPTION)))


if __name__ == "__main__":
    main()
