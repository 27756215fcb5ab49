# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a host's NVIDIA GPUs are and how they are, from nvidia-smi, the kernel log and ``/proc``.

``read`` asks; everything it asks goes through one runner with a deadline for each call, because
nvidia-smi waits for ever on a driver that hangs. The rest is text in, values out, and goes by what
is there: names of fields differ between driver branches 535 to 610. What a GPU does not tell
(``[N/A]``, ``ERR!``, ``Unknown Error``) is None and an entry in its ``problems``, never an error.
``_gpu_health`` judges what is found here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from xml.etree import ElementTree

#: Runs a command with a deadline (s) and returns exit status, standard output, standard error. Raises TimeoutError
#: where the command takes longer, and OSError where it cannot be started.
TimedRunner = Callable[[list[str], float], "tuple[int, str, str]"]

ASK_ALL = ["nvidia-smi", "-q", "-x"]
#: What the XML does not hold. Of GPUs that share a host with a lost one only this tells the index.
ASK_CSV = ["nvidia-smi", "--query-gpu=index,pci.bus_id,compute_cap", "--format=csv,noheader,nounits"]
ASK_TOPOLOGY = ["nvidia-smi", "topo", "-m"]
#: Files of the driver are read by a process of their own: a driver that hangs holds up their readers too.
ASK_MODULE = ["cat", "/proc/driver/nvidia/version"]
ASK_ADDRESSES = ["ls", "/proc/driver/nvidia/gpus"]
#: The journal first: the kernel's own ring buffer forgets, on a host that logs much within days.
KERNEL_LOGS = {
    "journal": ["journalctl", "--dmesg", "--boot", "--quiet", "--no-pager", "--output=short-iso"],
    "dmesg": ["dmesg", "--time-format", "iso"],
}

