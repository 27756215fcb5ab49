#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Tell what a host has of NVIDIA's driver, and what stands in the way of the declared one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_info
short_description: Tell what a host has of NVIDIA's driver, and what stands in the way of the declared one
version_added: 0.1.0
description:
  - Reads what is there of NVIDIA's driver (kernel module, packages, sources of apt), who uses it, and what its
    installation depends on (GPUs on the PCI bus, kernel headers, Secure Boot). Reads only.
  - With O(version), also tells why that driver must not be installed, and what brings it into use once its packages
    are there.
  - It works before any driver is installed. What it finds never makes it fail.
author: The nvl.vllm authors
options:
  version:
    description: Version of the declared driver, such as V(580.95.05). Empty where none is declared, for facts alone.
    type: str
    default: ""
  repository:
    description: URI of the apt repository that the driver is to come from; empty for NVIDIA's own only.
    type: str
    default: ""
  own_source:
    description: The apt source file that names O(repository) for us. It is not told among RV(sources).
    type: path
    default: ""
  engine_units:
    description: Which units are our engines, as a pattern of the shell.
    type: str
    default: vllm@*.service
  sys:
    description: Where the kernel's view of devices and modules is.
    type: path
    default: /sys
  proc:
    description: Where the kernel's view of processes is.
    type: path
    default: /proc
  apt:
    description: Where apt's configuration is.
    type: path
    default: /etc/apt
  timeout:
    description: Deadline (seconds) of each command; there are up to eight.
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
  - module: nvl.vllm.gpu_info
"""

EXAMPLES = r"""
- name: Look at the driver
  nvl.vllm.driver_info:
    version: 580.95.05
    repository: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/
    own_source: /etc/apt/sources.list.d/nvidia-cuda.sources
  register: driver

- name: Stop where the driver must not be installed
  ansible.builtin.assert:
    that: driver.errors | length == 0
    fail_msg: "{{ driver.errors | join(' | ') }}"
"""

RETURN = r"""
kernel:
  description: The running kernel.
  returned: success
  type: dict
  contains:
    release:
      description: Its release.
      type: str
      sample: 6.1.0-37-amd64
    headers:
      description: Whether its headers are there, which modules are built with.
      type: bool
    container:
      description: The kind of container that this is, whose kernel is its host's; empty for none.
      type: str
      sample: ""
    header_packages:
      description: Packages that modules are built with, for this kernel and those that upgrades bring.
      type: list
      elements: str
      sample: [linux-headers-6.1.0-37-amd64, linux-headers-amd64]
loaded:
  description: Version of the kernel module C(nvidia) that is loaded; empty for none.
  returned: success
  type: str
  sample: 580.95.05
nouveau:
  description: Whether the kernel's own module has a GPU of NVIDIA's, which keeps the driver out.
  returned: success
  type: bool
unload:
  description: Modules that are to be removed before another version is loaded, in this order.
  returned: success
  type: list
  elements: str
on_disk:
  description: Version of the module that the running kernel would load; empty for none.
  returned: success
  type: str
  sample: 580.95.05
packages:
  description: Installed packages of the driver, by name or by version, whoever made them.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name, with the architecture where that is not the host's.
      type: str
      sample: libcuda1
    version:
      description: Version.
      type: str
      sample: 580.95.05-1
    held:
      description: Whether upgrades leave it alone (C(apt-mark hold)).
      type: bool
    broken:
      description: Whether dpkg began to install or to set it up, and did not end.
      type: bool
    origins:
      description:
        - URIs of the repositories that offer this very version. Empty where none does any more, and for tools that
          work beside any driver.
      type: list
      elements: str
broken:
  description: Names of all packages, of the driver or not, that are broken. One is enough to stop apt.
  returned: success
  type: list
  elements: str
runfile:
  description: What shows that NVIDIA's .run installer was used; empty where nothing does.
  returned: success
  type: str
  sample: ""
gpus:
  description: NVIDIA's GPUs on the PCI bus in the order of their addresses, which is that of nvidia-smi's index.
  returned: success
  type: list
  elements: dict
  contains:
    address:
      description: PCI address.
      type: str
      sample: "0000:ad:00.0"
    device:
      description: PCI device.
      type: str
      sample: "2321"
    name:
      description: Name as nvidia-smi writes it; of a board that is not known V(NVIDIA device 10de:XXXX).
      type: str
      sample: NVIDIA H100 NVL
