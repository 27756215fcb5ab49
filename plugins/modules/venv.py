#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Install a locked release of vLLM into its own virtual environment."""

from __future__ import annotations

DOCUMENTATION = r"""
module: venv
short_description: Install a locked release of vLLM into its own virtual environment
version_added: 0.1.0
description:
  - Builds O(path) from a lock file with hashes, using uv, and writes a marker when it is complete.
    A directory without the marker is what an interrupted run left; it is removed and built again.
  - A complete release is never changed. A new lock file is a new directory.
  - vLLM is then imported from the new environment, and must be O(version).
author: The nvl.vllm authors
options:
  path:
    description: Directory of the release, such as C(/opt/vllm/0.32.0-cuda-1a2b3c4d).
    type: path
    required: true
  lock:
    description: Lock file on the host, each requirement pinned and with its SHA-256.
    type: path
    required: true
  uv_lock:
    description: Lock file that pins uv itself.
    type: path
    required: true
  uv_path:
    description: Directory of the small environment that holds uv.
    type: path
    required: true
  version:
    description: The version that vLLM must have, local part (C(+cpu)) aside.
    type: str
    required: true
  python:
    description: Interpreter that the environment is made from.
    type: path
    default: /usr/bin/python3
  wheelhouse:
    description: Directory on the host with all wheels of the lock; no index is asked then.
    type: path
  index_urls:
    description: Package indexes, the main one first. Without any, the host's own configuration decides.
    type: list
    elements: str
    default: []
  required_space:
    description: Free space (MiB) that the file system of O(path) must have before anything is written.
    type: int
    default: 0
  compile_bytecode:
    description: Compile all modules now; an engine starts about three times as fast from byte code.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
    description: Reports whether the release would be built.
  diff_mode:
    support: full
    description: Names the packages that would come with the release.
  idempotent:
    support: full
    description: A complete release is left alone.
"""

EXAMPLES = r"""
- name: Install vLLM 0.32.0 from a wheelhouse
  nvl.vllm.venv:
    path: /opt/vllm/0.32.0-cuda-1a2b3c4d
    lock: /opt/vllm/locks/cuda-0.32.0.txt
    uv_lock: /opt/vllm/locks/uv.txt
    uv_path: /opt/vllm/uv
    version: 0.32.0
    wheelhouse: /opt/vllm/wheelhouse
    required_space: 12288
"""

RETURN = r"""
release:
  description: What the marker of the release says.
  returned: when the release is complete
  type: dict
  contains:
    version:
      description: Version of vLLM, as the installed package says.
      type: str
    packages:
      description: Number of packages.
      type: int
    size:
      description: Size on disk (MiB).
      type: int
    seconds:
      description: Time that the installation took (s).
      type: float
"""

import os
import shutil
import socket
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nvl.vllm.plugins.module_utils._host import free_mib
from ansible_collections.nvl.vllm.plugins.module_utils._venv import (
    Supply,
    explain_failure,
    locked_packages,
    read_marker,
    supply_options,
    write_marker,
)

READ_VERSION = "import vllm; print(vllm.__version__)"


def size_mib(path):
    """Size of a directory tree (MiB), each inode once."""
    seen = {}
    for folder, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(folder, name))
            seen[stat.st_dev, stat.st_ino] = stat.st_size
    return round(sum(seen.values()) / 2**20)


class Installer:
    """Runs the steps; each failure ends the module with one sentence."""

    def __init__(self, module):
        self.module = module
        self.params = module.params
        self.host = socket.gethostname()
        self.supply = Supply(self.params["wheelhouse"] or "", tuple(self.params["index_urls"]))

    def run(self, argv, explain=None):
        # PYTHONDONTWRITEBYTECODE in the login environment would undo compile_bytecode.
        rc, out, err = self.module.run_command(
            argv, environ_update={"PYTHONDONTWRITEBYTECODE": "", "LC_ALL": "C.UTF-8"}
        )
        if rc != 0:
            text = err or out
            message = explain(text) if explain else f"{self.host}: {' '.join(argv[:4])} failed: {text.strip()[-400:]}"
            self.module.fail_json(msg=message, rc=rc, stdout=out, stderr=err)
        return out

    def explain(self, text):
        return explain_failure(text, self.supply, self.host)

    def uv(self):
        """Path of uv at its pinned version, installed first where it is not there."""
        folder, lock = self.params["uv_path"], self.params["uv_lock"]
        with open(lock, encoding="utf-8") as stream:
            wanted = locked_packages(stream.read())[0].partition("==")[2]
        program = os.path.join(folder, "bin", "uv")
        if os.path.exists(program) and self.run([program, "--version"]).split()[1:2] == [wanted]:
            return program
        shutil.rmtree(folder, ignore_errors=True)
        self.run([self.params["python"], "-m", "venv", folder])
        pip = [os.path.join(folder, "bin", "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
        self.run(
            [*pip, "--disable-pip-version-check", "--require-hashes", *supply_options(self.supply), "-r", lock],
            self.explain,
        )
        return program

    def build(self):
        path = self.params["path"]
        free, wanted = free_mib(path), self.params["required_space"]
        if free < wanted:
            self.module.fail_json(
                msg=f"{self.host}: {path} needs {wanted} MiB of free disk space, its file system has {free} MiB: "
                "free space there, or move vllm_root to a larger file system"
            )
        started = time.monotonic()
        uv = self.uv()
        shutil.rmtree(path, ignore_errors=True)
        self.run([uv, "venv", "--quiet", "--python", self.params["python"], path])
        # On the file system of the release, so that uv links instead of copying.
        cache = os.path.join(os.path.dirname(path), ".uv-cache")
        try:
            self.run(
                [uv, "pip", "install", "--quiet", "--no-progress", "--python", os.path.join(path, "bin", "python")]
                + ["--cache-dir", cache, "--no-deps", "--require-hashes", "--only-binary", ":all:"]
                + (["--compile-bytecode"] if self.params["compile_bytecode"] else [])
                + supply_options(self.supply)
                + ["-r", self.params["lock"]],
                self.explain,
            )
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        # Not `vllm --version`: the CUDA build's command line fails where there is no GPU or no driver yet.
        version = self.run([os.path.join(path, "bin", "python"), "-c", READ_VERSION]).split()[-1]
        if version.partition("+")[0] != self.params["version"]:
            self.module.fail_json(
                msg=f"{self.host}: {path} holds vLLM {version}, wanted {self.params['version']}: "
                "the lock file belongs to another version"
            )
        return {"version": version, "size": size_mib(path), "seconds": round(time.monotonic() - started, 1)}


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "lock": {"type": "path", "required": True},
            "uv_lock": {"type": "path", "required": True},
            "uv_path": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "wheelhouse": {"type": "path"},
            "index_urls": {"type": "list", "elements": "str", "default": []},
            "required_space": {"type": "int", "default": 0},
            "compile_bytecode": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    marker = read_marker(path)
    if marker is not None:
        module.exit_json(changed=False, release=marker)

    try:
        with open(module.params["lock"], encoding="utf-8") as stream:
            packages = locked_packages(stream.read())
    except FileNotFoundError:
        packages = []  # check mode on a virgin host: the lock has not been copied yet
    diff = {"before": "", "after": "".join(f"{name}\n" for name in packages), "after_header": path}
    if module.check_mode:
        module.exit_json(changed=True, diff=diff)

    release = dict(Installer(module).build(), packages=len(packages))
    write_marker(path, release)
    module.exit_json(changed=True, diff=diff, release=release)


if __name__ == "__main__":
    main()
