#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Have a checkpoint on the host, complete and every byte checked."""

from __future__ import annotations

DOCUMENTATION = r"""
module: checkpoint
short_description: Have a checkpoint on the host, complete and every byte checked
version_added: 0.1.0
description:
  - Fetches what is not there, resuming what an interrupted run left, checks the SHA-256 of every file
    and whether the files fit each other (configuration, tokenizer, index, shards), and only then lets
    the directory appear. A file that is damaged later is named and fetched again alone.
  - A file whose size, modification time and inode are those of its last verification is not read
    again, so a run with nothing to do costs a stat a file.
  - While it works it shows how far it is. When the controller is stopped, the host goes on; the next
    run waits for it or takes up what it left.
author: The nvl.vllm authors
options:
  path:
    description: Directory of the checkpoint, such as C(/srv/models/gpt-oss-120b/REVISION).
    type: path
    required: true
  source:
    description:
      - Where files come from.
      - V(hub) is O(repository) at O(revision), through the huggingface_hub of the module's interpreter.
      - V(directory) is O(directory) on the same machine.
      - V(staging) is what was put into RV(staging) beforehand.
      - V(none) uses O(path) as it is; nothing is written to it, and what is damaged is an error.
    type: str
    choices: [hub, directory, staging, none]
    required: true
  repository:
    description: Repository of the hub, such as C(openai/gpt-oss-120b).
    type: str
    default: ""
  revision:
    description: Full commit of the repository.
    type: str
    default: ""
  endpoint:
    description: Mirror of the hub. Without one it is C(https://huggingface.co).
    type: str
    default: ""
  token:
    description: Token for the hub.
    type: str
    default: ""
  proxy:
    description: Proxy on the way to the hub, such as C(http://user:password@proxy:3128).
    type: str
    default: ""
  ca_file:
    description: File on the host with the certificates that the hub, or the proxy, is trusted by.
    type: path
    default: ""
  exclude:
    description: Shell patterns of files that are not wanted.
    type: list
    elements: str
    default: []
  directory:
    description: Directory that files are copied from.
    type: path
    default: ""
  manifest:
    description:
      - Manifest as C(tools/manifest) writes it. The checkpoint must be exactly that.
      - Without one, the hub's own checksums count, and for V(none) those of the first verification.
    type: dict
    default: {}
  verify:
    description: Which files to hash. V(changed) are those that a stat does not prove unchanged.
    type: str
    choices: [changed, always]
    default: changed
  repair:
    description: Whether to fetch what is damaged or absent; otherwise it is an error.
    type: bool
    default: true
  link:
    description: Whether a link C(current) beside O(path) shall point to it. Not for V(none).
    type: bool
    default: true
  margin:
    description: Free space (MiB) that must remain on the file system.
    type: int
    default: 1024
  records:
    description: Directory of the records of what was verified.
    type: path
    default: /var/lib/nvl-vllm/checkpoints
  timeout:
    description: Longest time (s) that fetching and verifying may take.
    type: int
    default: 86400
  progress:
    description: File that tells how far the module is. The action plugin sets it.
    type: path
    default: ""
attributes:
  check_mode:
    support: full
    description: Reports what a stat of each file tells; asks no hub and hashes nothing.
  diff_mode:
    support: full
    description: Names the files that would be fetched or verified.
  idempotent:
    support: full
    description: A checkpoint that is as verified is left alone.
"""

EXAMPLES = r"""
- name: Have gpt-oss-120b on the host
  nvl.vllm.checkpoint:
    path: /srv/models/gpt-oss-120b/b5c939de8f754692c1647ca79fbf85e8c1e70f8a
    source: hub
    repository: openai/gpt-oss-120b
    revision: b5c939de8f754692c1647ca79fbf85e8c1e70f8a
    exclude: [original/*, metal/*]
  vars:
    # huggingface_hub comes with vLLM.
    ansible_python_interpreter: /opt/vllm/current/bin/python

- name: Hash every file of a checkpoint that is used in place, and fail where one is damaged
  nvl.vllm.checkpoint:
    path: /mnt/models/gpt-oss-120b
    source: none
    verify: always
"""

