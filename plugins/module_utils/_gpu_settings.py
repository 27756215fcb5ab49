# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Settings of GPUs that belong to the host: persistence mode, MIG, compute mode and power limit.

The wanted settings are held against what each board is and allows before anything is changed. What a
change came to is decided by what the board tells afterwards: nvidia-smi ends with status 0 also where
it could not do all, and with another one (14) where only the infoROM is corrupted.

Locked clocks are no setting here: a driver that locks them does not tell to what
(NVML has nvmlDeviceSetGpuLockedClocks and nothing that reads it back).

``ask`` and ``apply`` go through a runner with a deadline; the rest is pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ._gpu_info import Gpu, TimedRunner, explain, hang

#: Fields of nvidia-smi (power in W) by name of ours. ``power.limit`` is the limit that was set; the one in force
#: (``enforced.power.limit``) can be lower, where the host's own management asks for that.
FIELDS = {
    "persistence_mode": "persistence_mode",
    "mig_mode": "mig.mode.current",
    "mig_pending": "mig.mode.pending",
    "compute_mode": "compute_mode",
    "power_limit_w": "power.limit",
    "power_default_w": "power.default_limit",
    "power_min_w": "power.min_limit",
    "power_max_w": "power.max_limit",
}
#: What nvidia-smi writes where a board does not have a setting.
_NOT_SUPPORTED = ("n/a", "not supported", "requested functionality has been deprecated")
#: Wanted compute mode to how nvidia-smi tells it and takes it.
COMPUTE_MODES = {"default": ("Default", "0"), "exclusive_process": ("Exclusive_Process", "3")}
_KERNEL_LOG = "look for NVRM in the kernel log (journalctl -kb)"


class SettingsError(Exception):
    """nvidia-smi could not be asked or told; the message is the reason with its remedy."""


@dataclass(frozen=True)
class Wanted:
    """The settings of all chosen GPUs.

    ``mig`` is ``off`` or ``leave``; ``compute_mode`` is ``default``, ``exclusive_process`` or
    ``leave``; ``power_limit`` is a number (W), ``default`` for the board's own, or ``leave``.
    ``gpus`` are indexes or UUIDs, none for all. ``prefix`` stands before the names of these
    options in messages.
    """

    persistence: bool = True
    mig: str = "off"
    compute_mode: str = "default"
    power_limit: str = "default"
    gpus: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Settings:
    """What is set on one GPU. Power is in W; None is what the board does not have.

    ``unreadable`` are the values that could not be read, by name, as nvidia-smi wrote them.
    """

    gpu: str
    index: int | None
    uuid: str
    persistence_mode: str | None = None
    mig_mode: str | None = None
    mig_pending: str | None = None
    compute_mode: str | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    power_min_w: float | None = None
    power_max_w: float | None = None
    unreadable: dict[str, str] = field(default_factory=dict)


class Target(NamedTuple):
    """One setting of one GPU: what is ``found`` and ``wanted``, in words, None where the board has no such thing.

    ``options`` are those of nvidia-smi that set it; ``sets`` is what ``Settings`` then has.
    """

    setting: str
    found: str | None
    wanted: str | None
    options: list[str]
    sets: dict[str, Any]

    @property
    def supported(self) -> bool:
        return self.found is not None and self.wanted is not None


class Change(NamedTuple):
    """One setting of one GPU that is to be changed, and the command that does it."""

    gpu: str
    uuid: str
    setting: str
    before: str
    after: str
    argv: list[str]


# Before anything is asked


def value_complaints(wanted: Wanted) -> list[str]:
    """What is wrong with the wanted settings on any board: a sentence each."""
    complaints = []
    prefix, limit = wanted.prefix, wanted.power_limit
    if limit not in ("default", "leave") and not (re.fullmatch(r"\d+(\.\d+)?", limit) and float(limit) > 0):
        complaints.append(f"{prefix}power_limit is {limit}: wanted a number of watts such as 350, or default, or leave")
    if not wanted.persistence:
        forgotten = {"compute_mode": ("default", "leave"), "power_limit": ("default", "leave")}
        complaints += [
            f"{prefix}persistence is false and {prefix}{setting} is {getattr(wanted, setting)}, which the driver "
            f"forgets as soon as nothing uses the GPU: set {prefix}persistence to true, or {prefix}{setting} to default"
            for setting, kept in forgotten.items()
            if getattr(wanted, setting) not in kept
        ]
    return complaints


