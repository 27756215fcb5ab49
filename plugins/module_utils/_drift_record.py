# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What the results of tasks in check mode say about a host: changed, failed, or not looked at.

Plain data in, plain data out. The callback nvl.vllm.drift feeds it, :mod:`_drift` judges what comes out.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: What the callback has noted in this run. In memory, as a disk can be full: each task runs in a fork of the process
#: that the callback is in, so the report has all of what was noted before it.
EVENTS: list[dict[str, Any]] = []
HIDDEN = "********"
#: Lines of a difference around a changed line, and at most in a finding.
CONTEXT = 2
LONGEST_DIFF = 80
#: Characters of a line or of a message that are kept.
LONGEST_LINE = 300
LONGEST_MESSAGE = 2000

_NAMES = r"(?:keys?|token|password|passwd|passphrase|secret|credentials?|authorization)"
#: NAME: value, NAME=value and "NAME": "value", where the name ends in one of the words.
_ASSIGNED = re.compile(rf"(?i)^(.*?[\w.-]*{_NAMES}[\"']?\s*[:=]\s*)(.*)$")
#: A word of a shell or a unit: quotes may stand within it, and escaped ones within those.
_OPTION = re.compile(rf"(?i)(--[\w-]*{_NAMES}(?:=|\s+))(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|\\.|\S)+")
_SCHEME = re.compile(r"(?i)\b(authorization[\"']?\s+[\"']?\w*|bearer|basic)(\s+)(?:\\.|[^\s\"']|[\"'](?=\w))+")
_USERINFO = re.compile(r"(://)[^/\s:@]*:[^/\s@]+@")
_PREFIXED = re.compile(r"\b(?:sk|hf|nvapi|gh[opsu]|glpat|xox[abp])[-_][A-Za-z0-9_-]{8,}")
_PEM_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]*(?:PRIVATE KEY|CERTIFICATE)")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]*(?:PRIVATE KEY|CERTIFICATE)")
#: A line of nothing but base64 or hexadecimal digits.
_ENCODED = re.compile(r"^\s*[A-Za-z0-9+/_-]{40,}={0,2}\s*$")
_BLOCK = re.compile(r"^[|>][+-]?\d*\s*$")


def masked(text: str) -> list[str]:
    """The lines of a text with all that looks like a secret replaced: values of keys, tokens and passwords, PEM blocks,
    credentials in addresses, long encoded values.

    A word too many is hidden rather than one too few. Always as many lines as the text has.
    """
    lines: list[str] = []
    pem = False
    #: Indentation of the name whose value is the block that follows.
    block: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        begins, ends = _PEM_BEGIN.search(line), _PEM_END.search(line)
        if pem or begins or (block is not None and line.strip()) or _ENCODED.match(line):
            lines.append(" " * indent + HIDDEN)
            pem = (pem or bool(begins)) and not ends
            continue
        assigned = _ASSIGNED.match(line)
        if assigned and (_BLOCK.match(assigned[2]) or not assigned[2].strip()):
            block = indent
            lines.append(line)
            continue
        lines.append(_masked_line(line, assigned))
    return lines


def _masked_line(line: str, assigned: re.Match[str] | None) -> str:
    if assigned:
        return assigned[1] + HIDDEN
    for pattern, by in ((_OPTION, rf"\1{HIDDEN}"), (_SCHEME, rf"\1\2{HIDDEN}"), (_USERINFO, rf"\1{HIDDEN}@")):
        line = pattern.sub(by, line)
    return _PREFIXED.sub(HIDDEN, line)


def hide(text: str) -> str:
    """A message with its secrets hidden, and not longer than is read."""
    found = "\n".join(masked(text)).strip()
    return found if len(found) <= LONGEST_MESSAGE else found[:LONGEST_MESSAGE] + " ..."


