# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What a host has of NVIDIA's driver, whether another one may be installed, and how that one comes into use.

``read`` asks the host and changes nothing; every command has a deadline. ``refusals``, ``activation``
and ``pending`` judge what it found, without the host.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import NamedTuple
from urllib.parse import urlsplit

from ._gpu_info import TimedRunner, run_command
from ._host import _links, read_text, unit_of

#: Names of GPUs as nvidia-smi writes them, by PCI device. Source: "Compatible GPUs" of the README of
#: github.com/NVIDIA/open-gpu-kernel-modules, as of 2026-03.
GPU_NAMES = {
    "1eb8": "Tesla T4",
    "20b0": "NVIDIA A100-SXM4-40GB",
    "20b2": "NVIDIA A100-SXM4-80GB",
    "20b5": "NVIDIA A100 80GB PCIe",
    "20b7": "NVIDIA A30",
    "20bd": "NVIDIA A800-SXM4-40GB",
    "20f1": "NVIDIA A100-PCIE-40GB",
    "20f3": "NVIDIA A800-SXM4-80GB",
    "20f5": "NVIDIA A800 80GB PCIe",
    "2204": "NVIDIA GeForce RTX 3090",
    "2230": "NVIDIA RTX A6000",
    "2235": "NVIDIA A40",
    "2236": "NVIDIA A10",
    "2237": "NVIDIA A10G",
    "2321": "NVIDIA H100 NVL",
    "2322": "NVIDIA H800 PCIe",
    "2324": "NVIDIA H800",
    "2329": "NVIDIA H20",
    "2330": "NVIDIA H100 80GB HBM3",
    "2331": "NVIDIA H100 PCIe",
    "2335": "NVIDIA H200",
    "233a": "NVIDIA H800 NVL",
    "233b": "NVIDIA H200 NVL",
    "2684": "NVIDIA GeForce RTX 4090",
    "26b1": "NVIDIA RTX 6000 Ada Generation",
    "26b5": "NVIDIA L40",
    "26b9": "NVIDIA L40S",
    "27b8": "NVIDIA L4",
    "2901": "NVIDIA B200",
    "2b85": "NVIDIA GeForce RTX 5090",
    "2bb5": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "3182": "NVIDIA B300 SXM6 AC",
}
_VENDOR = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers
_BRIDGE_CLASS = "0x0680"
#: PCI devices of the NVSwitches of HGX boards with V100, A100 and H100 or H200. Other bridges of NVIDIA's are none.
_NVSWITCHES = ("0x1ac2", "0x1af1", "0x22a3")

_SECURE_BOOT = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
#: Where DKMS has the certificate that it signs modules with. Source: prepare_signing in /usr/sbin/dkms 3.0.10.
_MOK_DEBIAN = "/var/lib/dkms/mok.pub"
_MOK_UBUNTU = "/var/lib/shim-signed/mok/MOK.der"