def select(gpus: Sequence[Gpu], wanted: Wanted) -> tuple[list[Gpu], list[str]]:
    """The GPUs that the settings are for, and a sentence for each that is not there or cannot be set."""
    present = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
    known = {name for gpu in gpus for name in (str(gpu.index), gpu.uuid)}
    complaints = [
        f"{wanted.prefix}gpus names {name}, and the host has {present}: name its GPUs by index or UUID"
        for name in wanted.gpus
        if name not in known
    ]
    chosen = [gpu for gpu in gpus if not wanted.gpus or str(gpu.index) in wanted.gpus or gpu.uuid in wanted.gpus]
    for gpu in chosen:
        if gpu.lost or not gpu.uuid:
            complaints.append(
                f"{gpu} is {'lost' if gpu.lost else 'without a readable UUID'}, so {wanted.prefix}gpus cannot be set "
                f"with it: reboot the host, or name only the other GPUs in {wanted.prefix}gpus"
            )
    return chosen, complaints


# What is set


def command(gpus: Iterable[Gpu]) -> list[str]:
    """The command that asks for the settings of these GPUs, which have UUIDs."""
    ids = ",".join(gpu.uuid or "" for gpu in gpus)
    return [
        "nvidia-smi",
        f"--id={ids}",
        f"--query-gpu=uuid,{','.join(FIELDS.values())}",
        "--format=csv,noheader,nounits",
    ]


