# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Small records on the host: a JSON object in a file that is never there half."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


def read_object(path: str) -> dict[str, Any]:
    """The object in the file; empty where the file is not there or holds no JSON object."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_object(path: str, value: Mapping[str, Any]) -> None:
    """Replace the file in one step (rename), readable by all, its directory made where needed."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(path + ".new", 0o644)
    os.replace(path + ".new", path)