_ADDRESS = r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}(?:\.[0-7])?"
_LOST = re.compile(rf"device handle for GPU\s*(?:(\d+):\s*)?({_ADDRESS}):\s*(.+)")
_LOST_BY_INDEX = re.compile(r"device handle for GPU\s*(\d+):\s*(.+)")
_GPU = re.compile(r'<gpu id="([^"]*)">(.*?)</gpu>', re.DOTALL)
_XID = re.compile(rf"NVRM: Xid \((?:PCI:)?({_ADDRESS})\): (\d+),? *(.*)")
_OFF_THE_BUS = re.compile(rf"NVRM: GPU (?:at )?(?:PCI:)?({_ADDRESS}): (GPU has fallen off the bus.*)")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\S+")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
#: What nvidia-smi writes instead of a value where it failed, other than where there is no such value (N/A).
_FAILURES = ("err!", "unknown error", "lost", "inaccessible", "insufficient permissions", "fallen off")


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a GPU. ``uid`` is None where /proc does not show the process."""

    pid: int
    name: str
    mib: int | None
    uid: int | None = None


@dataclass(frozen=True)
class Xid:
    """An error of one code that the driver has logged for a GPU since boot: how often, and the last one."""

    code: int
    count: int
    last_time: str
    last_message: str


@dataclass(frozen=True)
class Gpu:
    """One GPU. None is what could not be told.

    Memory is in MiB, power in W, clocks in MHz, the temperature in degrees Celsius. Of a ``lost``
    GPU only the PCI address (``00000000:AD:00.0``), and at times the index, is known.
    ``links`` is the way to each other GPU as ``nvidia-smi topo -m`` names it, by index.
    """

    pci: str
    index: int | None = None
    uuid: str | None = None
    name: str | None = None
    lost: bool = False
    total_mib: int | None = None
    reserved_mib: int | None = None
    used_mib: int | None = None
    free_mib: int | None = None
    processes: list[Process] = field(default_factory=list)
    compute_capability: str | None = None
    ecc_mode: str | None = None
    ecc_uncorrected_volatile: int | None = None
    ecc_uncorrected_aggregate: int | None = None
    remapped_correctable: int | None = None
    remapped_uncorrectable: int | None = None
    remap_pending: bool | None = None
    remap_failure: bool | None = None
    recovery_action: str | None = None
    mig_mode: str | None = None
    mig_pending: str | None = None
    persistence_mode: str | None = None
    power_cap_w: float | None = None
    power_default_w: float | None = None
    power_max_w: float | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    throttle_reasons: list[str] | None = None
    temperature_c: int | None = None
    xids: list[Xid] | None = None
    links: dict[str, str] | None = None
    nvlink_peers: list[int] | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"GPU {self.pci}" if self.index is None else f"GPU {self.index} ({self.pci})"


@dataclass(frozen=True)
class Host:
    """What is the same for all GPUs. ``kernel_log`` is ``journal``, ``dmesg``, or empty where none can be read."""

    driver_version: str | None = None
    cuda_version: str | None = None
    kernel_module_version: str | None = None
    topology: dict[str, dict[str, str]] | None = None
    kernel_log: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """All that was found. Where no GPU could be asked, ``problem`` says why and ``cause`` names it in one word."""

    gpus: list[Gpu]
    host: Host
    problem: str = ""
    cause: str = ""


class Failure(NamedTuple):
    """Why nvidia-smi failed: a word for rules, a sentence with the remedy for people."""

    cause: str
    sentence: str


def pci_key(address: str) -> str:
    """One form of a PCI address: nvidia-smi writes 00000000:AD:00.0, the kernel log 0000:ad:00."""
    domain, _, rest = address.strip().partition(":")
    return f"{int(domain, 16):04x}:{rest.partition('.')[0].lower()}"


def pci_address(address: str) -> str:
    """A PCI address as nvidia-smi writes it in its XML, also from its messages and from the kernel log."""
    domain, _, rest = address.strip().partition(":")
    return f"{int(domain, 16):08X}:{rest.upper()}" + ("" if "." in rest else ".0")


# Failures


_CAUSES = {
    2: (
        "usage",
        "nvidia-smi does not know what it was asked: install a driver of branch 535 or newer",
    ),
    3: ("unsupported", "a GPU does not support what nvidia-smi was asked: use one of a supported kind"),
    4: ("permission", "the user may not ask the NVIDIA driver: run this as root (become: true)"),
    6: (
        "no_devices",
        "nvidia-smi finds no GPU: lspci -d 10de: shows whether the board is there, and the kernel log "
        "(journalctl -kb, lines with NVRM) why the driver does not take it",
    ),
    8: ("power_cable", "the power cables of a GPU are not attached properly: have them attached"),
    9: (
        "not_loaded",
        "the NVIDIA driver is not loaded: run modprobe nvidia; where that fails, build the module for the running "
        "kernel (dkms autoinstall), or reboot into the kernel that it was built for",
    ),
    10: ("interrupt", "the kernel has an interrupt problem with a GPU: look for NVRM in the kernel log, and reboot"),
    12: (
        "nvml_missing",
        "the library libnvidia-ml.so cannot be found or loaded: install the NVIDIA driver's libraries of the "
        "kernel module's version, then run ldconfig",
    ),
    13: ("nvml_old", "the library libnvidia-ml.so is older than nvidia-smi: install both from the same driver"),
    14: ("inforom", "the infoROM of a GPU is corrupted: reset the GPU, and have the board replaced where that stays"),
    15: (
        "lost",
        "a GPU has fallen off the bus or is inaccessible: reboot the host; where it comes back, check its seat and "
        "power, and have the board replaced",
    ),
    18: (
        "mismatch",
        "the NVIDIA driver's kernel module and libraries are of different versions{versions}: reboot the host, or stop "
        "all that uses GPUs and load the module again (rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia, then "
        "modprobe nvidia)",
    ),
    255: ("driver", "the NVIDIA driver had an internal error: look for NVRM in the kernel log, and reboot the host"),
}
#: Texts decide before exit statuses do: the same failure has had different ones (a lost GPU 6 and 15).
_TEXTS = (
    ("driver/library version mismatch", 18),
    ("couldn't communicate with the nvidia driver", 9),
    ("couldn't find libnvidia-ml", 12),
    ("unable to determine the device handle", 15),
    ("no devices were found", 6),
    ("insufficient permissions", 4),
    ("not a valid field to query", 2),
)
MISSING = Failure("missing", "nvidia-smi is not there: install the NVIDIA driver")


def hang(seconds: float) -> Failure:
    """A call that did not answer within ``seconds``."""
    return Failure(
        "hang",
        f"nvidia-smi did not answer within {seconds:g} s, so the NVIDIA driver hangs: look for Xid in the kernel log "
        "(journalctl -kb), and reboot the host, as nothing else ends a process that waits in the driver",
    )


def explain(status: int, text: str, module_version: str | None = None) -> Failure:
    """What it means that nvidia-smi ended with ``status`` (not 0) and said ``text``.

    ``module_version`` is that of the loaded kernel module, where it is known.
    """
    lower = text.lower()
    known = next((code for words, code in _TEXTS if words in lower), status)
    if known not in _CAUSES:
        said = _one_line(text)[:300] or "nothing"
        how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        return Failure("unknown", f"nvidia-smi {how} and said {said}: look for NVRM in the kernel log")
    cause, sentence = _CAUSES[known]
    library = re.search(r"NVML library version: *([\d.]+)", text)
    versions = [f"libraries {library.group(1)}"] if library else []
    versions += [f"kernel module {module_version}"] if module_version else []
    return Failure(cause, sentence.replace("{versions}", f" ({', '.join(versions)})" if versions else ""))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def lost_gpus(text: str) -> list[Gpu]:
    """The GPUs that nvidia-smi says it cannot reach, from all that it has written."""
    found: dict[str, Gpu] = {}
    for line in text.splitlines():
        match = _LOST.search(line)
        if match:
            index, address, reason = match.groups()
            number = int(index) if index else None
            found[address] = Gpu(pci_address(address), number, lost=True, problems=[_one_line(reason)])
            continue
        match = _LOST_BY_INDEX.search(line)
        if match:
            found[f"#{match.group(1)}"] = Gpu(
                "address unknown", int(match.group(1)), lost=True, problems=[_one_line(match.group(2))]
            )
    return list(found.values())


# nvidia-smi -q -x


class _Reader:
    """Values of one ``<gpu>`` element. What cannot be read is None and noted, once for each element."""

    def __init__(self, element: ElementTree.Element) -> None:
        self.element = element
        self.problems: list[str] = []
        self.lost = False

    def note(self, path: str, said: str) -> None:
        entry = f"{path} is {said.strip('[]') or 'empty'}"
        if entry not in self.problems:
            self.problems.append(entry)
        self.lost = self.lost or "gpu is lost" in said.lower()

    def text(self, *paths: str) -> tuple[str, str]:
        """Path and text of the first element that is there, both empty where none is."""
        for path in paths:
            found = self.element.find(path)
            if found is not None:
                return path, (found.text or "").strip()
            # Where a whole group is not there, nvidia-smi writes N/A in place of its elements.
            group = self.element.find(path.rpartition("/")[0] or path)
            if group is not None and not len(group) and (group.text or "").strip():
                self.note(group.tag, (group.text or "").strip())
        return "", ""

    def number(self, *paths: str) -> float | None:
        path, said = self.text(*paths)
        match = _NUMBER.match(said)
        if path and not match:
            self.note(path, said)
        return float(match.group()) if match else None

    def whole(self, *paths: str) -> int | None:
        value = self.number(*paths)
        return None if value is None else int(value)

    def word(self, *paths: str) -> str | None:
        """A value in words, such as a name."""
        path, said = self.text(*paths)
        if path and (not said or said.strip("[]") in ("N/A", "Not Supported") or is_failure(said)):
            self.note(path, said)
            return None
        return said or None

    def choice(self, choices: tuple[str, ...], *paths: str) -> str | None:
        path, said = self.text(*paths)
        if path and said not in choices:
            self.note(path, said)
        return said if said in choices else None

    def switch(self, path: str) -> str | None:
        return self.choice(("Enabled", "Disabled"), path)

    def yes(self, path: str) -> bool | None:
        said = self.choice(("Yes", "No"), path)
        return None if said is None else said == "Yes"

    def uncorrected(self, path: str) -> int | None:
        """Sum of uncorrected ECC errors. Drivers before 545 count SRAM errors in one element, later ones in two."""
        group = self.element.find(path)
        if group is None:
            return None
        counts = [(child.text or "").strip() for child in group if "uncorrectable" in child.tag]
        numbers = [int(count) for count in counts if count.isdigit()]
        if not numbers:
            self.note(path, counts[0] if counts else (group.text or "").strip())
        return sum(numbers) if numbers else None

    def throttle_reasons(self) -> list[str] | None:
        """Names of the active reasons without their prefix: throttle reasons were renamed to event reasons."""
        for tag in ("clocks_event_reasons", "clocks_throttle_reasons"):
            group = self.element.find(tag)
            if group is None:
                continue
            if not len(group):
                self.note(tag, (group.text or "").strip())
                return None
            for child in group:
                if (child.text or "").strip() not in ("Active", "Not Active"):
                    self.note(f"{tag}/{child.tag}", (child.text or "").strip())
            return [
                re.sub(r"^clocks_(event|throttle)_reason_", "", child.tag)
                for child in group
                if (child.text or "").strip() == "Active"
            ]
        return None

    def processes(self, uid_of: Callable[[int], int | None]) -> list[Process]:
        found = []
        for entry in self.element.iterfind("processes/process_info"):
            pid, name = (entry.findtext("pid") or "").strip(), (entry.findtext("process_name") or "").strip()
            used = _NUMBER.match((entry.findtext("used_memory") or "").strip())
            if pid.isdigit():
                found.append(Process(int(pid), name, int(float(used.group())) if used else None, uid_of(int(pid))))
        return found


def is_failure(said: str) -> bool:
    """Whether a text in place of a value tells of a failure, other than N/A, which tells of nothing to tell."""
    return any(word in said.lower() for word in _FAILURES)


def _element(address: str, body: str) -> tuple[ElementTree.Element | None, list[str]]:
    """The element of one GPU, without its processes where a process name breaks the XML."""
    problems: list[str] = []
    for attempt in (body, re.sub(r"<processes>.*</processes>", "", body, flags=re.DOTALL)):
        try:
            return ElementTree.fromstring(f"<gpu>{attempt}</gpu>"), problems
        except ElementTree.ParseError:
            problems = ["processes cannot be read: a process name breaks nvidia-smi's XML"]
    return None, [f"nvidia-smi's XML of {address} cannot be read"]


def parse_gpu(address: str, body: str, uid_of: Callable[[int], int | None] = lambda pid: None) -> Gpu:
    """One GPU from the inner text of its ``<gpu>`` element."""
    element, problems = _element(address, body)
    if element is None:
        return Gpu(address, problems=problems)
    read = _Reader(element)
    gpu = Gpu(
        pci=address,
        uuid=read.word("uuid"),
        name=read.word("product_name"),
        total_mib=read.whole("fb_memory_usage/total"),
        reserved_mib=read.whole("fb_memory_usage/reserved"),
        used_mib=read.whole("fb_memory_usage/used"),
        free_mib=read.whole("fb_memory_usage/free"),
        processes=read.processes(uid_of),
        ecc_mode=read.switch("ecc_mode/current_ecc"),
        ecc_uncorrected_volatile=read.uncorrected("ecc_errors/volatile"),
        ecc_uncorrected_aggregate=read.uncorrected("ecc_errors/aggregate"),
        remapped_correctable=read.whole("remapped_rows/remapped_row_corr"),
        remapped_uncorrectable=read.whole("remapped_rows/remapped_row_unc"),
        remap_pending=read.yes("remapped_rows/remapped_row_pending"),
        remap_failure=read.yes("remapped_rows/remapped_row_failure"),
        recovery_action=_recovery_action(read),
        mig_mode=read.switch("mig_mode/current_mig"),
        mig_pending=read.switch("mig_mode/pending_mig"),
        persistence_mode=read.switch("persistence_mode"),
        power_cap_w=read.number(
            "gpu_power_readings/current_power_limit",
            "gpu_power_readings/power_limit",
            "power_readings/enforced_power_limit",
            "power_readings/power_limit",
        ),
        power_default_w=read.number("gpu_power_readings/default_power_limit", "power_readings/default_power_limit"),
        power_max_w=read.number("gpu_power_readings/max_power_limit", "power_readings/max_power_limit"),
        sm_clock_mhz=read.whole("clocks/sm_clock"),
        sm_clock_max_mhz=read.whole("max_clocks/sm_clock"),
        throttle_reasons=read.throttle_reasons(),
        temperature_c=read.whole("temperature/gpu_temp"),
    )
    # A lost GPU has the same answer to everything; once is enough.
    return replace(gpu, lost=read.lost, problems=["GPU is lost"] if read.lost else problems + read.problems)


def _recovery_action(read: _Reader) -> str | None:
    """What the driver itself wants done: None, Reset, Reboot, Drain P2P or Drain and Reset."""
    action = read.word("gpu_recovery_action")
    if action is None and read.element.findtext("gpu_reset_status/reset_required", "").strip() == "Yes":
        return "Reset"  # how drivers before 560 said it
    return action


def parse_all(text: str, uid_of: Callable[[int], int | None] = lambda pid: None) -> list[Gpu]:
    """The GPUs of ``nvidia-smi -q -x``. Lines around the XML, and an end that is missing, do no harm.

    The XML has no index: it is the position, where no GPU is left out.
    """
    gpus = [parse_gpu(address, body, uid_of) for address, body in _GPU.findall(text)]
    if f"<attached_gpus>{len(gpus)}</attached_gpus>" in text:
        gpus = [replace(gpu, index=position) for position, gpu in enumerate(gpus)]
    for address in re.findall(r'<gpu id="([^"]*)">', text)[len(gpus) :]:
        gpus.append(Gpu(address, problems=["nvidia-smi's answer breaks off within this GPU: Unknown Error"]))
    return gpus


def parse_host(text: str) -> tuple[str | None, str | None]:
    """Versions of driver and CUDA in ``nvidia-smi -q -x``. Branch 610 renames both and may drop the old names."""

    def first(*tags: str) -> str | None:
        for tag in tags:
            match = re.search(rf"<{tag}>\s*([\d.]+)\s*</{tag}>", text)
            if match:
                return match.group(1)
        return None

    return first("driver_version", "kmd_version"), first("cuda_version", "cuda_umd_version")


# The other sources


def parse_csv(text: str) -> dict[str, tuple[int, str | None]]:
    """Index and compute capability by PCI key, from the answer to ``ASK_CSV``."""
    found: dict[str, tuple[int, str | None]] = {}
    for line in text.splitlines():
        match = re.match(rf"\s*(\d+), *({_ADDRESS}), *(.*)", line)
        if match:
            index, address, capability = match.groups()
            found[pci_key(address)] = (int(index), capability if re.fullmatch(r"\d+\.\d+", capability) else None)
    return found


def parse_topology(text: str) -> dict[str, dict[str, str]]:
    """Connection of each GPU to each other one, from ``nvidia-smi topo -m``: {"GPU0": {"GPU1": "NV12"}}."""
    columns: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        words = line.split()
        if not words or not re.fullmatch(r"GPU\d+", words[0]):
            continue
        if not columns:
            # Up to the columns of affinity: GPUs, then network cards.
            columns = words[: next((n for n, word in enumerate(words) if word in ("CPU", "NUMA")), len(words))]
        else:
            cells = dict(zip(columns, words[1:]))  # what is left over is the affinity
            found[words[0]] = {
                name: link for name, link in cells.items() if re.fullmatch(r"GPU\d+", name) and link != "X"
            }
    return found


def parse_module_version(text: str) -> str | None:
    """Version of the loaded kernel module, from ``/proc/driver/nvidia/version``."""
    match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return match.group(1) if match else None


def parse_xids(log: str) -> dict[str, list[Xid]]:
    """Xids by PCI key, each code with its number of lines and its last one, from a kernel log."""
    found: dict[str, dict[int, Xid]] = {}
    for line in log.splitlines():
        match = _XID.search(line)
        if not match:
            continue
        codes = found.setdefault(pci_key(match.group(1)), {})
        code = int(match.group(2))
        time = _TIME.search(line[: match.start()])
        count = codes[code].count + 1 if code in codes else 1
        codes[code] = Xid(code, count, time.group() if time else "", match.group(3).strip())
    # A GPU can be gone without its Xid 79, as another line tells.
    for line in log.splitlines():
        match = _OFF_THE_BUS.search(line)
        if match and 79 not in found.setdefault(pci_key(match.group(1)), {}):
            time = _TIME.search(line[: match.start()])
            found[pci_key(match.group(1))][79] = Xid(79, 1, time.group() if time else "", match.group(2))
    return {address: sorted(codes.values(), key=lambda xid: xid.code) for address, codes in found.items()}


# Loading


#: Processes that outlived their SIGKILL. They are kept, because forgetting one makes Python warn about it.
_STUCK: list[subprocess.Popen[str]] = []


def run_command(argv: list[str], timeout: float) -> tuple[int, str, str]:
    """Run a command and return exit status, standard output, standard error.

    Raises TimeoutError after ``timeout`` seconds, and OSError where the command cannot be started.
    A process that waits inside the driver does not die of SIGKILL, so nobody waits for its end.
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):  # it ended just now
            os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # the usual case: it dies at once, and must not stay as a zombie
        if process.returncode is None:
            _STUCK.append(process)
        raise TimeoutError(f"{argv[0]} did not answer within {timeout:g} s") from None
    return process.returncode, out, err