def parse(text: str, gpus: Iterable[Gpu]) -> list[Settings]:
    """The settings of each of ``gpus`` that the answer to ``command`` tells of; other lines do no harm."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(FIELDS) + 1:
            rows[cells[0]] = dict(zip(FIELDS, cells[1:]))
    return [_settings(gpu, gpu.uuid, rows[gpu.uuid]) for gpu in gpus if gpu.uuid and gpu.uuid in rows]


def _settings(gpu: Gpu, uuid: str, row: Mapping[str, str]) -> Settings:
    values: dict[str, Any] = {}
    unreadable = {}
    for name, said in row.items():
        if said.strip("[]").lower() in _NOT_SUPPORTED:
            continue
        if name.endswith("_w"):
            good = re.fullmatch(r"\d+(\.\d+)?", said)
        else:
            good = re.fullmatch(r"[A-Z][a-z]+(_[A-Z][a-z]+)?", said)
        if good:
            values[name] = float(said) if name.endswith("_w") else said
        else:
            unreadable[name] = said
    return Settings(gpu=str(gpu), index=gpu.index, uuid=uuid, unreadable=unreadable, **values)


def ask(gpus: Sequence[Gpu], run: TimedRunner, timeout: float) -> list[Settings]:
    """The settings of all of ``gpus``; raises SettingsError where nvidia-smi does not tell within ``timeout`` s."""
    status, text = _run(command(gpus), run, timeout)
    found = parse(text, gpus)
    if len(found) < len(gpus):
        missing = ", ".join(str(gpu) for gpu in gpus if gpu.uuid not in {settings.uuid for settings in found})
        raise SettingsError(f"nvidia-smi does not tell the settings of {missing}: {explain(status, text).sentence}")
    return found


def _run(argv: list[str], run: TimedRunner, timeout: float) -> tuple[int, str]:
    try:
        status, out, err = run(argv, timeout)
    except TimeoutError:
        raise SettingsError(f"{' '.join(argv)}: {hang(timeout).sentence}") from None
    except OSError as error:
        raise SettingsError(f"{' '.join(argv)} cannot be started ({error}): install the NVIDIA driver again") from None
    return status, f"{out}\n{err}"


# What is to change


def watts(value: float | None) -> str | None:
    """A power in words, to the digits that nvidia-smi tells."""
    return None if value is None else f"{value:.2f} W"


def targets(now: Settings, wanted: Wanted) -> list[Target]:
    """Each setting that is not to be left, in the order to set them."""
    found = []
    # The first, because a change of MIG resets some boards, which forget the rest.
    if wanted.mig != "leave":
        mig = now.mig_mode
        if mig and now.mig_pending and now.mig_pending != mig:
            mig = f"{mig}, {now.mig_pending} after a reset"
        found.append(Target("mig", mig, "Disabled", ["-mig", "0"], {"mig_mode": "Disabled", "mig_pending": "Disabled"}))
    persistence = "Enabled" if wanted.persistence else "Disabled"
    options = ["-pm", "1" if wanted.persistence else "0"]
    found.append(Target("persistence", now.persistence_mode, persistence, options, {"persistence_mode": persistence}))
    if wanted.compute_mode != "leave":
        mode, number = COMPUTE_MODES[wanted.compute_mode]
        found.append(Target("compute_mode", now.compute_mode, mode, ["-c", number], {"compute_mode": mode}))
    if wanted.power_limit != "leave":
        limit = now.power_default_w if wanted.power_limit == "default" else float(wanted.power_limit)
        options = [] if limit is None else ["-pl", f"{limit:g}"]
        sets = {"power_limit_w": limit}
        found.append(Target("power_limit", watts(now.power_limit_w), watts(limit), options, sets))
    return found


def _argv(now: Settings, target: Target) -> list[str]:
    return ["nvidia-smi", "-i", now.uuid, *target.options]


def plan(settings: Iterable[Settings], wanted: Wanted) -> list[Change]:
    """The changes that lead from what is set to what is wanted. What a board does not have is left out."""
    return [
        Change(now.gpu, now.uuid, target.setting, str(target.found), str(target.wanted), _argv(now, target))
        for now in settings
        for target in targets(now, wanted)
        if target.supported and target.found != target.wanted
    ]


def commands(settings: Iterable[Settings], wanted: Wanted) -> list[list[str]]:
    """The commands that set everything wanted on boards that have it, whatever is set now."""
    return [_argv(now, target) for now in settings for target in targets(now, wanted) if target.supported]


def notes(settings: Iterable[Settings], wanted: Wanted) -> list[str]:
    """A sentence for each wanted setting that a board does not have."""
    return [
        f"{now.gpu} does not have the setting, so {wanted.prefix}{target.setting} does nothing there"
        for now in settings
        for target in targets(now, wanted)
        if not target.supported
    ]


def complaints(settings: Iterable[Settings], wanted: Wanted, gpus: Iterable[Gpu]) -> list[str]:
    """Why the wanted settings cannot be had on these boards: a sentence each. Nothing may be changed then.

    ``gpus`` are the same GPUs with their processes.
    """
    users = {gpu.uuid: gpu.processes for gpu in gpus}
    found = []
    for now in settings:
        for target in targets(now, wanted):
            option = f"{wanted.prefix}{target.setting}"
            asked = getattr(wanted, target.setting)
            unreadable = [(name, said) for name, said in now.unreadable.items() if name in _read_for(target)]
            if unreadable:
                name, said = unreadable[0]
                found.append(
                    f"{option} cannot be checked on {now.gpu}, as nvidia-smi tells {said or 'nothing'} for "
                    f"{FIELDS[name]}: {_KERNEL_LOG}, and reboot the host where that stays"
                )
            elif not target.supported and asked != getattr(Wanted(), target.setting):
                found.append(
                    f"{option} is {_text(asked)}, and {now.gpu} does not have that setting: set {option} to "
                    f"{_text(getattr(Wanted(), target.setting))}, or leave this GPU out of {wanted.prefix}gpus"
                )
            elif target.setting == "power_limit" and asked != "default":
                found += _range_complaints(now, target.sets["power_limit_w"], option)
            elif target.setting == "mig" and target.supported and target.found != target.wanted and users[now.uuid]:
                names = ", ".join(f"{process.pid} ({process.name})" for process in users[now.uuid])
                found.append(
                    f"{option} is {asked}, and MIG of {now.gpu} is {target.found} while processes use the GPU: end "
                    f"{names}, and run this again"
                )
    return found


def _read_for(target: Target) -> tuple[str, ...]:
    """Names of the values that decide about a setting."""
    if target.setting == "power_limit":
        return ("power_limit_w", "power_default_w", "power_min_w", "power_max_w")
    return tuple(target.sets)


def _range_complaints(now: Settings, limit: float, option: str) -> list[str]:
    low, high = now.power_min_w, now.power_max_w
    if low is None or high is None or low <= limit <= high:
        return []
    return [
        f"{option} is {limit:g} W, and {now.gpu} takes {low:g} to {high:g} W: set {option} to a value in this range "
        "or to default"
    ]


def _text(value: Any) -> str:
    """An option's value as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# Changing