RETURN = r"""
missing:
  description: Files that are absent, or not as verified (in check mode; null where the list of files is not known yet).
  returned: always
  type: list
  elements: str
complete:
  description: Whether nothing is missing and the link is right.
  returned: always
  type: bool
staging:
  description: Directory that V(staging) files belong into.
  returned: always
  type: str
fetched:
  description: Files that were fetched.
  returned: not in check mode
  type: list
  elements: str
damaged:
  description: Files that were found damaged, with what was wrong. They have been fetched again.
  returned: not in check mode
  type: dict
hashed:
  description: Number of files that were there and were hashed.
  returned: not in check mode
  type: int
manifest:
  description: The manifest, each file with size (bytes) and SHA-256.
  returned: not in check mode
  type: dict
checkpoint:
  description: What the checkpoint consists of.
  returned: when it is verified
  type: dict
  contains:
    path:
      description: Its directory.
      type: str
    files:
      description: Number of files.
      type: int
    size:
      description: Bytes of all files.
      type: int
    weight_bytes:
      description: Bytes of all tensors, from the shards' headers.
      type: int
    shards:
      description: Number of safetensors files.
      type: int
    tensors:
      description: Number of tensors.
      type: int
    config:
      description: Content of C(config.json).
      type: dict
    verified:
      description: When it was last verified (UTC).
      type: str
"""

import contextlib
import functools
import os
import socket
import sys

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils import _checkpoint, _hub
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, Manifest, ManifestError, parse
from ansible_collections.nvl.vllm.plugins.module_utils._progress import Progress

#: Options that each source must have.
NEEDS = {"hub": ["repository", "revision"], "directory": ["directory", "manifest"], "staging": ["manifest"], "none": []}


def facts(path, record):
    """The checkpoint as the module returns it."""
    manifest = record.manifest
    return dict(record.structure, path=path, files=len(manifest.files), size=manifest.size, verified=record.verified)


class Work:
    """The module's parameters as objects of the library."""

    def __init__(self, module):
        self.params = params = module.params
        self.progress = Progress(params["progress"])
        # What is only looked at needs no lock.
        managed = params["source"] != "none" and (params["repair"] or os.path.isdir(params["path"]))
        self.store = _checkpoint.Store(
            params["path"], os.path.dirname(params["path"]) if managed else "", params["records"], self.progress
        )
        self.hub = _hub.Hub(params["repository"], params["revision"], params["endpoint"], params["token"])
        self.record = _checkpoint.read_record(params["path"], params["records"])

    def known(self):
        """The manifest as far as it is known without asking anyone, or None."""
        if self.params["manifest"]:
            return parse(self.params["manifest"])
        if self.record is None:
            return None
        manifest, params = self.record.manifest, self.params
        asked = (params["repository"], params["revision"], params["exclude"])
        if params["source"] == "hub" and (manifest.repository, manifest.revision, self.record.exclude) != asked:
            return None
        return manifest

    def look(self):
        """What a stat of each file tells, or None where the list of files is not known yet."""
        wanted = self.known()
        return wanted and _checkpoint.look(self.params["path"], wanted, self.record, self.params["exclude"])

    def wanted(self):
        """The manifest; the hub is asked for it, or the directory's own files are counted, where it is not known."""
        known = self.known()
        if known is not None:
            return known
        if self.params["source"] == "hub" and not self.params["repair"]:
            raise _checkpoint.CheckpointError(f"{self.params['path']} has not been brought yet: deploy first")
        if self.params["source"] == "hub":
            return _hub.list_files(self.hub, self.params["exclude"])
        # Used in place and seen for the first time: what is there is what counts from now on.
        path = self.params["path"]
        names = _checkpoint.present_files(path, self.params["exclude"])
        return Manifest({name: File(os.path.getsize(os.path.join(path, name))) for name in names})

    def fetch(self):
        """How to get a file, or None where nothing may be fetched."""
        params = self.params
        if params["source"] == "none" or not params["repair"]:
            return None
        if params["source"] == "hub":
            return functools.partial(_hub.fetch, self.hub)
        if params["source"] == "directory":
            return _checkpoint.copy_from(params["directory"])
        return _checkpoint.put_by_others(self.store)

    def origin(self):
        """Where files come from, for a person."""
        params = self.params
        if params["source"] == "hub":
            return f"{params['endpoint'] or 'https://huggingface.co'}/{params['repository']}"
        return params["directory"] or "the controller"

    def explain(self, error):
        """The error, one line each with the host's name, and what to do where the files prove themselves only."""
        lines = str(error).splitlines()
        if self.params["source"] == "none" and self.record is not None and not self.params["manifest"]:
            record = _checkpoint.record_path(self.params["path"], self.params["records"])
            lines.append(
                f"that is not what was verified on {self.record.verified}: put the files back, or, where the change "
                f"was meant, remove {record} and run again"
            )
        return "\n".join(f"{socket.gethostname()}: {line}" for line in lines)