_FAMILY = re.compile(
    r"nvidia-(?!container|cuda-|docker)|libnvidia-(?!container)|(?:libcuda1|libcudadebugger1|libnvcuvid1)(?::|$)"
    r"|libnvoptix|libnvsdm|libxnvctrl|lib(?:egl|glx|gles)-nvidia|firmware-nvidia|cuda-drivers|xserver-xorg-video-nvidia"
    r"|linux-(?:modules|objects|signatures)-nvidia-"
)
#: What a module is built with; it comes along with the driver.
_BUILD = re.compile(r"(?:dkms|make|binutils.*|(?:gcc|g\+\+|cpp).*|libc6?-dev.*|linux-(?:headers|kbuild|libc-dev).*)$")
#: A package that follows the distribution's kernels, not one of a single kernel or its debug symbols.
_KERNELS = re.compile(r"linux-image-((?!\d|unsigned|extra)(?:(?!-dbg).)+)$")
#: Canonical's modules, which have the version of the kernel that they are for.
_PREBUILT = re.compile(r"linux-(?:modules|objects|signatures)-nvidia-")
#: 535.261.03 and 570.26, but not what goes its own way, such as 20220217+3~deb12u1 of nvidia-support.
_DRIVER_VERSION = re.compile(r"\d{3,}\.\d{2,3}(?:\.\d{2,3})?")
#: These work beside a driver of another version and origin, and go along when the driver is installed.
_TOOLS = ("nvidia-detect", "nvidia-modprobe", "nvidia-persistenced", "nvidia-settings", "nvidia-xconfig")
#: States of dpkg in which nothing is left to do.
_SETTLED = ("installed", "triggers-awaited", "triggers-pending")
_ABSENT = ("not-installed", "config-files")
_DPKG = "${Package}\\t${Architecture}\\t${Version}\\t${db:Status-Want}\\t${db:Status-Status}\\t${db:Status-Eflag}\\n"
_RUNFILE = ("/usr/bin/nvidia-uninstall", "/usr/bin/nvidia-installer")
_GPU_DEVICE = re.compile(r"/dev/nvidia(?:\d+|ctl|-uvm)")
_PERSISTENCED = "nvidia-persistenced"
_COMM_LENGTH = 15  # what the kernel keeps of a program's name


class DriverError(Exception):
    """The host cannot be asked; the message is one sentence."""


@dataclass(frozen=True)
class PciGpu:
    """A GPU on the PCI bus: address (``0000:ad:00.0``), device (``2321``), and its name as nvidia-smi writes it."""

    address: str
    device: str
    name: str


@dataclass(frozen=True)
class Package:
    """An installed package.

    ``origins`` are the URIs of the repositories that offer this very version, as far as apt was asked
    and knows. ``broken``: dpkg began to install or to set it up, and did not end.
    """

    name: str
    version: str
    held: bool = False
    broken: bool = False
    origins: list[str] = field(default_factory=list)

    @property
    def upstream(self) -> str:
        """The version without epoch and without what the distribution added."""
        return upstream_version(self.version)


@dataclass(frozen=True)
class User:
    """A process that has a GPU open, and the service that it belongs to, or nothing."""

    pid: int
    name: str
    unit: str

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid}{', ' + self.unit if self.unit else ''})"


@dataclass(frozen=True)
class Source:
    """One URI that apt reads, the file that says so, and whose signature it has to carry; empty for any trusted key."""

    file: str
    uri: str
    signed_by: str


@dataclass(frozen=True)
class Kernel:
    """The running kernel, whether modules can be built for it, and the kind of container that this is, or nothing.

    ``header_packages`` are needed to build modules for it and for the kernels that upgrades of the host bring.
    """

    release: str
    headers: bool
    container: str = ""
    header_packages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mok:
    """The certificate that DKMS signs modules with.

    ``state`` is ``enrolled``, ``requested`` (to be confirmed on the console at the next boot),
    ``not enrolled``, ``no key``, or ``unknown``.
    """

    path: str
    state: str


@dataclass(frozen=True)
class Facts:
    """What was found.

    ``nouveau`` is whether the kernel's own module has a GPU, ``unload`` names the modules that are to go
    before another version comes, in this order. ``loaded`` and ``on_disk`` are versions of the kernel
    module ``nvidia``: in the running kernel, and what it would load. ``broken`` names packages of any
    kind, because one is enough to stop apt. ``runfile`` is what shows that NVIDIA's .run installer was
    used. ``own_uris`` are those of the role's own apt source.
    """

    kernel: Kernel
    loaded: str = ""
    nouveau: bool = False
    unload: list[str] = field(default_factory=list)
    on_disk: str = ""
    packages: list[Package] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    runfile: str = ""
    gpus: list[PciGpu] = field(default_factory=list)
    nvswitches: list[str] = field(default_factory=list)
    secure_boot: str = "off"
    mok: Mok = Mok(_MOK_DEBIAN, "no key")
    users: list[User] = field(default_factory=list)
    reboot_required: bool = False
    reboot_packages: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    own_uris: list[str] = field(default_factory=list)


