#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Install NVIDIA's driver at one exact version, all of it, and hold it there."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_packages
short_description: Install NVIDIA's driver at one exact version, all of it, and hold it there
version_added: 0.1.0
description:
  - Installs the named packages at the declared version, and brings every package of the driver that is there already to
    the same one, up or down. A driver of which some packages are newer than others does not work.
  - Asks apt what it would do, first, and refuses to go on where a package would go that is not the driver's, or
    another version of the driver would come.
  - Holds the driver's packages (C(apt-mark hold)), so that no upgrade of the system changes them.
author: The nvl.vllm authors
options:
  names:
    description: Packages of the driver.
    type: list
    elements: str
    required: true
  version:
    description: The driver's version, without the distribution's revision, such as V(580.95.05).
    type: str
    required: true
  repository:
    description: URI of the repository that they come from. Packages of the same names from others are not taken.
    type: str
    required: true
  preferences:
    description: File of apt's preferences that holds the pin of the version before. It is left out here.
    type: path
    required: true
  pin:
    description: Patterns of names, as apt's preferences take them, of packages that come at this version or not at all.
    type: list
    elements: str
    required: true
  others:
    description: Packages that are installed with them at any version, such as the kernel's headers.
    type: list
    elements: str
    default: []
  local:
    description: Directory of a repository on the host. What apt would take from it is returned as RV(files).
    type: path
    default: ""
  timeout:
    description: Longest time (s) that the installation may take. Building a kernel module takes minutes.
    type: float
    default: 1800
attributes:
  check_mode:
    support: full
    description: Tells what would be installed.
  diff_mode:
    support: full
    description: Shows each package's version before and after.
  idempotent:
    support: full
    description: Changes nothing where all is installed and held.
"""

EXAMPLES = r"""
- name: Install the driver
  nvl.vllm.driver_packages:
    names: [nvidia-driver-cuda, nvidia-kernel-open-dkms]
    version: 580.95.05
    repository: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/
    pin: [nvidia-*, libnvidia-*, libcuda1]
    preferences: /etc/apt/preferences.d/nvl-vllm-cuda
"""

RETURN = r"""
steps:
  description:
    - What is (in check mode would be) done, each with C(name), C(before) and C(after), which are versions or empty.
  returned: success
  type: list
  elements: dict
held:
  description: Packages that are held by this run.
  returned: success
  type: list
  elements: str
files:
  description: Files below O(local) that the installation takes, relative to it.
  returned: success
  type: list
  elements: str
