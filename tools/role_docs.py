#!/usr/bin/env python3
"""Write the tables of variables in ``docs/configuration.md`` from the roles' argument specifications.

Usage: ``tools/role_docs.py`` writes what is between the page's markers; ``tools/role_docs.py
--check`` writes nothing and exits 1 where the page is not what it would write.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/configuration.md"
BEGIN = "<!-- Begin: written by tools/role_docs.py, do not edit -->\n"
END = "<!-- End: written by tools/role_docs.py -->\n"
# In the order of a deploy.
ROLES = (
    *("vllm_declaration", "gpu_preflight", "cuda", "vllm_packages", "vllm", "vllm_model", "vllm_instances"),
    *(
        "vllm_health",
        "vllm_gateway",
        "vllm_verify",
        "vllm_drift",
        "vllm_status",
        "vllm_doctor",
        "vllm_benchmark",
        "vllm_monitoring",
        "vllm_cleanup",
        "agentic_client",
        "bundle",
        "sandbox",
    ),
)
# A longer default is not shown but linked to.
LONGEST_DEFAULT = 60

Options = dict[str, Any]


def options_of(role: str) -> tuple[str, Options]:
    """Return the short description and the options of a role's entry point ``main``."""
    text = (ROOT / "roles" / role / "meta/argument_specs.yml").read_text()
    main = yaml.safe_load(text)["argument_specs"]["main"]
    return main["short_description"], main["options"]


def prose(description: str | list[str]) -> str:
    """Return a description as Markdown for one cell of a table."""
    lines = [description] if isinstance(description, str) else description
    text = re.sub(r"\b[CVO]\(([^)]*)\)", r"`\1`", " ".join(lines))
    return " ".join(text.split()).replace("|", "\\|")


def kind(option: Options) -> str:
    """Return an option's type in words: ``list of str``, ``cuda or cpu``."""
    if "choices" in option:
        return " or ".join(f"`{choice}`" for choice in option["choices"])
    if "elements" in option:
        return f"{option['type']} of {option['elements']}"
    return str(option["type"])


def default(option: Options, role: str) -> str:
    """Return an option's default as code, or a link to it where it is long."""
    if "default" not in option:
        return ""
    if "options" in option:
        return "see below"
    value = option["default"]
    if isinstance(value, str):
        text = value or '""'
    else:
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
        text = text.partition("\n...")[0].strip()
    if len(text) > LONGEST_DEFAULT:
        return f"[see there](../roles/{role}/defaults/main.yml)"
    return f"`{text}`".replace("|", "\\|")


def rows(options: Options, role: str, prefix: str = "") -> Iterator[str]:
    """Yield the table's rows, each suboption below its option as ``option.suboption``."""
    for name, option in options.items():
        cells = (f"`{prefix}{name}`", kind(option), default(option, role), prose(option["description"]))
        yield f"| {' | '.join(cells)} |\n"
        # An option's own default holds those of its suboptions.
        inner = option.get("default") or {}
        suboptions = {
            key: {"default": inner[key], **suboption} if key in inner else suboption
            for key, suboption in option.get("options", {}).items()
        }
        yield from rows(suboptions, role, f"{prefix}{name}.")


def tables() -> str:
    """Return the tables of all roles as Markdown."""
    parts = []
    for role in ROLES:
        title, options = options_of(role)
        parts.append(f"### {role}\n\n{title}.\n\n| Variable | Type | Default | Meaning |\n|---|---|---|---|\n")
        parts.extend(rows(options, role))
        parts.append("\n")
    return "".join(parts)


def renewed(page: str) -> str:
    """Return the page with what stands between the markers written anew.

    Raises ``ValueError`` for a page that does not have both markers, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {(END if begin else BEGIN).strip()!r}")
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


def main() -> None:
    """Write the page, or only say whether it is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where the page is stale")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    new = renewed(page)
    if arguments.check and new != page:
        sys.exit(f"role_docs: {PAGE.relative_to(ROOT)} is stale: run tools/role_docs.py")
    if new != page:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