class Activation(NamedTuple):
    """What brings the declared driver into use, and why.

    ``step`` is ``none`` (it is in use), ``load``, ``reload``, ``reboot``, ``wait`` (somebody uses
    another one), or ``missing`` (the running kernel has no module of it).
    """

    step: str
    reason: str


@dataclass(frozen=True)
class Paths:
    """Where things are; tests and stand-ins put them elsewhere. ``root`` is the rest of the file system."""

    sys: str = "/sys"
    proc: str = "/proc"
    apt: str = "/etc/apt"
    root: str = ""


# What the host has


def _pci(sys: str) -> Iterator[tuple[str, str, str]]:
    """Address, class and device of each PCI device of NVIDIA's, in the order of their addresses."""
    found = []
    for path in glob.glob(f"{sys}/bus/pci/devices/*"):
        address = os.path.basename(path)
        if read_text(f"{path}/vendor").strip() == _VENDOR:
            key = [int(part, 16) for part in re.split(r"[:.]", address)]
            found.append((key, address, read_text(f"{path}/class").strip(), read_text(f"{path}/device").strip()))
    for _key, address, kind, device in sorted(found):
        yield address, kind, device


def pci_gpus(sys: str = "/sys") -> list[PciGpu]:
    """NVIDIA's GPUs on the PCI bus, in the order of their addresses, which is that of nvidia-smi's index.

    No driver is needed for that.
    """
    return [
        PciGpu(address, device[2:], GPU_NAMES.get(device[2:], f"NVIDIA device 10de:{device[2:].upper()}"))
        for address, kind, device in _pci(sys)
        if kind.startswith(_GPU_CLASSES)
    ]


def nvswitches(sys: str = "/sys") -> list[str]:
    """PCI addresses of the NVSwitches of an HGX board."""
    return [address for address, kind, device in _pci(sys) if kind.startswith(_BRIDGE_CLASS) and device in _NVSWITCHES]


def upstream_version(version: str) -> str:
    """580.95.05 of 1:580.95.05-0ubuntu1."""
    version = version.partition(":")[2] or version
    return version.rpartition("-")[0] or version


def parse_packages(text: str) -> list[Package]:
    """The packages that are installed, also in part, from ``dpkg-query -W`` with the format that ``read`` uses."""
    packages = []
    for line in text.splitlines():
        name, architecture, version, want, status, flag = line.split("\t")
        if status in _ABSENT:
            continue
        foreign = architecture not in ("all", "amd64")
        broken = status not in _SETTLED or flag == "reinstreq"
        packages.append(Package(f"{name}:{architecture}" if foreign else name, version, want == "hold", broken))
    return packages


def family(packages: Iterable[Package], on_disk: str = "") -> list[Package]:
    """The packages of the driver: by name, and those of the same version as the module on disk or the former."""
    packages = list(packages)
    named = [package for package in packages if _FAMILY.match(package.name)]
    versions = {package.upstream for package in named if _DRIVER_VERSION.fullmatch(package.upstream)} | {on_disk}
    return [package for package in packages if package in named or package.upstream in versions]


def parse_origins(text: str) -> dict[str, list[str]]:
    """URIs of the repositories that offer the installed version, by package, from ``apt-cache policy NAME...``."""
    found: dict[str, list[str]] = {}
    name, installed = "", False
    for line in text.splitlines():
        version = re.match(r" (\*\*\*|   ) \S", line)
        source = re.match(r" {6,}-?\d+ (\S+)", line)
        if not line.startswith(" "):
            name, installed = line.rstrip(":"), False
            found[name] = []
        elif version:
            installed = version.group(1) == "***"
        elif source and installed and not source.group(1).startswith("/"):
            found[name].append(source.group(1))
    return found