def predict(module, work):
    """Check mode: what a stat of each file tells."""
    params = module.params
    found = work.look()
    if params["source"] == "none" and not os.path.isfile(os.path.join(params["path"], "config.json")):
        module.fail_json(
            msg=f"{socket.gethostname()}: {params['path']} is no checkpoint: it holds no config.json. Put one there, "
            "or let vllm_model_source say where to get it"
        )
    missing = None if found is None else sorted(found.absent + found.suspect)
    linked = params["link"] and params["source"] != "none" and work.store.link(change=False)
    after = ["the files of the repository"] if missing is None else missing
    todo = bool(after or linked)
    result = {"changed": todo, "complete": not todo, "missing": missing, "staging": work.store.staging}
    if work.record is not None and missing == []:
        result["checkpoint"] = facts(params["path"], work.record)
    diff = {"before": "", "after": "".join(f"{name}\n" for name in after), "after_header": params["path"]}
    module.exit_json(diff=diff, **result)


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "source": {"type": "str", "choices": ["hub", "directory", "staging", "none"], "required": True},
            "repository": {"type": "str", "default": ""},
            "revision": {"type": "str", "default": ""},
            "endpoint": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": True},
            # It may hold a password.
            "proxy": {"type": "str", "default": "", "no_log": True},
            "ca_file": {"type": "path", "default": ""},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "directory": {"type": "path", "default": ""},
            "manifest": {"type": "dict", "default": {}},
            "verify": {"type": "str", "choices": ["changed", "always"], "default": "changed"},
            "repair": {"type": "bool", "default": True},
            "link": {"type": "bool", "default": True},
            "margin": {"type": "int", "default": _checkpoint.MARGIN},
            "records": {"type": "path", "default": _checkpoint.RECORDS},
            "timeout": {"type": "int", "default": 86400},
            "progress": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    for option in NEEDS[params["source"]]:
        if not params[option]:
            module.fail_json(msg=f"source is {params['source']}, so {option} is wanted")
    if params["proxy"]:
        # Above what the login shell of the host may set, which is looked at in small letters first.
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ[name] = params["proxy"]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ""
    if params["ca_file"]:
        os.environ["SSL_CERT_FILE"] = params["ca_file"]
    os.umask(0o022)
    work = Work(module)
    try:
        if module.check_mode:
            predict(module, work)
        notes = _hub.notes(work.progress.note) if params["source"] == "hub" else contextlib.nullcontext()
        with work.progress.told(), notes, work.store.sole_use():
            # Another run may have finished it meanwhile.
            work.record = _checkpoint.read_record(params["path"], params["records"])
            brought = work.store.bring(
                work.wanted(),
                work.fetch(),
                params["verify"] == "always",
                params["margin"],
                params["exclude"],
                work.origin(),
            )
            linked = params["link"] and params["repair"] and params["source"] != "none" and work.store.link()
    except (_checkpoint.CheckpointError, ManifestError) as error:
        module.fail_json(msg=work.explain(error))
    except ImportError as error:
        module.fail_json(
            msg=f"{socket.gethostname()}: {error} in {sys.executable}: source hub wants an interpreter that has "
            "huggingface_hub, such as /opt/vllm/current/bin/python (ansible_python_interpreter)"
        )
    for warning in brought.warnings:
        module.warn(f"{socket.gethostname()}: {params['path']}: {warning}")
    module.exit_json(
        changed=bool(brought.fetched or linked or work.record is None),
        complete=True,
        missing=[],
        staging=work.store.staging,
        fetched=brought.fetched,
        damaged=brought.damaged,
        hashed=len(brought.hashed),
        manifest=brought.record.manifest.as_dict(),
        checkpoint=facts(params["path"], brought.record),
        diff={
            "before": "",
            "after": "".join(f"{name}\n" for name in brought.fetched),
            "after_header": params["path"],
        },
    )


if __name__ == "__main__":
    main()