def bring(
    gpus: Sequence[Gpu],
    before: Sequence[Settings],
    wanted: Wanted,
    run: TimedRunner,
    timeout: float,
    tried: list[Change],
) -> tuple[list[Settings], list[str]]:
    """Change what differs. Returns the settings afterwards, and a sentence for each that did not take.

    ``tried`` gets each change before its command runs, which may take ``timeout`` seconds. Raises
    SettingsError where nvidia-smi hangs or tells nothing; what is in ``tried`` may have been done then.
    """
    said: dict[tuple[str, str], str] = {}
    now = list(before)
    for first in (True, False):
        # What a change of MIG made a board forget is found by comparing anew.
        changes = [change for change in plan(now, wanted) if (change.setting == "mig") == first]
        for change in changes:
            tried.append(change)
            _, text = _run(change.argv, run, timeout)
            said[change.uuid, change.setting] = " ".join(text.split())[:300]
        if changes:
            now = ask(gpus, run, timeout)
    return now, missed(before, now, wanted, said)


def missed(
    before: Iterable[Settings], after: Iterable[Settings], wanted: Wanted, said: Mapping[tuple[str, str], str]
) -> list[str]:
    """A sentence for each setting that the board had before and that is not as wanted after.

    ``said`` is what nvidia-smi wrote, by UUID and setting.
    """
    had = {(now.uuid, target.setting) for now in before for target in targets(now, wanted) if target.supported}
    found = []
    for now in after:
        for target in targets(now, wanted):
            if (now.uuid, target.setting) not in had or target.found == target.wanted:
                continue
            told = said.get((now.uuid, target.setting)) or "nothing"
            found.append(
                f"{wanted.prefix}{target.setting} did not take on {now.gpu}: wanted {target.wanted}, and it is "
                f"{target.found or 'not told'}; nvidia-smi wrote {told}: {_remedy(now, target, told)}"
            )
    return found


def _remedy(now: Settings, target: Target, told: str) -> str:
    if "permission" in told.lower():
        return "run this as root (become: true), and on the host itself where this is a container or a virtual machine"
    if target.setting == "mig" and now.mig_pending == "Disabled":
        return f"reboot the host, or with nothing on the GPU run nvidia-smi --gpu-reset -i {now.uuid}"
    if target.setting == "mig":
        return (
            f"end all that uses the GPU, monitoring too, destroy its instances (nvidia-smi mig -i {now.uuid} -dci, "
            "then -dgi), and run this again"
        )
    return _KERNEL_LOG


def predicted(settings: Iterable[Settings], wanted: Wanted) -> list[Settings]:
    """The settings that there will be where every change takes."""
    return [
        replace(
            now,
            **{
                name: value
                for target in targets(now, wanted)
                if target.supported
                for name, value in target.sets.items()
            },
        )
        for now in settings
    ]


def describe(settings: Iterable[Settings]) -> str:
    """The settings as lines for a diff."""
    return "".join(
        f"{now.gpu}: {name} {value or 'N/A'}\n"
        for now in settings
        for name, value in (
            ("persistence_mode", now.persistence_mode),
            ("mig_mode", now.mig_mode),
            ("mig_pending", now.mig_pending),
            ("compute_mode", now.compute_mode),
            ("power_limit", watts(now.power_limit_w)),
        )
    )
