#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Check what the operator declares and work out every instance from it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: declaration
short_description: Check what the operator declares and work out every instance from it
version_added: 0.1.0
description:
  - Checks names, ports, GPUs, profiles, environment variables and every engine argument against what
    the pinned vLLM knows, and lays the arguments of profile and instance over each other.
  - Reads nothing but its arguments, so it runs on the controller before any host is touched.
  - All mistakes are reported at once, each with variable, value, what is wanted and host.
author: The nvl.vllm authors
options:
  inventory_hostname:
    description: Host that the declaration is for; it begins each error.
    type: str
    required: true
  device:
    description: What the engines run on.
    type: str
    choices: [cuda, cpu]
    required: true
  version:
    description: Version of vLLM that O(help_text) was captured from.
    type: str
    required: true
  help_text:
    description: Output of C(vllm serve --help=all) of that version.
    type: str
    required: true
  host:
    description: Address that the engines listen on.
    type: str
    required: true
  home:
    description: Home directory of the engines' user.
    type: path
    required: true
  model:
    description: Where the checkpoint comes from.
    type: dict
    required: true
    suboptions:
      source:
        description: V(hub), V(controller) or V(host).
        type: str
        required: true
      root:
        description: Directory on the host that holds the revisions.
        type: str
        required: true
      repository:
        description: Repository of the hub.
        type: str
        default: ""
      revision:
        description: Commit of the repository.
        type: str
        default: ""
      endpoint:
        description: Mirror of the hub; empty for the hub itself.
        type: str
        default: ""
      token:
        description: Token for the hub; empty for none.
        type: str
        default: ""
      directory:
        description: Directory of the checkpoint on the controller or the host.
        type: str
        default: ""
      manifest:
        description: Text of its manifest; empty for none.
        type: str
        default: ""
      required_space:
        description: Free space (MiB) that it needs where no manifest tells.
        type: int
        default: 0
  served_model_name:
    description: Name under which clients ask for the model.
    type: str
    required: true
  api_key:
    description: Key that clients must send; empty for none.
    type: str
    default: ""
  instances:
    description:
      - List of instances, each with C(name), C(port), C(gpus) and optionally C(profile), C(arguments) and
        C(environment).
    type: raw
    required: true
  profile:
    description: Profile of the instances that name none.
    type: str
    required: true
  profiles:
    description: Named sets of engine arguments.
    type: dict
    required: true
  arguments:
    description: Engine arguments of all instances.
    type: dict
    default: {}
  environment_variables:
    description: Environment variables of all engines.
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
    description: The same declaration gives the same instances.
"""

EXAMPLES = r"""
- name: Check the declaration
  nvl.vllm.declaration:
    inventory_hostname: "{{ inventory_hostname }}"
    device: cuda
    version: 0.32.0
    help_text: "{{ lookup('ansible.builtin.file', 'vllm-serve-help-0.32.0.txt') }}"
    host: 127.0.0.1
    home: /var/lib/vllm
    model:
      source: hub
      root: /srv/models/gpt-oss-120b
      repository: openai/gpt-oss-120b
      revision: b5c939de8f754692c1647ca79fbf85e8c1e70f8a
    served_model_name: gpt-oss-120b
    instances: "{{ vllm_instances }}"
    profile: guide
    profiles: "{{ vllm_profiles }}"
  delegate_to: localhost
"""

RETURN = r"""
instances:
  description: The complete instances, in the order declared.
  returned: success
  type: list
  elements: dict
  contains:
    name: {description: Name of the instance., type: str}
    unit: {description: systemd unit., type: str}
    port: {description: TCP port., type: int}
    url: {description: Base URL as seen on the host., type: str}
    gpus: {description: GPU indexes or UUIDs as declared., type: list}
    profile: {description: Name of the profile., type: str}
    arguments: {description: Engine arguments for vLLM's configuration file., type: dict}
    environment: {description: Environment of the engine without key and GPUs., type: dict}
model:
  description: The checkpoint on the host.
  returned: success
  type: dict
  contains:
    source: {description: As declared., type: str}
    path: {description: Directory that engines read., type: str}
    root: {description: Directory that holds the revisions; empty where it is used in place., type: str}
    repository: {description: Repository of the hub; empty for other sources., type: str}
    revision: {description: Commit; empty for other sources., type: str}
    manifest: {description: Its manifest; empty where the hub's own checksums count., type: dict}
    required_space: {description: Disk space (MiB) that it needs on the host., type: int}
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._declaration import Declaration, Model, resolve
from ansible_collections.nvl.vllm.plugins.module_utils._serve_help import ServeOptions


def main():
    module = AnsibleModule(
        argument_spec={
            "inventory_hostname": {"type": "str", "required": True},
            "device": {"type": "str", "choices": ["cuda", "cpu"], "required": True},
            "version": {"type": "str", "required": True},
            "help_text": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "home": {"type": "path", "required": True},
            "model": {
                "type": "dict",
                "required": True,
                "options": {
                    "source": {"type": "str", "required": True},
                    "root": {"type": "str", "required": True},
                    "repository": {"type": "str", "default": ""},
                    "revision": {"type": "str", "default": ""},
                    "endpoint": {"type": "str", "default": ""},
                    "token": {"type": "str", "default": "", "no_log": True},
                    "directory": {"type": "str", "default": ""},
                    "manifest": {"type": "str", "default": ""},
                    "required_space": {"type": "int", "default": 0},
                },
            },
            "served_model_name": {"type": "str", "required": True},
            "api_key": {"type": "str", "default": "", "no_log": True},
            "instances": {"type": "raw", "required": True},
            "profile": {"type": "str", "required": True},
            "profiles": {"type": "dict", "required": True},
            "arguments": {"type": "dict", "default": {}},
            "environment_variables": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = dict(module.params)
    try:
        options = ServeOptions.parse(params.pop("help_text"))
    except ValueError as problem:
        host, version = params["inventory_hostname"], params["version"]
        module.fail_json(msg=f"{host}: help_text for vLLM {version} is {problem}")
    model = Model(**params.pop("model"))
    declared = Declaration(model=model, environment=params.pop("environment_variables"), **params)
    instances, checkpoint, errors = resolve(declared, options)
    if errors:
        module.fail_json(msg="\n".join(errors), errors=errors)
    module.exit_json(changed=False, instances=[asdict(instance) for instance in instances], model=asdict(checkpoint))


if __name__ == "__main__":
    main()
