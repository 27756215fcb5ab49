#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Remove old releases of vLLM and old revisions of the checkpoint."""

from __future__ import annotations

DOCUMENTATION = r"""
module: cleanup
short_description: Remove old releases of vLLM and old revisions of the checkpoint
version_added: 0.1.0
description:
  - Keeps the most recently current ones up to a count, and removes the others.
    What was current is remembered in C(/var/lib/nvl-vllm/history.json), so a release that was rolled back to
    counts as recent, whenever it was installed.
  - Never removed is what C(current) points to, what a unit was started from, what a process uses, and what has
    another name than the roles give. Symbolic links are not followed.
  - What interrupted installations, downloads and removals left is removed as well.
  - Where it is not known what a unit was started from, or where a download holds the lock of O(model_root),
    nothing of that kind is removed this time, and RV(postponed) says why.
  - A directory in which a file system is mounted is left alone, with a warning.
  - Where one cannot be removed, the others are, and then the module fails with the reason.
author: The nvl.vllm authors
options:
  root:
    description: Directory of the releases, with the C(current) link.
    type: path
    required: true
  model_root:
    description:
      - Directory of the revisions of the checkpoint, with the C(current) link.
      - None where the checkpoint is not managed by these roles.
    type: path
  keep_releases:
    description: Number of complete releases to keep, the current one included; 1 or more.
    type: int
    default: 2
  keep_revisions:
    description: Number of revisions to keep, the current one included; 1 or more.
    type: int
    default: 2
attributes:
  check_mode:
    support: full
    description: Says what would be removed, going by what is on disk before the deploy.
  diff_mode:
    support: full
    description: Shows the directories with their sizes (MiB) before and after, where one goes.
  idempotent:
    support: full
    description: A second run finds nothing to remove. The record of what was current is no change.
"""

EXAMPLES = r"""
- name: Keep the current release and the one before, and the same of the checkpoint
  nvl.vllm.cleanup:
    root: /opt/vllm
    model_root: /srv/models/gpt-oss-120b
    keep_releases: 2
    keep_revisions: 2

- name: Keep only the current release; the checkpoint is on NFS and not ours
  nvl.vllm.cleanup:
    root: /opt/vllm
    keep_releases: 1
"""

RETURN = r"""
removed:
  description: What was removed, or would be in check mode.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The directory.
      type: str
    size:
      description: What its removal frees (MiB).
      type: int
  sample: [{"path": "/opt/vllm/0.31.0-cuda-1a2b3c4d", "size": 8346}]
kept:
  description: What was kept.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The directory.
      type: str
    why:
      description: The reason.
      type: str
  sample: [{"path": "/opt/vllm/0.32.0-cuda-5e6f7a8b", "why": "it is the current one"}]
freed:
  description: Disk space that was freed, or would be in check mode (MiB).
  returned: always
  type: int
postponed:
  description: Why something that could go was not removed this time; empty where nothing was postponed.
  returned: always
  type: str
"""

import contextlib
import os
import socket
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._cleanup import (
    HISTORY,
    RELEASES,
    REVISIONS,
    locked,
    plan,
    remembered,
    remove,
    size_bytes,
)
from ansible_collections.nvl.vllm.plugins.module_utils._json_file import read_object, write_object
from ansible_collections.nvl.vllm.plugins.module_utils._unit import Paths

PATHS = Paths()
PROC = "/proc"


def mib(size):
    """Bytes as whole MiB."""
    return round(size / 2**20)


def clean_up(module, blocked):
    """Plan and do it; returns the result and what could not be removed. ``blocked``: why no revision may go."""
    params = module.params
    history = read_object(HISTORY)
    plans = {RELEASES.history: plan(RELEASES, params["root"], params["keep_releases"], history, PATHS, proc=PROC)}
    if params["model_root"]:
        plans[REVISIONS.history] = plan(
            REVISIONS, params["model_root"], params["keep_revisions"], history, PATHS, blocked, PROC
        )

    kept = {path: why for one in plans.values() for path, why in one.kept.items()}
    going = [path for one in plans.values() for path in one.going]
    # A walk through a release takes a while, so only where sizes are to be told.
    sizes = {path: size_bytes(path) for path in [*kept, *going]} if going else {}
    for one in plans.values():
        for path in one.obstacles:
            module.warn(f"{path} is not removed: {one.kept[path]}")

    removed, failures = [], []
    if module.check_mode:
        removed = going
    else:
        # First, so that an interruption does not forget what was current.
        new = remembered(history, {key: one.current for key, one in plans.items()}, os.path.isdir)
        if new is not None:
            write_object(HISTORY, new)
        for path in going:
            try:
                remove(path)
                removed.append(path)
            except OSError as error:
                failures.append(f"{path}: {error.strerror} ({error.filename})")
    left = [path for path in sizes if path not in removed]
    result: dict[str, Any] = {
        # What could not be removed may have been in part.
        "changed": bool(going),
        "removed": [{"path": path, "size": mib(sizes[path])} for path in removed],
        "kept": [{"path": path, "why": why} for path, why in sorted(kept.items())],
        "freed": mib(sum(sizes[path] for path in removed)),
        "postponed": "; ".join(one.postponed for one in plans.values() if one.postponed),
        "diff": {
            "before": "".join(f"{path} ({mib(sizes[path])} MiB)\n" for path in sorted(sizes)),
            "after": "".join(f"{path} ({mib(sizes[path])} MiB)\n" for path in sorted(left)),
        },
    }
    return result, failures


def main():
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "model_root": {"type": "path"},
            "keep_releases": {"type": "int", "default": 2},
            "keep_revisions": {"type": "int", "default": 2},
        },
        supports_check_mode=True,
    )
    params = module.params
    for option in ("keep_releases", "keep_revisions"):
        if params[option] < 1:
            module.fail_json(msg=f"{option} is {params[option]}, wanted 1 or more: the current one always stays")
    lock = locked(params["model_root"], create=not module.check_mode) if params["model_root"] else None
    with lock or contextlib.nullcontext("") as blocked:
        result, failures = clean_up(module, blocked)
    if failures:
        module.fail_json(
            msg=f"{socket.gethostname()}: cannot remove {'; '.join(failures)}: remove the cause and deploy again; "
            "all else that could go was removed",
            **result,
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