def owner_of(pid: int, proc: str = "/proc") -> int | None:
    """The user of a process, or None where it is not shown here (ended, or of another container)."""
    try:
        return os.stat(f"{proc}/{pid}").st_uid
    except OSError:
        return None


class _Loader:
    def __init__(self, run: TimedRunner, timeout: float, uid_of: Callable[[int], int | None]) -> None:
        self.run = run
        self.timeout = timeout
        self.uid_of = uid_of
        self.problems: list[str] = []
        self.hangs = False

    def quietly(self, argv: list[str]) -> str:
        """Standard output, or nothing where the command fails: for what may be missing."""
        try:
            status, out, _ = self.run(argv, self.timeout)
        except OSError:  # TimeoutError is one
            return ""
        return out if status == 0 else ""

    def ask(self, argv: list[str]) -> str:
        """All that nvidia-smi writes. That it fails, beside what it writes, is noted."""
        if self.hangs:
            return ""
        try:
            status, out, err = self.run(argv, self.timeout)
        except TimeoutError:
            self.hangs = True
            self.problems.append(f"{' '.join(argv)}: {hang(self.timeout).sentence}")
            return ""
        except OSError as error:
            self.problems.append(f"{' '.join(argv)}: {error}")
            return ""
        text = f"{out}\n{err}"
        # That a GPU is lost, or its infoROM corrupted (14), the answer to the first question has told.
        if status not in (0, 14) and not lost_gpus(text):
            self.problems.append(f"{' '.join(argv)}: {explain(status, text).sentence}")
        return text

    def xids(self) -> tuple[str, dict[str, list[Xid]]]:
        for name, argv in KERNEL_LOGS.items():
            log = self.quietly(argv)
            # Without the right to read it, or in a container, the journal is empty and no error.
            if log.strip() and not log.startswith("-- No entries"):
                return name, parse_xids(log)
        self.problems.append(
            "neither journalctl nor dmesg shows the kernel log, so Xids are not known: run this as root"
        )
        return "", {}

    def by_address(self, known: Iterable[str]) -> str:
        """What nvidia-smi writes about the GPUs that the driver has besides ``known`` ones, asked one by one.

        Some versions of nvidia-smi end at the first lost GPU and leave out the healthy ones.
        """
        skip = {pci_key(address) for address in known}
        addresses = re.findall(rf"^{_ADDRESS}$", self.quietly(ASK_ADDRESSES), re.MULTILINE)
        return "\n".join(self.ask([*ASK_ALL, f"--id={each}"]) for each in addresses if pci_key(each) not in skip)

    def load(self) -> Facts:
        module = parse_module_version(self.quietly(ASK_MODULE))
        failure, text = None, ""
        try:
            status, out, err = self.run(ASK_ALL, self.timeout)
            text = f"{out}\n{err}"
        except FileNotFoundError:
            failure = MISSING
        except TimeoutError:
            failure = hang(self.timeout)
        except OSError as error:
            failure = Failure("missing", f"nvidia-smi cannot be started ({error}): install the NVIDIA driver again")
        gpus, lost = parse_all(text, self.uid_of), lost_gpus(text)
        if lost:
            alone = self.by_address([gpu.pci for gpu in gpus] + [gpu.pci for gpu in lost if ":" in gpu.pci])
            gpus += [replace(gpu, index=None) for gpu in parse_all(alone, self.uid_of)]  # its position is no index
            text += alone
        if failure is None and not gpus:
            failure = explain(status or 6, text, module)
        elif failure is None and status != 0 and not lost:
            self.problems.append(explain(status, text, module).sentence)
        gpus = merge(gpus, lost)
        well = [gpu.pci for gpu in gpus if not gpu.lost]
        if well:
            which = [f"--id={','.join(well)}"] if lost else []
            gpus = with_indexes(gpus, parse_csv(self.ask([*ASK_CSV, *which])))
            topology = parse_topology(self.ask(ASK_TOPOLOGY)) or None
        else:
            topology = None
        driver, cuda = parse_host(text)
        kernel_log, xids = self.xids()
        if not gpus:
            # Nobody tells which GPUs there are but the log of their errors.
            gpus = [
                Gpu(pci_address(address), lost=any(xid.code == 79 for xid in codes)) for address, codes in xids.items()
            ]
        gpus = [with_links(gpu, topology) for gpu in gpus]
        if kernel_log:
            gpus = [replace(gpu, xids=xids.get(pci_key(gpu.pci), []) if ":" in gpu.pci else None) for gpu in gpus]
        gpus = [with_inforom(gpu, text) for gpu in gpus]
        return Facts(
            gpus=sorted(gpus, key=lambda gpu: (gpu.index is None, gpu.index, gpu.pci)),
            host=Host(driver, cuda, module, topology, kernel_log, self.problems),
            problem=failure.sentence if failure else "",
            cause=failure.cause if failure else "",
        )


