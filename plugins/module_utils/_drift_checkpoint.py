# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""A checkpoint on disk, against the record of its verification.

Size, time and inode cost a stat a file. A file is only read within a budget: first those that
changed, then others, another part with each ``turn``. A file larger than the budget is read when
its turn comes. What keeps size and time and changes its inode (ctime) is read right after those
that changed, and told where the budget does not reach that far.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ._checkpoint import look, read_record, record_path
from ._checksum import Stopped
from ._drift_kinds import Report
from ._drift_release import Grouped, Reader, compare_owners, portion, walk


def look_at_checkpoint(
    path: str,
    root: str,
    exclude: Sequence[str],
    budget: int,
    turn: int,
    reader: Reader,
    report: Report,
    records: str,
    owner: int = 0,
) -> None:
    """``root`` is empty where the checkpoint is used in place, and so is others' to own. ``budget`` in bytes."""
    record = read_record(path, records)
    if record is None:
        why = "no record of it" if os.path.isdir(path) else "it is not there"
        report.add("model_not_recorded", path, why, "a verified checkpoint")
        return
    found = look(path, record.manifest, record, exclude)
    for name in found.absent:
        report.add("model_file_missing", f"{path}/{name}", "not there", "the file of the manifest")
    for name in found.foreign:
        report.add("model_file_added", f"{path}/{name}", "no manifest names it", "files of the manifest only")

    files = record.manifest.files
    suspect = []
    for name in found.suspect:
        size = os.stat(f"{path}/{name}").st_size
        if size != files[name].size:
            report.add("model_file_damaged", f"{path}/{name}", f"{size} bytes", f"{files[name].size} bytes")
        else:
            suspect.append(name)
    verified = os.stat(record_path(path, records)).st_mtime_ns
    touched = [name for name in found.good if os.stat(f"{path}/{name}").st_ctime_ns > verified]
    chosen: list[str] = []
    room = budget
    for name in [*suspect, *touched]:
        if files[name].size <= room:
            chosen.append(name)
            room -= files[name].size
    rest = {name: files[name].size for name in found.good if name not in touched}
    sound, damaged = _read(
        path, [*chosen, *portion(rest, room, turn)], {name: file.sha256 for name, file in files.items()}, reader, report
    )

    for name, has in damaged.items():
        report.add("model_file_damaged", f"{path}/{name}", f"SHA-256 {has[:12]}", files[name].sha256[:12])
    for name in suspect:
        if name not in sound and name not in damaged:
            report.add("model_file_changed", f"{path}/{name}", "another time or inode", "as it was verified")
        elif name in sound:
            report.add(
                "model_file_touched", f"{path}/{name}", "another time or inode, the content is right", "untouched"
            )
    for name in touched:
        if name in sound:
            report.add("model_file_touched", f"{path}/{name}", "another inode, the content is right", "untouched")
        elif name not in damaged:
            report.add(
                "model_file_unread", f"{path}/{name}", "its inode changed; it was not read", "untouched, or read"
            )
    report.facts["checkpoint"] = {"path": path, "files": len(files), "read": len(sound) + len(damaged)}
    if root:
        _root(path, root, report, owner)


def _read(
    path: str, names: Sequence[str], wanted: dict[str, str], reader: Reader, report: Report
) -> tuple[set[str], dict[str, str]]:
    """Which of the files have the wanted SHA-256, and what the others have."""
    sound: set[str] = set()
    damaged: dict[str, str] = {}
    for name in names:
        try:
            has = reader.sha256(f"{path}/{name}")
        except Stopped:
            left = len(names) - len(sound) - len(damaged)
            report.blind(
                f"{path}: {left} of {len(names)} files were not read within {reader.seconds:g} s: give it more time, "
                "or a smaller budget"
            )
            break
        if has == wanted[name]:
            sound.add(name)
        else:
            damaged[name] = has
    return sound, damaged


def _root(path: str, root: str, report: Report, owner: int) -> None:
    """The link to the revision in use, and whose all of it is."""
    link = f"{root}/current"
    target = os.readlink(link) if os.path.islink(link) else ""
    if target != os.path.basename(path):
        report.add("model_link", link, f"leads to {target or 'nothing'}", os.path.basename(path))
    grouped = Grouped(report, path, depth=1)
    compare_owners(grouped, dict(walk(path)), owner)
    grouped.tell()
