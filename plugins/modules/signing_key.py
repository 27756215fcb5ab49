#!/usr/bin/python
# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Bring the public key of an apt repository to a host, if it is the expected one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: signing_key
short_description: Bring the public key of an apt repository to a host, if it is the expected one
version_added: 0.1.0
description:
  - Fetches an OpenPGP public key, or takes it from O(content), and writes it where an entry of apt's sources
    can name it (C(Signed-By)).
  - The key must have one of O(fingerprints). A file with any other key in it, with a secret key, or without one
    of the wanted keys is refused as a whole, and what is on the host stays as it is.
  - A key that has expired is refused, as apt would refuse what it signs. Of several keys one must be valid.
  - Where O(path) holds exactly the wanted keys already, nothing is fetched from O(url), except when one of them
    has expired. The owner may have prolonged it.
  - The file belongs to root, is readable by all, and its directory is made where it is missing.
  - It needs neither C(gpg) nor C(gnupg) on the host.
author: The nvl.vllm authors
options:
  path:
    description: File on the host; must end in C(.asc), as it is always written ASCII-armored.
    type: path
    required: true
  url:
    description: C(http), C(https) or C(file) URL of the key, armored or binary; empty where O(content) is given.
    type: str
    default: ""
  content:
    description: The key itself, armored; empty where O(url) is given.
    type: str
    default: ""
  fingerprints:
    description:
      - Fingerprints of the primary keys, 40 hexadecimal digits each (64 for keys of version 6).
      - Case and spaces do not matter.
    type: list
    elements: str
    required: true
  proxy:
    description: Proxy on the way to O(url), such as C(http://user:password@proxy:3128); empty for the environment's.
    type: str
    default: ""
  ca_file:
    description: File on the host with the certificates that O(url) is trusted by; empty for the system's.
    type: path
    default: ""
  timeout:
    description: How long the server may be silent, and the key may take to arrive (s).
    type: float
    default: 30
  variable:
    description: What the operator sets to change O(fingerprints); error messages name it.
    type: str
    default: fingerprints
attributes:
  check_mode:
    support: full
    description: Fetches and checks the key, but does not write it.
  diff_mode:
    support: full
    description: Shows fingerprint, user ID and expiry of each key, and the SHA-256 of the file.
  idempotent:
    support: full
    description: A file with the wanted keys is left alone.
"""

EXAMPLES = r"""
- name: Bring NVIDIA's key for Debian 12
  nvl.vllm.signing_key:
    path: /etc/apt/keyrings/nvidia-cuda.asc
    url: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/3bf863cc.pub
    fingerprints:
      - EB69 3B30 35CD 5710 E231  E123 A4B4 6996 3BF8 63CC

- name: Bring a key that is kept with the inventory
  nvl.vllm.signing_key:
    path: /etc/apt/keyrings/mirror.asc
    content: "{{ lookup('ansible.builtin.file', 'mirror.asc') }}"
    fingerprints: ["{{ mirror_fingerprint }}"]
    variable: mirror_fingerprint
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
fingerprints:
  description: Fingerprints of the primary keys, in the order of the file.
  returned: success
  type: list
  elements: str
  sample: [EB693B3035CD5710E231E123A4B469963BF863CC]
users:
  description: User IDs of these keys.
  returned: success
  type: list
  elements: str
  sample: ["cudatools <cudatools@nvidia.com>"]
"""

import hashlib
import http.client
import os
import socket
import tempfile
import time
import urllib.error
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url
from ansible_collections.nvl.vllm.plugins.module_utils._http import shorten
from ansible_collections.nvl.vllm.plugins.module_utils._openpgp import (
    MAX_SIZE,
    KeyRefused,
    PgpError,
    armor,
    check_expected,
    check_expiry,
    day,
    decode,
    has_expired,
    primary_keys,
    wanted_fingerprints,
)

OWNER = GROUP = "root"
REMEDY = "check url, proxy and ca_file, or give the key as content"


def shown(url):
    """The URL without user and password. Raises ValueError for one that cannot be fetched."""
    parts = urlsplit(url)
    usable = bool(parts.path) if parts.scheme == "file" else parts.scheme in ("http", "https") and bool(parts.hostname)
    if not usable or parts.port == 0:  # a port that is no number raises the ValueError itself
        raise ValueError(f"wanted http, https or file, found {parts.scheme or 'none'}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def download(url, proxy, ca_file, timeout):
    """What the URL has, at most one byte more than MAX_SIZE. Raises what the network does, mostly OSError."""
    if proxy:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ[name] = proxy
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ""
    deadline = time.monotonic() + timeout
    data = b""
    with open_url(url, timeout=timeout, ca_path=ca_file or None, decompress=False, http_agent="nvl.vllm") as response:
        promised = response.headers.get("Content-Length")
        while len(data) <= MAX_SIZE:
            piece = response.read1(65536)  # what has arrived, so that the deadline is seen in between
            if not piece:
                break
            data += piece
            if time.monotonic() > deadline:
                raise socket.timeout(f"not complete within {timeout:g} s")
        if promised is not None and len(data) < min(int(promised), MAX_SIZE):
            raise http.client.HTTPException(f"the connection broke after {len(data)} of {promised} bytes")
    return data


def fetch(module):
    """What the URL has; a failure ends the module with one sentence."""
    params = module.params
    try:
        where = shown(params["url"])
    except ValueError as error:
        module.fail_json(
            msg=f"url cannot be fetched ({error}): wanted such as https://host/path/key.asc or file:///path/key.asc"
        )
    try:
        return download(params["url"], params["proxy"], params["ca_file"], params["timeout"])
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
    module.fail_json(msg=f"cannot fetch the key at {where}: {shorten(reason)}: {REMEDY}")


def present(path):
    """Bytes of the file on the host, its packets and its keys; the latter empty for what is no key."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_SIZE + 1)
        packets = decode(data)
        return data, packets, primary_keys(packets)
    except FileNotFoundError:
        return b"", b"", []
    except PgpError:
        return data, b"", []


def obtain(module, wanted, packets, keys):
    """Packets and keys that the file shall have; ``packets`` and ``keys`` are those that it has."""
    params = module.params
    variable = params["variable"]
    if params["content"]:
        where, remedy, data = "in content", "set it to the armored public key", params["content"].encode()
    else:
        same = {key.fingerprint for key in keys} == set(wanted)
        if same and not any(has_expired(key, time.time()) for key in keys):
            return packets, keys
        data = fetch(module)
        where, remedy = f"at {shown(params['url'])}", REMEDY
    try:
        packets = decode(data)
        keys = primary_keys(packets)
    except PgpError as error:
        module.fail_json(msg=f"the key {where} cannot be used: {error}: {remedy}")
    try:
        check_expected(keys, wanted, where, variable)
        for warning in check_expiry(keys, time.time(), where, variable):
            module.warn(warning)
    except KeyRefused as error:
        module.fail_json(msg=str(error))
    return packets, keys


def write(module, text):
    """Replace the file in one step, its directory made where needed."""
    path = module.params["path"]
    os.umask(0o022)
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(text)
    module.atomic_move(new, path)


def state(data, keys):
    """What diff mode shows of a file."""
    if not data:
        return {}
    return {
        "keys": [f"{key}, expires: {day(key.expires)}" for key in keys],
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "url": {"type": "str", "default": ""},
            "content": {"type": "str", "default": "", "no_log": True},  # in case that it is a secret key by mistake
            "fingerprints": {"type": "list", "elements": "str", "required": True},
            "proxy": {"type": "str", "default": "", "no_log": True},
            "ca_file": {"type": "path", "default": ""},
            "timeout": {"type": "float", "default": 30},
            "variable": {"type": "str", "default": "fingerprints"},
        },
        supports_check_mode=True,
    )
    url, content = module.params["url"], module.params["content"]
    if bool(url) == bool(content):
        found = "given" if url else "empty"
        module.fail_json(
            msg=f"url and content are both {found}, wanted one of them: say where the key comes from, once"
        )
    path, timeout = module.params["path"], module.params["timeout"]
    if not path.endswith(".asc") or not os.path.isabs(path):
        module.fail_json(msg=f"path is {path}, wanted an absolute path that ends in .asc: apt reads it as armored then")
    if not timeout > 0:
        module.fail_json(msg=f"timeout is {timeout:g}, wanted more than 0 seconds")
    try:
        wanted = wanted_fingerprints(module.params["fingerprints"], module.params["variable"])
    except KeyRefused as error:
        module.fail_json(msg=str(error))

    try:
        before, packets, keys_before = present(path)
        packets, keys = obtain(module, wanted, packets, keys_before)
        text = armor(packets)
        changed = text.encode() != before
        diff = {"before": state(before, keys_before), "after": state(text.encode(), keys)}
        if changed and not module.check_mode:
            write(module, text)
        attributes = {"path": path, "owner": OWNER, "group": GROUP, "mode": "0644"}
        if os.path.exists(path):
            arguments = module.load_file_common_arguments(attributes)
            changed = module.set_fs_attributes_if_different(arguments, changed, diff)
    except OSError as error:
        module.fail_json(
            msg=f"cannot write the key to {path}: {error.strerror or error} ({error.filename or path}): "
            "check what is there, and whether its file system can be written"
        )
    module.exit_json(
        changed=changed,
        path=path,
        fingerprints=[key.fingerprint for key in keys],
        users=[user for key in keys for user in key.user_ids],
        diff={**diff, "before_header": path, "after_header": path},
    )


if __name__ == "__main__":
    main()