def merge(gpus: list[Gpu], lost: list[Gpu]) -> list[Gpu]:
    """The GPUs that answered, and the lost ones; one that did both is lost."""
    by_key = {pci_key(gpu.pci): gpu for gpu in gpus}
    rest = []
    for gpu in lost:
        same = by_key.get(pci_key(gpu.pci)) if ":" in gpu.pci else None
        if same is None:
            rest.append(gpu)
        else:
            by_key[pci_key(gpu.pci)] = replace(same, lost=True, problems=gpu.problems + same.problems)
    return list(by_key.values()) + rest


def with_indexes(gpus: list[Gpu], csv: Mapping[str, tuple[int, str | None]]) -> list[Gpu]:
    """Index and compute capability added, where ``csv`` has them."""
    result = []
    for gpu in gpus:
        index, capability = csv.get(pci_key(gpu.pci) if ":" in gpu.pci else "", (gpu.index, None))
        problems = gpu.problems if capability or gpu.lost else [*gpu.problems, "compute_cap is not told"]
        result.append(replace(gpu, index=index, compute_capability=capability, problems=problems))
    return result


def with_links(gpu: Gpu, topology: Mapping[str, dict[str, str]] | None) -> Gpu:
    """The connections of one GPU added, by index of the other one."""
    row = (topology or {}).get(f"GPU{gpu.index}")
    if row is None:
        return gpu
    links = {name[len("GPU") :]: link for name, link in row.items()}
    peers = sorted(int(index) for index, link in links.items() if re.fullmatch(r"NV\d+", link))
    return replace(gpu, links=links, nvlink_peers=peers)


def with_inforom(gpu: Gpu, text: str) -> Gpu:
    """The warning of a corrupted infoROM, which stands outside of the XML, added to its GPU's problems."""
    warned = re.findall(rf"infoROM is corrupted at gpu ({_ADDRESS})", text, re.IGNORECASE)
    if ":" in gpu.pci and pci_key(gpu.pci) in map(pci_key, warned):
        return replace(gpu, problems=[*gpu.problems, "infoROM is corrupted"])
    return gpu


def read(
    run: TimedRunner = run_command,
    timeout: float = 20.0,
    uid_of: Callable[[int], int | None] = owner_of,
) -> Facts:
    """Everything about the host's GPUs; raises nothing that nvidia-smi does.

    Each call may take ``timeout`` seconds. After one that hangs nvidia-smi is not asked again.
    """
    return _Loader(run, timeout, uid_of).load()


def as_dict(value: Any) -> Any:
    """Facts as dictionaries and lists, for a module to return."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_dict(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, list):
        return [as_dict(item) for item in value]
    return value