"""

import glob
import os
import shutil
import socket
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _apt, _driver

APT = ["apt-get", "--assume-yes", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]
#: Seconds to wait for another apt, such as that of unattended-upgrades.
APT.append("--option=DPkg::Lock::Timeout=300")
#: A changed configuration file of a package stays as it is.
CONFIGURATION = ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    # Engines are restarted by their own role, not because a library beside them changed.
    "NEEDRESTART_SUSPEND": "1",
}


def objections(steps, version, held):
    """What must not happen beside the installation of the driver, one sentence each. ``held`` are names."""
    found = []
    for step in steps:
        ours = _driver.is_family(step.name)
        if step.name in held and not ours:
            found.append(
                f"{step.name} {step.before} is held (apt-mark showhold) and would be changed for the driver {version}: "
                "release it, or declare another cuda_driver_version"
            )
        elif not step.after and not ours:
            found.append(
                f"{step.name} {step.before} does not belong to the driver {version} and would be removed for it: "
                "remove it yourself, or declare another cuda_driver_version"
            )
        elif ours and _driver.other_driver_version(_apt.upstream(step.after), version):
            found.append(
                f"{step.name} {step.after} would come with the driver {version}, and all of a driver must be of one "
                "version: declare another cuda_driver_version"
            )
    return found


def main():
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "version": {"type": "str", "required": True},
            "repository": {"type": "str", "required": True},
            "pin": {"type": "list", "elements": "str", "required": True},
            "preferences": {"type": "path", "required": True},
            "others": {"type": "list", "elements": "str", "default": []},
            "local": {"type": "path", "default": ""},
            "timeout": {"type": "float", "default": 1800.0},
        },
        supports_check_mode=True,
    )
    params = module.params
    module.run_command_environ_update = ENVIRONMENT

    def fail(sentences):
        host = socket.gethostname()
        module.fail_json(msg="\n".join(f"{host}: {sentence}" for sentence in sentences))

    def run(argv):
        return module.run_command(argv, handle_exceptions=False)

    version, family = params["version"], {package.name: package for package in _driver.installed()}
    broken = [package.name for package in family.values() if package.broken]
    if broken and not module.check_mode:
        # An earlier run was interrupted, or could not build the module. What still fails is told by what follows.
        module.run_command(["dpkg", "--configure", "--pending"])
    deadline = ["timeout", "--kill-after=30", str(params["timeout"])]
    # The host's own preferences, with the declared version in place of the one before.
    preferences = tempfile.TemporaryDirectory(prefix="driver.")
    os.chmod(preferences.name, 0o755)  # apt reads as user _apt, too
    for path in glob.glob("/etc/apt/preferences.d/*"):
        if os.path.basename(path) != os.path.basename(params["preferences"]):
            shutil.copy(path, preferences.name)
    with open(f"{preferences.name}/driver", "w", encoding="utf-8") as stream:
        stream.write(f"Package: {' '.join(params['pin'])}\nPin: version {version}-*\nPin-Priority: 1001\n")
    apt = [*APT, "-o", f"Dir::Etc::PreferencesParts={preferences.name}"]
    # What is there of the driver moves along, if the repository still has it at that version.
    present = [name for name in family if name not in params["names"]]
    madison = run(["apt-cache", "madison", *params["names"], *present])[1]
    offered = _apt.offers(madison, params["repository"])
    for name, package in family.items():
        offered.setdefault(name, []).append(package.version)
    chosen, complaints = _apt.choose(params["names"], version, offered)
    if complaints:
        fail(complaints)
    chosen.update(_apt.choose(present, version, offered)[0])

    wanted = [f"{name}={one}" for name, one in chosen.items()] + params["others"]
    status, simulation, errors = run([*apt, "--simulate", "install", *wanted])
    if status:
        fail([f"apt cannot install {' '.join(wanted)}: {_apt.reason(simulation + errors)}"])
    steps = _apt.steps(simulation)
    complaints = objections(steps, version, set(run(["apt-mark", "showhold"])[1].split()))
    if complaints:
        fail(complaints)
    files = []
    if params["local"] and steps:
        uris = run([*apt, "--print-uris", "--quiet=2", "install", *wanted])[1]
        files = _apt.local_files(uris, params["local"])

    before = {package.name: f"{package.version}{' (held)' if package.held else ''}" for package in family.values()}
    after = {**before, **{step.name: step.after for step in steps}}
    if not module.check_mode:
        # The kernel's headers must be there before the module's package is set up: DKMS skips the build without them.
        others = [name for name in params["others"] if any(step.name == name for step in steps)]
        for names in [names for names in (others, wanted) if names and steps]:
            status, output, errors = run([*deadline, *apt, *CONFIGURATION, "install", *names])
            if status:
                log = f"/var/lib/dkms/nvidia/{version}/build/make.log"
                hint = f"; the build of the kernel module wrote {log}" if os.path.isfile(log) else ""
                why = f"apt took longer than {params['timeout']:g} s" if status == 124 else _apt.reason(output + errors)
                fail([f"the driver {version} could not be installed: {why}{hint}. Mend that and run again"])
        family = {package.name: package for package in _driver.installed()}
    after = {name: one for name, one in after.items() if one}
    # By name or by version, as what "belongs to the driver" means to driver_info.
    belonging = [name for name, one in after.items() if _apt.upstream(one.split()[0]) == version]
    held = [name for name in belonging if not (name in family and family[name].held)]
    if held and not module.check_mode:
        module.run_command(["apt-mark", "hold", *held], check_rc=True)
    after.update({name: f"{after[name].partition(' ')[0]} (held)" for name in held})
    lines = ["".join(f"{name} {one}\n" for name, one in sorted(side.items())) for side in (before, after)]
    module.exit_json(
        changed=bool(steps or held or broken),
        steps=[step._asdict() for step in steps],
        held=held,
        files=files,
        diff={"before": lines[0], "after": lines[1]},
    )


if __name__ == "__main__":
    main()