nvswitches:
  description: PCI addresses of the NVSwitches of an HGX board.
  returned: success
  type: list
  elements: str
secure_boot:
  description: Whether the kernel loads signed modules only, V(on), V(off) or V(unknown).
  returned: success
  type: str
mok:
  description: The certificate that DKMS signs modules with.
  returned: success
  type: dict
  contains:
    path:
      description: Where it is, or will be.
      type: str
      sample: /var/lib/dkms/mok.pub
    state:
      description:
        - V(enrolled), V(requested) (to be confirmed on the console at the next boot), V(not enrolled), V(no key), or
          V(unknown).
      type: str
users:
  description: Processes that have a GPU open, C(nvidia-persistenced) aside.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: Number.
      type: int
    name:
      description: Program.
      type: str
    unit:
      description: The service that it belongs to; empty for none.
      type: str
      sample: vllm@primary.service
reboot_required:
  description: Whether packages want a reboot.
  returned: success
  type: bool
reboot_packages:
  description: Names of these packages.
  returned: success
  type: list
  elements: str
sources:
  description: Entries of apt for O(repository) or for a CUDA repository of NVIDIA's, those of O(own_source) aside.
  returned: success
  type: list
  elements: dict
  contains:
    file:
      description: File with the entry.
      type: str
    uri:
      description: The repository.
      type: str
    signed_by:
      description: Whose signature it has to carry; empty for any key that apt trusts.
      type: str
own_uris:
  description: URIs that O(own_source) names.
  returned: success
  type: list
  elements: str
errors:
  description: Why the declared driver must not be installed, one sentence each, without the host's name.
  returned: success
  type: list
  elements: str
activation:
  description: What brings the declared driver into use once its packages are there.
  returned: success
  type: dict
  contains:
    step:
      description:
        - V(none) (it is in use, or none is declared), V(load), V(reload) (another one is loaded and nobody uses it),
          V(reboot) (nouveau has the GPUs), V(wait) (another one is in use), or V(missing) (the running kernel has no
          module of that version).
      type: str
    reason:
      description: Why, and the remedy where one is wanted.
      type: str
notes:
  description: What is worth knowing and stops nothing.
  returned: success
  type: list
  elements: str
in_use:
  description: Who uses another version of the driver than O(version), and what to do; empty where nobody does.
  returned: success
  type: str
engines_in_use:
  description: Units of our engines that have a GPU open.
  returned: success
  type: list
  elements: str
holds_missing:
  description: Packages at the declared version that are not held.
  returned: success
  type: list
  elements: str
"""

import socket

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _driver, _gpu_info


def main():
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "default": ""},
            "repository": {"type": "str", "default": ""},
            "own_source": {"type": "path", "default": ""},
            "engine_units": {"type": "str", "default": "vllm@*.service"},
            "sys": {"type": "path", "default": "/sys"},
            "proc": {"type": "path", "default": "/proc"},
            "apt": {"type": "path", "default": "/etc/apt"},
            "timeout": {"type": "float", "default": 20.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    version, repository = params["version"], params["repository"]
    complaint = _driver.version_complaint(version)
    if complaint:
        module.fail_json(msg=complaint)
    if params["timeout"] <= 0:
        module.fail_json(msg=f"timeout is {params['timeout']:g} s: wanted more than 0")

    paths = _driver.Paths(sys=params["sys"], proc=params["proc"], apt=params["apt"])
    try:
        facts = _driver.read(paths, repository, params["own_source"], params["timeout"])
    except _driver.DriverError as error:
        module.fail_json(msg=f"{socket.gethostname()}: {error}")
    module.exit_json(
        changed=False,
        **_gpu_info.as_dict(facts),
        errors=_driver.refusals(facts, version, repository),
        activation=_driver.activation(facts, version, params["engine_units"])._asdict(),
        notes=_driver.pending(facts, repository),
        in_use=_driver.in_use(facts, version, params["engine_units"]),
        engines_in_use=_driver.engines_in_use(facts, params["engine_units"]),
        holds_missing=_driver.holds_missing(facts, version),
    )


if __name__ == "__main__":
    main()
