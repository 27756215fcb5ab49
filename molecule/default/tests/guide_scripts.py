"""The two benchmark scripts of the configuration guide, read from the guide, which is no part of this repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: The path of the guide, a Markdown file.
GUIDE = "VLLM_GUIDE"
TITLES = {
    "sequential.py": "Benchmark sequential vs parallel LLM requests",
    "prefix.py": "Benchmark prefix caching benefit",
}


def guide_scripts() -> dict[str, str]:
    """Text by file name, as it stands in the guide; none where ``VLLM_GUIDE`` names no guide.

    Raises ValueError for a guide that lacks one of them.
    """
    path = os.environ.get(GUIDE, "")
    if not path:
        return {}
    blocks = re.findall(r"^```python\n(#!.*?)^```$", Path(path).read_text(), re.MULTILINE | re.DOTALL)
    found = {name: block for name, title in TITLES.items() for block in blocks if title in block}
    if missing := TITLES.keys() - found.keys():
        raise ValueError(f"{path}: found no script {', '.join(TITLES[name] for name in sorted(missing))!r}")
    return found