def _one_line_entries(text: str, file: str) -> Iterator[Source]:
    for match in re.finditer(r"^[ \t]*deb(?:-src)?[ \t]+(?:\[([^\]\n]*)\][ \t]*)?(\S+)", text, re.MULTILINE):
        options = dict(word.partition("=")[::2] for word in (match.group(1) or "").split())
        yield Source(file, match.group(2), options.get("signed-by", ""))


def _deb822_entries(text: str, file: str) -> Iterator[Source]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = {
            match.group(1).lower(): match.group(2)
            for match in re.finditer(r"^([\w-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        }
        if fields.get("enabled", "").strip().lower() in ("no", "false", "off", "without", "disable", "0"):
            continue
        signed_by = " ".join(fields.get("signed-by", "").split())
        for uri in fields.get("uris", "").split():
            yield Source(file, uri, "a key in the file" if "BEGIN PGP" in signed_by else signed_by)


def apt_entries(apt: str = "/etc/apt") -> list[Source]:
    """All URIs that apt reads, from its files of both formats. See sources.list(5)."""
    found = list(_one_line_entries(read_text(f"{apt}/sources.list"), f"{apt}/sources.list"))
    for path in sorted(glob.glob(f"{apt}/sources.list.d/*.list")):
        found += _one_line_entries(read_text(path), path)
    for path in sorted(glob.glob(f"{apt}/sources.list.d/*.sources")):
        found += _deb822_entries(read_text(path), path)
    return found


def same_uri(one: str, other: str) -> bool:
    """Whether two URIs are one repository to apt: file:///x/ is file:/x."""
    first, second = (re.sub("^(file|copy)://+", r"\1:/", uri).rstrip("/") for uri in (one, other))
    return first == second


def of_nvidia(uri: str) -> bool:
    """Whether this is one of NVIDIA's own CUDA repositories, at NVIDIA."""
    parts = urlsplit(uri)
    return parts.hostname == "developer.download.nvidia.com" and parts.path.startswith("/compute/cuda/")


def header_packages(release: str, installed: Iterable[str]) -> list[str]:
    """Headers of the running kernel, and the packages that follow the ones which the host's kernel packages follow."""
    followed = [match[1] for match in map(_KERNELS.match, installed) if match]
    return [f"linux-headers-{name}" for name in [release, *sorted(followed)]]


def unloading(sys: str = "/sys") -> list[str]:
    """NVIDIA's modules that are loaded, with what builds on them (GPUDirect and the like), and an idle nouveau.

    Each after those that use it, as the kernel wants them removed.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        folder = f"{sys}/module/{name}"
        if name in order or not os.path.isdir(folder):
            return
        for holder in sorted(os.listdir(f"{folder}/holders")) if os.path.isdir(f"{folder}/holders") else []:
            visit(holder)
        order.append(name)

    for name in ("nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia_peermem", "nvidia"):
        visit(name)
    if not _has_gpu(sys):
        visit("nouveau")
    return order


def _has_gpu(sys: str) -> bool:
    """Whether the module nouveau drives a device. It can be loaded for a board that it does not know."""
    return bool(glob.glob(f"{sys}/bus/pci/drivers/nouveau/*:*:*.*"))


def gpu_users(proc: str = "/proc") -> list[User]:
    """The processes that have a GPU open, but for the persistence daemon, which goes along with the driver."""
    found = []
    for pid in sorted(map(int, filter(str.isdigit, os.listdir(proc)))):
        if not any(_GPU_DEVICE.fullmatch(link) for link in _links(f"{proc}/{pid}/fd")):
            continue
        name = read_text(f"{proc}/{pid}/comm").strip()
        unit = unit_of(read_text(f"{proc}/{pid}/cgroup"))
        if name != _PERSISTENCED[:_COMM_LENGTH] and unit != f"{_PERSISTENCED}.service":
            found.append(User(pid, name, unit))
    return found


class _Loader:
    """Asks the host. A command that is not there says nothing; one that hangs is an error."""

    def __init__(self, paths: Paths, run: TimedRunner, timeout: float) -> None:
        self.paths = paths
        self.run = run
        self.timeout = timeout

    def say(self, *argv: str) -> tuple[int, str, str]:
        """Exit status, output and errors of a command; 127 and nothing where it is not there."""
        try:
            return self.run(list(argv), self.timeout)
        except FileNotFoundError:
            return 127, "", ""
        except TimeoutError as error:
            raise DriverError(f"{error}: look at what keeps the host busy, or raise cuda_timeout") from error

    def there(self, path: str) -> bool:
        return os.path.exists(self.paths.root + path)

    def kernel(self) -> Kernel:
        release = os.uname().release
        container = read_text(f"{self.paths.root}/run/systemd/container").strip()
        if not container:
            status, said, _ = self.say("systemd-detect-virt", "--container")
            container = said.strip() if status == 0 else ""
        return Kernel(release, self.there(f"/lib/modules/{release}/build/"), container)

    def on_disk(self, release: str) -> str:
        return self.say("modinfo", "-k", release, "-F", "version", "nvidia")[1].strip()

    def packages(self) -> list[Package]:
        status, said, complaint = self.say("dpkg-query", "-W", "-f", _DPKG)
        if status == 127:
            raise DriverError(
                "dpkg-query is not there, so this is no Debian or Ubuntu, which NVIDIA's driver can be installed on "
                "from here: install the driver yourself, and set cuda_driver_source: host"
            )
        if status:
            raise DriverError(
                f"dpkg-query failed with status {status} and said {' '.join(complaint.split())[:300] or 'nothing'}: "
                "repair the package database in /var/lib/dpkg"
            )
        return parse_packages(said)

    def origins(self, packages: list[Package]) -> list[Package]:
        """The packages with where they come from, as far as that matters."""
        names = [package.name for package in packages if _bound(package)]
        known = parse_origins(self.say("apt-cache", "policy", *names)[1]) if names else {}
        return [replace(package, origins=known.get(package.name, [])) for package in packages]

    def runfile(self) -> str:
        for path in _RUNFILE:
            # Status 1: no package has it.
            if self.there(path) and self.say("dpkg-query", "-S", path)[0] == 1:
                return path
        return ""

    def secure_boot(self) -> str:
        sys = self.paths.sys
        if not os.path.isdir(f"{sys}/firmware/efi"):
            return "off"
        try:
            with open(f"{sys}/{_SECURE_BOOT}", "rb") as stream:
                value = stream.read()[4:5]  # four bytes of attributes come before it
        except OSError:
            value = b""
        if value == b"\0":
            return "off"
        said = self.say("mokutil", "--sb-state")[1]
        if "SecureBoot disabled" in said or "validation is disabled in shim" in said:
            return "off"
        return "on" if value or "SecureBoot enabled" in said else "unknown"

    def mok(self) -> Mok:
        root = self.paths.root
        ubuntu = re.search(r"^ID=\"?ubuntu\"?$", read_text(f"{root}/etc/os-release"), re.MULTILINE)
        path = _MOK_UBUNTU if ubuntu else _MOK_DEBIAN
        for file in [f"{root}/etc/dkms/framework.conf", *sorted(glob.glob(f"{root}/etc/dkms/framework.conf.d/*.conf"))]:
            for match in re.finditer(r"^[ \t]*mok_certificate=[\"']?([^\"'\s]+)", read_text(file), re.MULTILINE):
                path = match.group(1)
        if not self.there(path):
            return Mok(path, "no key")
        said = "\n".join(self.say("mokutil", "--test-key", root + path)[1:])
        # The words of print_skip_message and test_key in mokutil.c.
        states = {
            "is not enrolled": "not enrolled",
            "already in the enrollment request": "requested",
            "already enrolled": "enrolled",
            "already in db": "enrolled",
            "already in the built-in trusted keyring": "enrolled",
        }
        return Mok(path, next((state for words, state in states.items() if words in said), "unknown"))

    def reboot(self) -> tuple[bool, list[str]]:
        for folder in ("/run", "/var/run"):
            if self.there(f"{folder}/reboot-required"):
                names = read_text(f"{self.paths.root}{folder}/reboot-required.pkgs").split()
                return True, sorted(set(names))
        return False, []


def is_family(name: str) -> bool:
    """Whether a package belongs to the driver, by its name."""
    return _FAMILY.match(name) is not None


def other_driver_version(found: str, wanted: str) -> bool:
    """Whether this is the version of another driver. Some of the driver's packages have versions of their own."""
    return found != wanted and _DRIVER_VERSION.fullmatch(found) is not None


def installed(run: TimedRunner = run_command, timeout: float = 20.0) -> list[Package]:
    """The driver's packages that are installed, also in part. ``timeout`` (s). Raises DriverError."""
    return family(_Loader(Paths(), run, timeout).packages())


def read(
    paths: Paths = Paths(),
    repository: str = "",
    own_source: str = "",
    timeout: float = 20.0,
    run: TimedRunner = run_command,
) -> Facts:
    """Ask the host. ``timeout`` (s) is for each command.

    ``repository`` is the URI that the driver is to come from, ``own_source`` the apt source file that
    the role writes for it. Raises DriverError where the host cannot be asked.
    """
    load = _Loader(paths, run, timeout)
    kernel = load.kernel()
    on_disk = load.on_disk(kernel.release)
    packages = load.packages()
    kernel = replace(kernel, header_packages=header_packages(kernel.release, [package.name for package in packages]))
    reboot_required, reboot_packages = load.reboot()
    entries = apt_entries(paths.apt)
    own = [entry for entry in entries if os.path.normpath(entry.file) == os.path.normpath(own_source)]
    return Facts(
        kernel=kernel,
        loaded=read_text(f"{paths.sys}/module/nvidia/version").strip(),
        nouveau=_has_gpu(paths.sys),
        unload=unloading(paths.sys),
        on_disk=on_disk,
        packages=load.origins(family(packages, on_disk)),
        broken=[package.name for package in packages if package.broken],
        runfile=load.runfile(),
        gpus=pci_gpus(paths.sys),
        nvswitches=nvswitches(paths.sys),
        secure_boot=load.secure_boot(),
        mok=load.mok(),
        users=gpu_users(paths.proc),
        reboot_required=reboot_required,
        reboot_packages=reboot_packages,
        sources=[
            entry for entry in entries if entry not in own and (of_nvidia(entry.uri) or same_uri(entry.uri, repository))
        ],
        own_uris=[entry.uri for entry in own],
    )


# What that means


def version_complaint(version: str) -> str:
    """What is wrong with a declared version, or the empty string. None declared is right."""
    if not version or _DRIVER_VERSION.fullmatch(version):
        return ""
    return (
        f"cuda_driver_version is {version!r}, which is no version of a driver: declare all of its parts, such as "
        "580.95.05"
    )


def _bound(package: Package) -> bool:
    """Whether a package has to be of one version and origin with the rest of the driver."""
    if _PREBUILT.match(package.name):
        return True
    name = package.name.partition(":")[0]
    return name not in _TOOLS and _DRIVER_VERSION.fullmatch(package.upstream) is not None


def strangers(facts: Facts, repository: str = "") -> list[Package]:
    """Packages of the driver that come from elsewhere than NVIDIA's repository or ``repository``.

    By the repositories that offer this version; where none does, by the version's ending.
    """
    own = [repository, *facts.own_uris]

    def ours(uri: str) -> bool:
        return of_nvidia(uri) or any(same_uri(uri, known) for known in own)

    def strange(package: Package) -> bool:
        if package.origins:
            return not any(map(ours, package.origins))
        return bool(_PREBUILT.match(package.name) or re.search(r"deb\d|ubuntu0", package.version))

    return [package for package in facts.packages if _bound(package) and strange(package)]


def _some(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _strangers(packages: list[Package]) -> str:
    origins = sorted({origin for package in packages for origin in package.origins})
    return (
        f"the driver's packages {_some([f'{package.name} {package.version}' for package in packages])} come from "
        f"{_some(origins) or 'the distribution'} and cannot be mixed with NVIDIA's: remove them "
        f"(apt-get purge {' '.join(package.name for package in packages)}) and run again, or set "
        "cuda_driver_source: host to keep that driver"
    )


def _secure_boot(mok: Mok) -> str:
    """Why a module that is built here cannot be loaded; empty where the firmware knows its key."""
    found = "Secure Boot is on, so the kernel loads only modules that are signed with a key the firmware knows, and "
    console = 'reboot, choose "Enroll MOK" on the console, and give that password'
    otherwise = "and run again, or switch Secure Boot off in the firmware's setup"
    enroll = f"run mokutil --import {mok.path}, which asks for a one-time password, {console}, {otherwise}"
    if mok.path == _MOK_UBUNTU:
        create = "update-secureboot-policy --new-key"
    else:
        create = (
            'openssl req -new -x509 -nodes -days 36500 -newkey rsa:2048 -subj "/CN=DKMS module signing key" '
            f"-keyout {os.path.splitext(mok.path)[0]}.key -outform DER -out {mok.path}"
        )
    return {
        "enrolled": "",
        "requested": f"{found}that of DKMS, {mok.path}, only waits to be confirmed: {console}, {otherwise}",
        "not enrolled": f"{found}that of DKMS, {mok.path}, is not enrolled: {enroll}",
        "no key": f"{found}DKMS has none yet in {mok.path}: install dkms and mokutil, run {create}, then {enroll}",
        "unknown": f"{found}whether it knows that of DKMS, {mok.path}, cannot be told: install mokutil and run again; "
        f"where mokutil --test-key {mok.path} does not say that the key is enrolled, {enroll}",
    }[mok.state]


def refusals(facts: Facts, version: str, repository: str = "") -> list[str]:
    """Why the declared driver must not be installed, one sentence each, before anything is changed.

    ``repository`` is the URI that it is to come from. With no declared version there is nothing to refuse.
    """
    if not version:
        return []
    found = []
    if not facts.gpus:
        found.append(
            "vllm_device is cuda and there is no NVIDIA GPU on the PCI bus: look for the board with lspci -d 10de:, "
            "pass it through where this is a virtual machine, or set vllm_device: cpu"
        )
    if facts.runfile:
        found.append(
            f"{facts.runfile} belongs to no package, so NVIDIA's .run installer has put a driver here that packages "
            "would overwrite in part: run nvidia-uninstall and run again, or set cuda_driver_source: host to keep it"
        )
    strange = strangers(facts, repository)
    if strange:
        found.append(_strangers(strange))
    for source in facts.sources:
        if same_uri(source.uri, repository):
            found.append(
                f"{source.file} names the repository {source.uri} already, signed by "
                f"{source.signed_by or 'any key that apt trusts'}, and apt stops where two entries of one repository "
                "differ in that: remove the entry (where the package cuda-keyring brought it, apt-get purge "
                "cuda-keyring), or set cuda_driver_source: host"
            )
    # What was left of the driver's own packages by an interrupted run is set right by the next one.
    broken = [name for name in facts.broken if not is_family(name) and not _BUILD.match(name)]
    if broken:
        found.append(
            f"the packages {_some(broken)} are not completely installed, so apt cannot install anything: run "
            "dpkg --configure -a, or apt-get --fix-broken install where that is not enough, and run again"
        )
    # A module of this version that the kernel has loaded has proved its key.
    if facts.secure_boot == "on" and facts.loaded != version:
        complaint = _secure_boot(facts.mok)
        if complaint:
            found.append(complaint)
    if facts.nvswitches:
        found.append(
            f"the host has NVSwitches ({_some(facts.nvswitches)}), whose GPUs do not work without "
            "nvidia-fabricmanager of exactly the driver's version, which is not managed here: install both yourself, "
            "and set cuda_driver_source: host"
        )
    return found


def engines_in_use(facts: Facts, engine_units: str = "vllm@*.service") -> list[str]:
    """Units of ours that have a GPU open."""
    return sorted({user.unit for user in facts.users if fnmatch(user.unit, engine_units)})


def _missing(facts: Facts, version: str) -> str:
    found = f"is {facts.on_disk}" if facts.on_disk else "has none"
    if not facts.kernel.headers:
        release = facts.kernel.release
        remedy = (
            f"its headers are not there, so none can be built: install linux-headers-{release}; where the "
            "repository has no such package any more, upgrade the kernel and reboot first"
        )
    else:
        remedy = (
            f"read why DKMS did not build it in /var/lib/dkms/nvidia/{version}/build/make.log and in dkms status, then "
            f"run dkms install nvidia/{version}"
        )
    verb = "the module nvidia for the running kernel" if facts.on_disk else "the running kernel"
    return f"{verb} ({facts.kernel.release}) {found}, wanted {version}: {remedy}"


def activation(facts: Facts, version: str, engine_units: str = "vllm@*.service") -> Activation:
    """What brings the declared driver into use once its packages are there, and why."""
    if not version:
        return Activation("none", "no driver is declared")
    if facts.loaded == version:
        return Activation("none", f"driver {version} is loaded")
    if facts.on_disk != version:
        return Activation("missing", _missing(facts, version))
    if facts.nouveau:
        return Activation(
            "reboot",
            f"the module nouveau has the GPUs, which keeps driver {version} out until the next boot: set "
            "cuda_reboot: true, or reboot the host yourself and run again",
        )
    if not facts.loaded:
        return Activation("load", f"driver {version} is installed and no module nvidia is loaded")
    occupied = in_use(facts, version, engine_units)
    if not occupied:
        return Activation("reload", f"driver {facts.loaded} is loaded, wanted {version}, and nobody uses a GPU")
    return Activation("wait", occupied)


def in_use(facts: Facts, version: str, engine_units: str = "vllm@*.service") -> str:
    """Who keeps another version than the declared one in use, and what to do; empty where nobody does."""
    if not facts.users or facts.loaded in ("", version):
        return ""
    engines = engines_in_use(facts, engine_units)
    others = [str(user) for user in facts.users if user.unit not in engines]
    who = [f"the engines {', '.join(engines)}"] if engines else []
    who += [", ".join(others)] if others else []
    ways = ["set cuda_stop_engines: true to have the engines stopped and started again"] if engines else []
    ways += [f"stop {'the others' if engines else 'them'}"] if others else []
    return (
        f"driver {facts.loaded} is loaded, wanted {version}, and in use by {' and by '.join(who)}: "
        f"{' and '.join(ways)}, and run again"
    )


def pending(facts: Facts, repository: str = "") -> list[str]:
    """What is worth knowing and stops nothing."""
    notes = []
    if facts.reboot_required:
        why = f" for {_some(facts.reboot_packages)}" if facts.reboot_packages else ""
        notes.append(f"the host waits for a reboot{why} (/run/reboot-required)")
    if facts.loaded and not facts.on_disk:
        notes.append(
            f"driver {facts.loaded} is loaded, but there is no module nvidia on disk for kernel "
            f"{facts.kernel.release}: after a reboot into it there is no driver"
        )
    elif facts.loaded != facts.on_disk:
        notes.append(
            f"driver {facts.on_disk} is on disk, and {facts.loaded or 'none'} is loaded: the next boot changes that"
        )
    notes += [
        f"{source.file} names NVIDIA's repository {source.uri} too: packages of the driver can come from there"
        for source in facts.sources
        if not same_uri(source.uri, repository)
    ]
    return notes


def holds_missing(facts: Facts, version: str) -> list[str]:
    """Packages at the declared version that an upgrade of the host could replace, because they are not held."""
    return [package.name for package in facts.packages if package.upstream == version and not package.held]