def unified(before: str, after: str) -> str:
    """The difference of two texts: compared as they are, shown with their secrets hidden."""
    old, new = before.splitlines(), after.splitlines()
    shown_old, shown_new = masked(before), masked(after)
    lines: list[str] = []
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT):
        first, last = group[0], group[-1]
        lines.append(f"@@ -{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]} @@")
        for tag, old_from, old_to, new_from, new_to in group:
            if tag == "equal":
                lines += [f" {line}" for line in shown_old[old_from:old_to]]
            else:
                lines += [f"-{line}" for line in shown_old[old_from:old_to]]
                lines += [f"+{line}" for line in shown_new[new_from:new_to]]
    if len(lines) > LONGEST_DIFF:
        lines = [*lines[:LONGEST_DIFF], f"... {len(lines) - LONGEST_DIFF} more lines"]
    return "\n".join(line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..." for line in lines)


def difference(diff: Any, path: str = "") -> str:
    """What a task's ``diff`` shows, as text, its secrets hidden. Of a file of environment variables nothing but its
    owner and mode, as every value there may be a secret."""
    parts: list[str] = []
    for one in _parts(diff):
        before, after = one.get("before"), one.get("after")
        if isinstance(before, Mapping) or isinstance(after, Mapping):
            parts.append(unified(_table(before), _table(after)))
        elif path.endswith(".env"):
            continue
        elif one.get("prepared"):
            parts.append("\n".join(masked(str(one["prepared"]))[:LONGEST_DIFF]))
        elif isinstance(before, str) or isinstance(after, str):
            parts.append(unified(_text(before), _text(after)))
        elif "dst_binary" in one or "src_binary" in one:
            parts.append("(binary file)")
    return "\n".join(part for part in parts if part)


def _parts(diff: Any) -> list[Mapping[str, Any]]:
    return [one for one in (diff if isinstance(diff, list) else [diff]) if isinstance(one, Mapping)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, indent=2, sort_keys=True)


def _table(value: Any) -> str:
    """A mapping such as the file module's, a line for each key; its path is told elsewhere."""
    if not isinstance(value, Mapping):
        return _text(value)
    return "\n".join(f"{key}: {_text(value[key])}" for key in sorted(value) if key != "path")


def short(action: str) -> str:
    """An action without the name of the collection that Ansible itself comes with."""
    for prefix in ("ansible.builtin.", "ansible.legacy."):
        if action.startswith(prefix):
            return action[len(prefix) :]
    return action


def starred(name: str) -> str:
    """A task's name with a star for each template in it, so that it is the same on all hosts."""
    return re.sub(r"\{\{.*?\}\}", "*", name)


def shape(diff: Any) -> str:
    """What kind of difference it is: ``missing``, ``attributes``, ``content``, or ``hidden`` where there is none."""
    parts = _parts(diff)
    if any(isinstance(one.get("before"), Mapping) and one["before"].get("state") == "absent" for one in parts):
        return "missing"
    texts = [one for one in parts if isinstance(one.get("after"), str)]
    # For a file that is not there Ansible compares with nothing.
    if any(one["after"] and not one.get("before") for one in texts):
        return "missing"
    if texts or any("dst_binary" in one or "prepared" in one for one in parts):
        return "content"
    return "attributes" if parts else "hidden"


def place(action: str, arguments: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The file, unit or package that a task is about; empty where nothing says it."""
    found = next((value for key in ("dest", "path") for value in (arguments.get(key), result.get(key)) if value), "")
    if found:
        path = str(found)
        # A copy into a directory: the file's own name is in the source.
        return path + str(arguments.get("src", "")).rpartition("/")[2] if path.endswith("/") else path
    for one in _parts(result.get("diff")):
        header = one.get("before_header") or one.get("after_header")
        if header:
            return str(header)
    names = arguments.get("name") or arguments.get("names") or ""
    return ", ".join(str(name) for name in names) if isinstance(names, list) else str(names)


def blind_reason(action: str, result: Mapping[str, Any], conditions: Iterable[Any], aliases: Iterable[str]) -> str:
    """Why a skipped task was not looked at because of check mode; empty where it was skipped for another reason.

    ``conditions`` are those of the task, for a result that is hidden; ``aliases``: variables that stand for check mode.
    """
    names = "|".join(["ansible_check_mode", *map(re.escape, aliases)])
    mode = re.compile(rf"\b(?:{names})\b")
    if "false_condition" in result:
        condition = str(result["false_condition"])
        return f"its condition is not met in check mode ({condition})" if mode.search(condition) else ""
    if "censored" in result:
        hidden = [str(condition) for condition in conditions if mode.search(str(condition))]
        return f"its result is hidden, and a condition names check mode ({hidden[0]})" if hidden else ""
    reason = str(result.get("skipped_reason") or result.get("skip_reason") or result.get("msg") or "")
    # Nothing to do in any mode: no items, a verbosity that nobody asked for, a file that is there already, a meta task.
    if reason == "No items in the list" or reason.startswith(("Verbosity", "skipped, since")) or action == "meta":
        return ""
    return f"{action} does nothing in check mode"


def changes(
    host: str, role: str, task: str, action: str, arguments: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The events that follow from a task, or an item of its loop, that would change something."""
    event = {"event": "changed", "host": host, "role": role, "task": task, "action": action}
    if action == "nvl.vllm.units":
        for unit, (found, wanted) in _units(result.get("diff")).items():
            yield {**event, "where": unit, "found": ", ".join(found), "wanted": ", ".join(wanted)}
        return
    where = place(action, arguments, result)
    event.update(where=where, shape=shape(result.get("diff")), diff=difference(result.get("diff"), where))
    if action in ("systemd_service", "systemd", "service"):
        event.update(_service(arguments, result))
    yield event


def _units(diff: Any) -> dict[str, tuple[list[str], list[str]]]:
    """What is found and what is wanted of each unit, from lines that begin with the unit's name."""
    units: dict[str, tuple[list[str], list[str]]] = {}
    for one in _parts(diff):
        for side, key in enumerate(("before", "after")):
            for line in _text(one.get(key)).splitlines():
                unit, _, told = line.partition(" ")
                units.setdefault(unit, ([], []))[side].append(told)
    return units


def _service(arguments: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    status = result.get("status")
    status = status if isinstance(status, Mapping) else {}
    found = [str(status[key]) for key in ("ActiveState", "UnitFileState") if status.get(key)]
    wanted = [str(arguments["state"])] if arguments.get("state") else []
    if arguments.get("enabled") is not None:
        wanted.append("enabled" if arguments["enabled"] else "disabled")
    return {"found": ", ".join(found) or "another state", "wanted": ", ".join(wanted) or "as declared"}


def failure(result: Mapping[str, Any]) -> str:
    """Why a task failed or a host was not reached, in one message."""
    message = result.get("msg")
    if message == "One or more items failed":
        results: Sequence[Any] = result.get("results") or ()
        told = [str(one["msg"]) for one in results if isinstance(one, Mapping) and one.get("failed") and one.get("msg")]
        message = "; ".join(told) or message
    if isinstance(message, list):
        message = "; ".join(map(str, message))
    if message:
        # Ansible's own words in front of the reason.
        message = re.sub(r"^Task failed: (?:(?:Action|Module) failed: )?", "", str(message))
    return hide(str(message or result.get("censored") or result.get("reason") or "no reason was given"))
