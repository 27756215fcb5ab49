#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Bring the vLLM units of a host to what is declared, one at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: units
short_description: Bring the vLLM units of a host to what is declared, one at a time
version_added: 0.1.0
description:
  - Enables and starts C(vllm@NAME.service) of each instance. An engine that runs from anything else
    than what is on disk now (configuration, environment, unit, release, checkpoint) is restarted;
    the others are not touched.
  - One unit at a time, each until it has answered a completion. Where one fails, the module fails
    with the reason and leaves the rest as it is.
  - Units that are no longer declared are stopped and disabled, and their files removed.
  - Interrupted, it can be run again; what is to do is read from the host each time.
author: The nvl.vllm authors
options:
  instances:
    description: Names of the declared instances, in the order to start them.
    type: list
    elements: str
    required: true
  root:
    description: Directory with the C(current) link to the release.
    type: path
    required: true
  model_path:
    description: Directory of the checkpoint.
    type: path
    required: true
  pending:
    description:
      - Names of instances whose files are still to be changed. In check mode earlier tasks wrote nothing,
        and this tells which engines would be restarted for them.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    support: full
    description: Says what would be started, restarted or removed.
  diff_mode:
    support: full
    description: Shows the state of each unit before and after.
  idempotent:
    support: full
    description: A unit that runs from what is on disk is left alone.
"""

EXAMPLES = r"""
- name: Bring both engines up
  nvl.vllm.units:
    instances: [primary, secondary]
    root: /opt/vllm
    model_path: /srv/models/gpt-oss-120b
"""

RETURN = r"""
instances:
  description: What was done, per instance.
  returned: success
  type: dict
  sample: {"primary": "restarted", "secondary": "none"}
fingerprints:
  description: Digest of everything that each engine is started from (SHA-256), per instance.
  returned: success
  type: dict
pending:
  description: What O(pending) was.
  returned: success
  type: list
  elements: str
removed:
  description: Instances that are no longer declared and were removed.
  returned: success
  type: list
  elements: str
seconds:
  description: Time that each start took (s), per instance.
  returned: success
  type: dict
"""

import glob
import os
import socket
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._unit import CONFIG, STATE, UNITS, fingerprint, read_state
from ansible_collections.nvl.vllm.plugins.module_utils._units import (
    PENDING,
    Unit,
    journal_reason,
    parse_show,
    plan,
    undeclared,
)

PROPERTIES = "ActiveState,SubState,UnitFileState,NeedDaemonReload,LoadState"
TARGET = "vllm.target"


class Units:
    """Reads and drives the units through systemctl."""

    def __init__(self, module):
        self.module = module

    def systemctl(self, *argv, check=True):
        rc, out, err = self.module.run_command(["systemctl", *argv], check_rc=False)
        if rc != 0 and check:
            command = " ".join(["systemctl", *argv])
            self.module.fail_json(msg=f"{socket.gethostname()}: {command} failed: {(err or out).strip()}")
        return rc, out

    def read(self, name):
        params = self.module.params
        show = parse_show(self.systemctl("show", f"--property={PROPERTIES}", f"vllm@{name}.service")[1])
        return Unit(
            name=name,
            active=show.get("ActiveState", ""),
            enabled=show.get("UnitFileState") == "enabled",
            stale=show.get("NeedDaemonReload") == "yes",
            started_from=str(read_state(name).get("fingerprint", "")),
            wanted=PENDING if name in params["pending"] else fingerprint(name, params["root"], params["model_path"]),
        )

    def known(self):
        """Names of all instances that the host has files or units of."""
        files = [os.path.basename(path).rpartition(".")[0] for path in glob.glob(f"{CONFIG}/*.yaml")]
        links = glob.glob(f"{UNITS}/{TARGET}.wants/vllm@*.service")
        return files + [os.path.basename(path)[len("vllm@") : -len(".service")] for path in links]

    def remove(self, name):
        self.systemctl("disable", "--now", f"vllm@{name}.service")
        for path in (f"{CONFIG}/{name}.yaml", f"{CONFIG}/{name}.env", f"{STATE}/{name}.json"):
            if os.path.exists(path):
                os.remove(path)

    def bring_up(self, unit):
        """Start or restart, until the engine has answered; returns seconds. Fails the module otherwise."""
        service = f"vllm@{unit.name}.service"
        # A start limit that was reached belongs to what ran before.
        self.systemctl("reset-failed", service, check=False)
        began, since = time.monotonic(), int(time.time())
        rc, _ = self.systemctl("restart" if unit.action == "restarted" else "start", service, check=False)
        if rc != 0:
            journal = self.module.run_command(
                ["journalctl", "--unit", service, "--since", f"@{since}", "--output", "cat", "--no-pager"]
            )[1]
            self.module.fail_json(
                msg=f"{socket.gethostname()}: {service} did not come up: {journal_reason(journal)}; "
                f"the other instances were left as they are (journalctl -u {service} has all of it)",
                journal=journal.splitlines()[-60:],
            )
        return round(time.monotonic() - began, 1)


def main():
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "str", "required": True},
            "root": {"type": "path", "required": True},
            "model_path": {"type": "path", "required": True},
            "pending": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    units = Units(module)
    declared = module.params["instances"]
    found = [units.read(name) for name in declared]
    gone = undeclared(units.known(), declared)
    target_enabled = units.systemctl("is-enabled", TARGET, check=False)[0] == 0
    changes = plan(found, gone, target_enabled)
    result: dict[str, Any] = {
        "changed": bool(changes.lines_before or changes.lines_after),
        "instances": {unit.name: unit.action for unit in found},
        "fingerprints": {unit.name: unit.wanted for unit in found},
        "pending": module.params["pending"],
        "removed": gone,
        "seconds": {},
        "diff": {"before": "".join(changes.lines_before), "after": "".join(changes.lines_after)},
    }
    if module.check_mode:
        module.exit_json(**result)

    if any(unit.stale for unit in found):
        units.systemctl("daemon-reload")
    for name in gone:
        units.remove(name)
    to_enable = [f"vllm@{unit.name}.service" for unit in found if not unit.enabled]
    if to_enable or not target_enabled:
        units.systemctl("enable", "--quiet", TARGET, *to_enable)
    for unit in found:
        if unit.action != "none":
            result["seconds"][unit.name] = units.bring_up(unit)
    # The target groups the units; all of them run by now, so this starts nothing else.
    if units.systemctl("is-active", TARGET, check=False)[0] != 0:
        units.systemctl("start", TARGET)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
