"""NVIDIA's driver on a host: trees written by the test for /sys, /proc and /etc, and stand-ins for commands on PATH.

Packages and versions are those of Debian 12 and 13 (non-free), Ubuntu 24.04 and NVIDIA's repositories.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _driver
from ansible_collections.nvl.vllm.plugins.module_utils._driver import (
    Facts,
    Kernel,
    Mok,
    Package,
    PciGpu,
    Source,
    User,
)

RELEASE = os.uname().release
VERSION = "580.95.05"
REPOSITORY = "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/"
DEBIAN = "http://deb.debian.org/debian"
KEY = "/etc/apt/keyrings/nvidia-cuda.asc"
GPU = PciGpu("0000:ad:00.0", "2321", "NVIDIA H100 NVL")
PRIMARY = User(500, "vllm", "vllm@primary.service")
SECONDARY = User(501, "vllm", "vllm@secondary.service")
XORG = User(412, "Xorg", "gdm.service")
STRANGER = User(413, "python3", "")


class Host:
    """A host below a folder. What it has is written by the test; ``read`` asks it as the module does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("bin", "sys", "proc", "apt/sources.list.d", "root"):
            (path / name).mkdir(parents=True)
        self.program("systemd-detect-virt", "echo none; exit 1")
        self.program("modinfo", "echo 'modinfo: ERROR: Module nvidia not found.' >&2; exit 1")
        self.dpkg()

    def file(self, name: str, text: str | bytes = "") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def program(self, name: str, text: str) -> None:
        self.file(f"bin/{name}", f"#!/bin/sh\n{text}\n").chmod(0o755)

    def dpkg(self, *rows: str, owned: bool = False) -> None:
        """Rows are ``name version [architecture] [want] [status] [flag]``."""
        defaults = ["", "", "amd64", "install", "installed", "ok"]
        lines = []
        for row in rows:
            words = row.split()
            name, version, *rest = words + defaults[len(words) :]
            lines.append("\\t".join([name, rest[0], version, *rest[1:]]) + "\\n")
        listing = f"printf '{''.join(lines)}'"
        self.program("dpkg-query", f'[ "$1" = -S ] && exit {0 if owned else 1}\n{listing}')

    def policy(self, text: str) -> None:
        self.file("policy", text)
        self.program("apt-cache", f'echo "$@" >> {self.path}/asked; /bin/cat {self.path}/policy')

    def pci(self, address: str, device: str, kind: str = "0x030200", vendor: str = "0x10de") -> None:
        for name, value in {"vendor": vendor, "device": device, "class": kind}.items():
            self.file(f"sys/bus/pci/devices/{address}/{name}", value + "\n")

    def process(self, pid: int, comm: str, cgroup: str, *links: str) -> None:
        self.file(f"proc/{pid}/comm", comm + "\n")
        self.file(f"proc/{pid}/cgroup", f"0::{cgroup}\n")
        (self.path / f"proc/{pid}/fd").mkdir()
        for number, link in enumerate(links):
            (self.path / f"proc/{pid}/fd/{number}").symlink_to(link)

    def read(self, repository: str = REPOSITORY, own_source: str = "", timeout: float = 20.0) -> Facts:
        places = {name: str(self.path / name) for name in ("sys", "proc", "apt", "root")}
        return _driver.read(_driver.Paths(**places), repository, own_source, timeout)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with nothing of NVIDIA's. Programs that a test does not write are not there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return Host(tmp_path)


@pytest.fixture
def facts():
    """A host that is ready for the driver."""
    return Facts(Kernel(RELEASE, True), gpus=[GPU])


def only(sentences):
    (sentence,) = sentences
    return sentence


# Reading


def test_a_bare_host(host):
    assert host.read() == Facts(Kernel(RELEASE, False, "", [f"linux-headers-{RELEASE}"]))


def test_kernel_headers_are_there_where_the_link_leads_somewhere(host):
    link = host.path / f"root/lib/modules/{RELEASE}/build"
    link.parent.mkdir(parents=True)
    link.symlink_to(host.path / "headers")
    assert host.read().kernel.headers is False
    (host.path / "headers").mkdir()
    assert host.read().kernel.headers is True


def test_a_container_is_told_by_systemd(host):
    host.program("systemd-detect-virt", '[ "$1" = --container ] && echo lxc')
    assert host.read().kernel.container == "lxc"
    host.file("root/run/systemd/container", "podman\n")
    assert host.read().kernel.container == "podman"


def test_modules(host):
    host.file("sys/module/nvidia/version", "570.26\n")
    host.program("modinfo", f'[ "$*" = "-k {RELEASE} -F version nvidia" ] && echo {VERSION}')
    found = host.read()
    assert (found.loaded, found.on_disk, found.nouveau) == ("570.26", VERSION, False)
    # Loaded for no device, and then for one.
    host.file("sys/module/nouveau/refcnt", "0\n")
    assert host.read().nouveau is False
    assert host.read().unload == ["nvidia", "nouveau"]
    host.file("sys/bus/pci/drivers/nouveau/0000:ad:00.0", "")
    assert host.read().unload == ["nvidia"]
    assert host.read().nouveau is True


def test_without_modinfo_no_module_is_on_disk(host):
    (host.path / "bin/modinfo").unlink()
    assert host.read().on_disk == ""


@pytest.mark.parametrize(
    ("command", "prepare"),
    [
        ("modinfo", lambda host: None),
        ("dpkg-query", lambda host: None),
        ("mokutil", lambda host: host.file("root/var/lib/dkms/mok.pub")),
    ],
)
def test_a_command_that_hangs_is_an_error_and_not_an_answer(host, command, prepare):
    prepare(host)
    host.program(command, "exec /bin/sleep 60")
    with pytest.raises(_driver.DriverError, match=f"^{command} did not answer within 0.2 s: .* or raise cuda_timeout$"):
        host.read(timeout=0.2)


def test_without_dpkg_there_is_nothing_to_install_with(host):
    (host.path / "bin/dpkg-query").unlink()
    with pytest.raises(_driver.DriverError, match=r"^dpkg-query is not there.*set cuda_driver_source: host$"):
        host.read()


def test_a_broken_database_of_packages_is_an_error(host):
    host.program("dpkg-query", "echo 'dpkg-query: error: parsing file' >&2; exit 2")
    with pytest.raises(_driver.DriverError, match=r"status 2 and said dpkg-query: error: parsing file"):
        host.read()


@pytest.mark.parametrize(
    ("version", "upstream"),
    [
        ("580.95.05-1", "580.95.05"),
        ("580.126.09-0ubuntu0.24.04.1", "580.126.09"),
        ("1:570.26-1ubuntu1", "570.26"),
        ("2:580.95.05", "580.95.05"),
        ("20240109+1", "20240109+1"),
        ("535.161.07-1~deb12u1", "535.161.07"),
    ],
)
def test_upstream_versions(version, upstream):
    assert _driver.upstream_version(version) == upstream


def test_the_family_is_told_by_name_or_by_version(host):
    host.dpkg(
        f"libcuda1 {VERSION}-1",
        f"libcuda1 {VERSION}-1 i386",
        f"libxnvctrl0 {VERSION}-1",
        f"firmware-nvidia-gsp {VERSION}-1 all",
        "nvidia-support 20220217+3~deb12u1 all",
        "linux-modules-nvidia-580-server-open-6.8.0-87-generic 6.8.0-87.88",
        # None of the driver's:
        "nvidia-container-toolkit 1.17.8-1",
        "libnvidia-container1 1.17.8-1",
        "nvidia-cuda-toolkit 11.8.89~11.8.0-5~deb12u1",
        "cuda-toolkit-13-0 13.0.2-1",
        "libnvidiahelper1 1.0-1",
        "bash 5.2.15-2+b8",
        "something-else 20220217+3~deb12u1",
    )
    assert [package.name for package in host.read().packages] == [
        "libcuda1",
        "libcuda1:i386",
        "libxnvctrl0",
        "firmware-nvidia-gsp",
        "nvidia-support",
        "linux-modules-nvidia-580-server-open-6.8.0-87-generic",
    ]


def test_a_package_of_the_module_on_disk_belongs_to_the_family(host):
    host.dpkg(f"fabric-something {VERSION}-1")
    assert host.read().packages == []
    host.program("modinfo", f"echo {VERSION}")
    assert [package.name for package in host.read().packages] == ["fabric-something"]


def test_what_dpkg_says_of_a_package(host):
    host.dpkg(
        f"libcuda1 {VERSION}-1 amd64 hold",
        f"libnvidia-ml1 {VERSION}-1",
        f"nvidia-kernel-open-dkms {VERSION}-1 amd64 install half-configured",
        f"nvidia-kernel-support {VERSION}-1 amd64 install triggers-pending",
        f"nvidia-modprobe {VERSION}-1 amd64 install installed reinstreq",
        "nvidia-driver-cuda 570.26-1 amd64 deinstall config-files",
        "libnvcuvid1 570.26-1 amd64 unknown not-installed",
        "linux-image-amd64 6.1.148-1 amd64 install unpacked",
    )
    found = host.read()
    assert {package.name: (package.held, package.broken) for package in found.packages} == {
        "libcuda1": (True, False),
        "libnvidia-ml1": (False, False),
        "nvidia-kernel-open-dkms": (False, True),
        "nvidia-kernel-support": (False, False),
        "nvidia-modprobe": (False, True),
    }
    assert found.broken == ["nvidia-kernel-open-dkms", "nvidia-modprobe", "linux-image-amd64"]


#: As apt 2.6 writes it: an installed version that is offered beside a newer one, one that is offered no more, one that
#: two repositories offer, one that a pin forbids.
POLICY = f"""\
libcuda1:
  Installed: 580.95.05-1
  Candidate: 580.105.08-1
  Version table:
     580.105.08-1 500
        500 {REPOSITORY.rstrip("/")}  Packages
 *** 580.95.05-1 500
        500 {REPOSITORY.rstrip("/")}  Packages
        100 /var/lib/dpkg/status
nvidia-driver:
  Installed: 535.261.03-1
  Candidate: 535.261.03-1
  Version table:
 *** 535.261.03-1 100
        100 /var/lib/dpkg/status
     525.147.05-4~deb12u1 500
        500 {DEBIAN} bookworm/non-free amd64 Packages
libnvidia-ml1:i386:
  Installed: 535.261.03-1
  Candidate: 535.261.03-1
  Version table:
 *** 535.261.03-1 -1
        500 {DEBIAN} bookworm/non-free i386 Packages
         -1 file:/srv/mirror  Packages
        100 /var/lib/dpkg/status
"""


def test_origins_are_those_of_the_installed_version():
    assert _driver.parse_origins(POLICY) == {
        "libcuda1": [REPOSITORY.rstrip("/")],
        "nvidia-driver": [],
        "libnvidia-ml1:i386": [DEBIAN, "file:/srv/mirror"],
    }


def test_apt_is_asked_once_and_only_about_what_must_not_be_mixed(host):
    host.dpkg(
        f"libcuda1 {VERSION}-1",
        "nvidia-persistenced 535.171.04-1~deb12u1",
        "nvidia-support 20220217+3~deb12u1",
        "libnvidia-egl-gbm1 1.1.0-2",
        "libnvidia-ml1 535.261.03-1 i386",
    )
    host.policy(POLICY)
    assert {package.name: package.origins for package in host.read().packages} == {
        "libcuda1": [REPOSITORY.rstrip("/")],
        "nvidia-persistenced": [],
        "nvidia-support": [],
        "libnvidia-egl-gbm1": [],
        "libnvidia-ml1:i386": [DEBIAN, "file:/srv/mirror"],
    }
    assert (host.path / "asked").read_text() == "policy libcuda1 libnvidia-ml1:i386\n"


def test_a_host_without_such_packages_is_not_asked(host):
    host.policy("")
    host.dpkg("bash 5.2.15-2+b8")
    host.read()
    assert not (host.path / "asked").exists()


@pytest.mark.parametrize("name", ["nvidia-uninstall", "nvidia-installer"])
def test_a_runfile_driver_is_told_by_a_program_of_no_package(host, name):
    host.file(f"root/usr/bin/{name}")
    assert host.read().runfile == f"/usr/bin/{name}"
    host.dpkg(owned=True)
    assert host.read().runfile == ""


def test_gpus_are_in_the_order_of_their_addresses(host):
    host.pci("10000:01:00.0", "0x2330")
    host.pci("0000:ad:00.0", "0x2321")
    host.pci("0000:0a:00.0", "0x26b9", kind="0x030000")
    host.pci("0000:ae:00.0", "0x23ff")
    host.pci("0000:ad:00.1", "0x22ba", kind="0x040300")  # its sound
    host.pci("0000:03:00.0", "0x1000", vendor="0x1a03")  # the board's own graphics
    assert host.read().gpus == [
        PciGpu("0000:0a:00.0", "26b9", "NVIDIA L40S"),
        PciGpu("0000:ad:00.0", "2321", "NVIDIA H100 NVL"),
        PciGpu("0000:ae:00.0", "23ff", "NVIDIA device 10de:23FF"),
        PciGpu("10000:01:00.0", "2330", "NVIDIA H100 80GB HBM3"),
    ]


def test_pci_gpus_of_a_tree_without_a_bus(tmp_path):
    assert _driver.pci_gpus(str(tmp_path)) == []


def test_an_nvswitch_is_one_of_three_bridges(host):
    host.pci("0000:01:00.0", "0x22a3", kind="0x068000")
    host.pci("0000:02:00.0", "0x0373", kind="0x068000")  # of an nForce
    host.pci("0000:03:00.0", "0x1af1", kind="0x030200")
    host.pci("0000:04:00.0", "0x22a3", kind="0x068000", vendor="0x1000")
    assert host.read().nvswitches == ["0000:01:00.0"]


VARIABLE = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@pytest.mark.parametrize(
    ("value", "said", "state"),
    [
        (b"\6\0\0\0\1", "SecureBoot enabled", "on"),
        (b"\6\0\0\0\1", None, "on"),
        (b"\6\0\0\0\0", "SecureBoot enabled", "off"),
        (b"\6\0\0\0\1", "SecureBoot enabled\nSecureBoot validation is disabled in shim", "off"),
        (b"\6\0\0\0", "SecureBoot enabled", "on"),
        (None, "SecureBoot enabled", "on"),
        (None, "SecureBoot disabled\nPlatform is in Setup Mode", "off"),
        (None, "Failed to read SecureBoot", "unknown"),
        (None, None, "unknown"),
    ],
)
def test_secure_boot(host, value, said, state):
    (host.path / "sys/firmware/efi/efivars").mkdir(parents=True)
    if value is not None:
        host.file(VARIABLE, value)
    if said is not None:
        host.program("mokutil", f'[ "$*" = --sb-state ] && echo "{said}"')
    assert host.read().secure_boot == state


def test_without_efi_there_is_no_secure_boot(host):
    host.program("mokutil", "echo SecureBoot enabled")
    assert host.read().secure_boot == "off"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("is already enrolled", "enrolled"),
        ("is already in db", "enrolled"),
        ("is already in the enrollment request", "requested"),
        ("is not enrolled", "not enrolled"),
        ("is blocked in dbx", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_key_of_dkms(host, said, state):
    assert host.read().mok == Mok("/var/lib/dkms/mok.pub", "no key")
    key = host.file("root/var/lib/dkms/mok.pub")
    if said is not None:
        host.program("mokutil", f'[ "$1" = --test-key ] && echo "$2 {said}"')
    assert host.read().mok == Mok("/var/lib/dkms/mok.pub", state)
    assert key.exists()


def test_a_key_that_the_kernel_has_built_in_is_enrolled(host):
    host.file("root/var/lib/dkms/mok.pub")
    host.program("mokutil", 'echo "$2 is already in the built-in trusted keyring" >&2; exit 255')
    assert host.read().mok.state == "enrolled"


def test_on_ubuntu_the_key_is_elsewhere(host):
    host.file("root/etc/os-release", 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n')
    host.file("root/var/lib/dkms/mok.pub")
    assert host.read().mok == Mok("/var/lib/shim-signed/mok/MOK.der", "no key")


def test_the_key_that_dkms_is_told_to_use(host):
    host.file("root/etc/dkms/framework.conf", "# mok_certificate=/var/lib/dkms/mok.pub\nmok_certificate=/etc/one.der\n")
    assert host.read().mok.path == "/etc/one.der"
    host.file("root/etc/dkms/framework.conf.d/site.conf", 'mok_certificate="/etc/two.der"\n')
    assert host.read().mok.path == "/etc/two.der"


def test_users_of_gpus(host):
    slice_ = "/system.slice/system-vllm.slice/vllm@primary.service"
    host.process(501, "vllm", slice_, "/dev/null", "/dev/nvidiactl", "/dev/nvidia0")
    host.process(7, "python3", "/user.slice/user-0.slice/session-1.scope", "/dev/nvidia-uvm")
    host.process(900, "nvidia-persiste", "/", "/dev/nvidia0")
    host.process(901, "daemon", "/system.slice/nvidia-persistenced.service", "/dev/nvidiactl")
    host.process(8, "sshd", "/system.slice/ssh.service", "/dev/null", "socket:[5]", "/dev/nvidia-caps/nvidia-cap1")
    host.file("proc/sys/kernel/osrelease")
    assert host.read().users == [User(7, "python3", ""), User(501, "vllm", "vllm@primary.service")]


@pytest.mark.parametrize("folder", ["run", "var/run"])
def test_a_reboot_that_packages_want(host, folder):
    host.file(f"root/{folder}/reboot-required", "*** System restart required ***\n")
    assert (host.read().reboot_required, host.read().reboot_packages) == (True, [])
    host.file(f"root/{folder}/reboot-required.pkgs", "linux-image-amd64\nlibc6\nlinux-image-amd64\n")
    assert host.read().reboot_packages == ["libc6", "linux-image-amd64"]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("sources.list", f"deb {REPOSITORY} /\n", [(REPOSITORY, "")]),
        (
            "sources.list.d/cuda-debian12-x86_64.list",
            f"deb [arch=amd64 signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] {REPOSITORY} /\n",
            [(REPOSITORY, "/usr/share/keyrings/cuda-archive-keyring.gpg")],
        ),
        ("sources.list.d/a.list", f"  deb-src [ trusted=yes ] {REPOSITORY} /\n", [(REPOSITORY, "")]),
        ("sources.list.d/a.list", f"# deb {REPOSITORY} /\n#deb {REPOSITORY} /\ndeb {DEBIAN} bookworm main\n", []),
        ("sources.list.d/a.list.save", f"deb {REPOSITORY} /\n", []),
        (
            "sources.list.d/a.sources",
            f"Types: deb\nURIs: {DEBIAN}\n  {REPOSITORY}\nSuites: /\nSigned-By: {KEY}\n EB693B30\n",
            [(REPOSITORY, f"{KEY} EB693B30")],
        ),
        (
            "sources.list.d/a.sources",
            f"types: deb\nuris: {REPOSITORY}\nsigned-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n",
            [(REPOSITORY, "a key in the file")],
        ),
        ("sources.list.d/a.sources", f"Enabled: no\nTypes: deb\nURIs: {REPOSITORY}\nSuites: /\n", []),
        (
            "sources.list.d/a.sources",
            f"Types: deb\nURIs: {DEBIAN}\nSigned-By: {KEY}\n \n# a remark\nTypes: deb\n# another\nURIs: {REPOSITORY}\n",
            [(REPOSITORY, "")],
        ),
        (
            "sources.list.d/a.sources",
            f"Types: deb\nURIs: {DEBIAN}\n# and\n {REPOSITORY}\nSuites: /\n",
            [(REPOSITORY, "")],
        ),
        ("sources.list.d/a.sources", f"#Types: deb\n#URIs: {REPOSITORY}\n", []),
    ],
)
def test_sources_of_apt(host, name, text, found):
    path = host.file(f"apt/{name}", text)
    assert host.read().sources == [Source(str(path), uri, key) for uri, key in found]


def test_sources_are_in_the_order_of_their_files(host):
    names = [f"{letter}.{kind}" for kind in ("list", "sources") for letter in "abcdefgh"]
    for name in reversed(names):
        host.file(
            f"apt/sources.list.d/{name}",
            f"deb {REPOSITORY} /\n" if name.endswith(".list") else f"Types: deb\nURIs: {REPOSITORY}\nSuites: /\n",
        )
    assert [os.path.basename(source.file) for source in host.read().sources] == names


def test_a_repository_of_ones_own_is_looked_for_by_its_uri(host):
    path = host.file("apt/sources.list", "deb file:///srv/cuda/ /\ndeb http://mirror.example/debian12 /\n")
    assert host.read("").sources == []
    assert host.read("file:/srv/cuda").sources == [Source(str(path), "file:///srv/cuda/", "")]
    assert [source.uri for source in host.read("http://mirror.example/debian12/").sources] == [
        "http://mirror.example/debian12"
    ]


def test_the_file_of_the_role_is_no_other_entry(host):
    own = host.file("apt/sources.list.d/nvidia-cuda.sources", f"Types: deb\nURIs: {REPOSITORY}\nSuites: /\n")
    found = host.read(own_source=str(own))
    assert (found.sources, found.own_uris) == ([], [REPOSITORY])


@pytest.mark.parametrize(
    ("uri", "nvidia"),
    [
        (REPOSITORY, True),
        ("http://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/", True),
        ("https://developer.download.nvidia.com/compute/machine-learning/repos/ubuntu2004/x86_64/", False),
        ("https://nvidia.github.io/libnvidia-container/stable/deb/amd64", False),
        ("https://developer.download.nvidia.com.example/compute/cuda/repos/debian12/x86_64/", False),
        ("file:/compute/cuda/repos", False),
    ],
)
def test_what_is_nvidias(uri, nvidia):
    assert _driver.of_nvidia(uri) is nvidia


# Refusals


def test_nothing_stands_in_the_way(facts):
    assert _driver.refusals(facts, VERSION, REPOSITORY) == []


def test_with_no_declared_driver_nothing_is_refused(facts):
    assert _driver.refusals(replace(facts, gpus=[], broken=["bash"], nvswitches=["0000:01:00.0"]), "") == []


def test_all_refusals_are_told_at_once(facts):
    found = _driver.refusals(
        Facts(
            Kernel(RELEASE, True),
            runfile="/usr/bin/nvidia-uninstall",
            packages=[Package("nvidia-driver", "535.261.03-1", origins=[DEBIAN])],
            sources=[Source("/etc/apt/sources.list", REPOSITORY, "")],
            broken=["linux-image-amd64"],
            secure_boot="on",
            nvswitches=["0000:01:00.0"],
        ),
        VERSION,
        REPOSITORY,
    )
    assert len(found) == len(set(found)) == 7
    # Each is one sentence with a colon before the remedy.
    assert [sentence for sentence in found if ": " not in sentence or sentence.endswith(".")] == []


def test_a_host_without_a_gpu(facts):
    assert only(_driver.refusals(replace(facts, gpus=[]), VERSION)) == (
        "vllm_device is cuda and there is no NVIDIA GPU on the PCI bus: look for the board with lspci -d 10de:, pass "
        "it through where this is a virtual machine, or set vllm_device: cpu"
    )


def test_a_runfile_driver(facts):
    error = only(_driver.refusals(replace(facts, runfile="/usr/bin/nvidia-uninstall"), VERSION))
    assert error.startswith("/usr/bin/nvidia-uninstall belongs to no package, so NVIDIA's .run installer ")
    assert error.endswith(": run nvidia-uninstall and run again, or set cuda_driver_source: host to keep it")


@pytest.mark.parametrize(
    "package",
    [
        # Debian 12 and 13, told by the repository alone; an update of Debian 12, also by its version.
        Package("nvidia-driver", "535.261.03-1", origins=[DEBIAN]),
        Package("libcuda1", "550.163.01-2", origins=[DEBIAN]),
        Package("nvidia-driver", "525.147.05-4~deb12u1"),
        # Canonical's.
        Package("nvidia-dkms-580-open", "580.126.09-0ubuntu0.24.04.1"),
        Package("nvidia-dkms-580-open", "580.126.09-0ubuntu0.24.04.1", origins=["http://archive.ubuntu.com/ubuntu"]),
        Package("linux-modules-nvidia-580-server-open-6.8.0-87-generic", "6.8.0-87.88"),
        # Somebody else's, of the declared version.
        Package("libnvidia-compute-580", "580.95.05-1lambda1", origins=["http://archive.lambdalabs.com/ubuntu"]),
        Package("libcuda1:i386", "535.261.03-1", origins=[DEBIAN]),
    ],
    ids=str,
)
def test_a_driver_from_elsewhere(facts, package):
    error = only(_driver.refusals(replace(facts, packages=[package]), VERSION, REPOSITORY))
    origin = package.origins[0] if package.origins else "the distribution"
    assert error.startswith(f"the driver's packages {package.name} {package.version} come from {origin} and cannot ")
    assert f"(apt-get purge {package.name})" in error
    assert error.endswith("or set cuda_driver_source: host to keep that driver")


@pytest.mark.parametrize(
    "package",
    [
        Package("libcuda1", "580.95.05-1", origins=[REPOSITORY.rstrip("/")]),
        Package(
            "libcuda1", "570.26-1", origins=["https://developer.download.nvidia.com/compute/cuda/repos/old/x86_64"]
        ),
        Package("libcuda1", "580.95.05-1", origins=[DEBIAN, REPOSITORY.rstrip("/")]),
        Package("libcuda1", "580.95.05-1"),
        Package("libnvidia-compute-580", "580.95.05-0ubuntu1"),
        Package("nvidia-dkms-open", "610.43.02-1ubuntu1"),
        # Debian's contrib, which NVIDIA's own packages for Debian depend on or go along with.
        Package("nvidia-support", "20220217+3~deb12u1"),
        Package("nvidia-kernel-common", "20220217+3~deb12u1"),
        Package("nvidia-persistenced", "535.171.04-1~deb12u1"),
        Package("nvidia-modprobe", "535.161.07-1~deb12u1"),
        Package("libnvidia-ml-dev", "11.8.86~11.8.0-5~deb12u1"),
    ],
    ids=str,
)
def test_what_may_stay(facts, package):
    assert _driver.refusals(replace(facts, packages=[package]), VERSION, REPOSITORY) == []


def test_a_driver_from_the_declared_repository_or_from_the_one_before_it_is_no_stranger(facts):
    package = Package("libcuda1", "570.26-1", origins=["file:/var/cache/nvl-vllm/cuda"])
    found = replace(facts, packages=[package])
    assert len(_driver.refusals(found, VERSION, REPOSITORY)) == 1
    assert _driver.refusals(found, VERSION, "file:///var/cache/nvl-vllm/cuda/") == []
    before = replace(found, own_uris=["file:/var/cache/nvl-vllm/cuda/"])
    assert _driver.refusals(before, VERSION, REPOSITORY) == []


def test_each_origin_is_named_once(facts):
    origins = [["http://b.example"], ["http://a.example"], ["http://b.example"]]
    packages = [Package(f"libnvidia-{number}", "535.261.03-1", origins=uris) for number, uris in enumerate(origins)]
    error = only(_driver.refusals(replace(facts, packages=packages), VERSION, REPOSITORY))
    assert "come from http://a.example, http://b.example and cannot be mixed" in error


def test_names_of_the_family_of_another_architecture():
    names = ["libcuda1", "libcuda1:i386", "libcuda1x", "nvidia-smi", "nvidia-container-toolkit"]
    assert [name for name in names if _driver.is_family(name)] == ["libcuda1", "libcuda1:i386", "nvidia-smi"]


def test_many_strangers_are_named_in_the_command_alone(facts):
    packages = [Package(f"libnvidia-{letter}", "535.261.03-1", origins=[DEBIAN]) for letter in "abcdef"]
    error = only(_driver.refusals(replace(facts, packages=packages), VERSION, REPOSITORY))
    assert "libnvidia-c 535.261.03-1 and 3 more come from" in error
    assert "(apt-get purge libnvidia-a libnvidia-b libnvidia-c libnvidia-d libnvidia-e libnvidia-f)" in error


@pytest.mark.parametrize("uri", [REPOSITORY, REPOSITORY.rstrip("/")])
def test_a_second_entry_for_the_repository(facts, uri):
    file = "/etc/apt/sources.list.d/cuda-debian12-x86_64.list"
    found = replace(facts, sources=[Source(file, uri, "/usr/share/keyrings/cuda-archive-keyring.gpg")])
    error = only(_driver.refusals(found, VERSION, REPOSITORY))
    assert error.startswith(f"{file} names the repository {uri} already, signed by /usr/share/keyrings/cuda-archive-")
    assert error.endswith("or set cuda_driver_source: host")
    assert _driver.pending(found, REPOSITORY) == []


def test_a_second_entry_without_a_key(facts):
    found = replace(facts, sources=[Source("/etc/apt/sources.list", REPOSITORY, "")])
    assert "already, signed by any key that apt trusts, and" in only(_driver.refusals(found, VERSION, REPOSITORY))


def test_another_repository_of_nvidias_is_only_a_note(facts):
    uri = "https://developer.download.nvidia.com/compute/cuda/repos/debian11/x86_64/"
    found = replace(facts, sources=[Source("/etc/apt/sources.list", uri, "")])
    assert _driver.refusals(found, VERSION, REPOSITORY) == []
    assert only(_driver.pending(found, REPOSITORY)) == (
        f"/etc/apt/sources.list names NVIDIA's repository {uri} too: packages of the driver can come from there"
    )


def test_broken_packages(facts):
    error = only(_driver.refusals(replace(facts, broken=["linux-image-amd64", "systemd", "libcuda1"]), VERSION))
    assert error.startswith("the packages linux-image-amd64, systemd are not completely installed, ")
    assert "run dpkg --configure -a" in error


@pytest.mark.parametrize(
    ("mok", "wanted", "unwanted"),
    [
        (
            Mok("/var/lib/dkms/mok.pub", "no key"),
            [
                "DKMS has none yet in /var/lib/dkms/mok.pub: install dkms and mokutil, run openssl req ",
                "-keyout /var/lib/dkms/mok.key -outform DER -out /var/lib/dkms/mok.pub, then ",
                "mokutil --import /var/lib/dkms/mok.pub",
            ],
            ["update-secureboot-policy"],
        ),
        (
            Mok("/var/lib/shim-signed/mok/MOK.der", "no key"),
            ["run update-secureboot-policy --new-key, then ", "mokutil --import /var/lib/shim-signed/mok/MOK.der"],
            ["openssl"],
        ),
        (
            Mok("/var/lib/dkms/mok.pub", "not enrolled"),
            ["/var/lib/dkms/mok.pub, is not enrolled: run mokutil --import /var/lib/dkms/mok.pub", "one-time password"],
            ["openssl"],
        ),
        (Mok("/var/lib/dkms/mok.pub", "requested"), ["only waits to be confirmed: reboot"], ["--import"]),
        (Mok("/var/lib/dkms/mok.pub", "unknown"), ["cannot be told: install mokutil and run again"], ["openssl"]),
    ],
    ids=str,
)
def test_secure_boot_without_an_enrolled_key(facts, mok, wanted, unwanted):
    error = only(_driver.refusals(replace(facts, secure_boot="on", mok=mok), VERSION))
    assert error.startswith("Secure Boot is on, ")
    assert error.endswith("and run again, or switch Secure Boot off in the firmware's setup")
    assert [text for text in [*wanted, '"Enroll MOK" on the console'] if text not in error] == []
    assert [text for text in unwanted if text in error] == []


@pytest.mark.parametrize(
    "change",
    [
        {"secure_boot": "on", "mok": Mok("/var/lib/dkms/mok.pub", "enrolled")},
        {"secure_boot": "on", "loaded": VERSION},
        {"secure_boot": "off"},
        {"secure_boot": "unknown"},
    ],
    ids=str,
)
def test_secure_boot_that_is_in_nobodys_way(facts, change):
    assert _driver.refusals(replace(facts, **change), VERSION) == []


def test_an_older_driver_that_is_loaded_proves_no_key(facts):
    assert len(_driver.refusals(replace(facts, secure_boot="on", loaded="570.26"), VERSION)) == 1


def test_nvswitches(facts):
    error = only(_driver.refusals(replace(facts, nvswitches=["0000:01:00.0", "0000:02:00.0"]), VERSION))
    assert error.startswith("the host has NVSwitches (0000:01:00.0, 0000:02:00.0), ")
    assert "nvidia-fabricmanager of exactly the driver's version, which is not managed here" in error
    assert error.endswith("and set cuda_driver_source: host")


@pytest.mark.parametrize("version", ["", "580.95.05", "570.26", "1000.10.01"])
def test_versions_that_can_be_declared(version):
    assert _driver.version_complaint(version) == ""


@pytest.mark.parametrize("version", ["580", "580.95.05-1", "latest", "580.*", "580.95.05 ", "580.9"])
def test_versions_that_cannot(version):
    assert _driver.version_complaint(version) == (
        f"cuda_driver_version is {version!r}, which is no version of a driver: declare all of its parts, such as "
        "580.95.05"
    )


# Activation


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ({"loaded": VERSION, "on_disk": VERSION}, "none"),
        ({"loaded": VERSION, "on_disk": VERSION, "users": [PRIMARY]}, "none"),
        ({"loaded": VERSION, "on_disk": ""}, "none"),
        ({"on_disk": VERSION}, "load"),
        ({"on_disk": VERSION, "users": [STRANGER]}, "load"),
        ({"loaded": "570.26", "on_disk": VERSION}, "reload"),
        ({"loaded": "570.26", "on_disk": VERSION, "users": [PRIMARY]}, "wait"),
        ({"loaded": "570.26", "on_disk": VERSION, "users": [XORG]}, "wait"),
        ({"nouveau": True, "on_disk": VERSION}, "reboot"),
        ({"nouveau": True, "loaded": "570.26", "on_disk": VERSION}, "reboot"),
        ({"nouveau": True, "on_disk": "570.26"}, "missing"),
        ({}, "missing"),
        ({"loaded": "570.26"}, "missing"),
        ({"loaded": "570.26", "on_disk": "570.26", "users": [PRIMARY]}, "missing"),
    ],
    ids=str,
)
def test_activation(facts, change, step):
    found = _driver.activation(replace(facts, **change), VERSION)
    assert found.step == step
    assert found.reason


def test_with_no_declared_driver_nothing_is_to_be_done(facts):
    assert _driver.activation(replace(facts, loaded="570.26", nouveau=True), "").step == "none"


@pytest.mark.parametrize(
    ("users", "who", "remedy"),
    [
        (
            [SECONDARY, PRIMARY, replace(PRIMARY, pid=502)],
            "the engines vllm@primary.service, vllm@secondary.service",
            "set cuda_stop_engines: true to have the engines stopped and started again, and run again",
        ),
        (
            [XORG, STRANGER],
            "Xorg (process 412, gdm.service), python3 (process 413)",
            "stop them, and run again",
        ),
        (
            [XORG, PRIMARY],
            "the engines vllm@primary.service and by Xorg (process 412, gdm.service)",
            "set cuda_stop_engines: true to have the engines stopped and started again and stop the others, and run "
            "again",
        ),
    ],
)
def test_who_is_waited_for(facts, users, who, remedy):
    found = _driver.activation(replace(facts, loaded="570.26", on_disk=VERSION, users=users), VERSION)
    assert found.reason == f"driver 570.26 is loaded, wanted 580.95.05, and in use by {who}: {remedy}"


def test_what_an_engine_is_can_be_said(facts):
    found = replace(facts, loaded="570.26", on_disk=VERSION, users=[PRIMARY, XORG])
    assert _driver.engines_in_use(found) == ["vllm@primary.service"]
    assert _driver.engines_in_use(found, "gdm.*") == ["gdm.service"]
    assert "the engines gdm.service and by vllm" in _driver.activation(found, VERSION, "gdm.*").reason


def test_a_reboot_names_the_variable(facts):
    found = _driver.activation(replace(facts, nouveau=True, on_disk=VERSION), VERSION)
    assert "nouveau" in found.reason
    assert "set cuda_reboot: true, or reboot the host yourself" in found.reason


def test_a_module_that_was_not_built(facts):
    assert _driver.activation(facts, VERSION).reason == (
        f"the running kernel ({RELEASE}) has none, wanted 580.95.05: read why DKMS did not build it in "
        "/var/lib/dkms/nvidia/580.95.05/build/make.log and in dkms status, then run dkms install nvidia/580.95.05"
    )
    bare = replace(facts, kernel=Kernel(RELEASE, False), on_disk="570.26")
    reason = _driver.activation(bare, VERSION).reason
    assert reason.startswith(f"the module nvidia for the running kernel ({RELEASE}) is 570.26, wanted 580.95.05: its ")
    assert f"install linux-headers-{RELEASE}" in reason


# Notes and holds


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({}, []),
        ({"loaded": VERSION, "on_disk": VERSION}, []),
        (
            {"reboot_required": True, "reboot_packages": ["libc6", "linux-image-amd64"]},
            ["the host waits for a reboot for libc6, linux-image-amd64 (/run/reboot-required)"],
        ),
        ({"reboot_required": True}, ["the host waits for a reboot (/run/reboot-required)"]),
        (
            {"loaded": "570.26", "on_disk": VERSION},
            ["driver 580.95.05 is on disk, and 570.26 is loaded: the next boot changes that"],
        ),
        ({"on_disk": VERSION}, ["driver 580.95.05 is on disk, and none is loaded: the next boot changes that"]),
        (
            {"loaded": VERSION},
            [
                f"driver 580.95.05 is loaded, but there is no module nvidia on disk for kernel {RELEASE}: after a "
                "reboot into it there is no driver"
            ],
        ),
    ],
    ids=str,
)
def test_notes(facts, change, notes):
    assert _driver.pending(replace(facts, **change)) == notes


def test_holds_that_are_missing(facts):
    packages = [
        Package("libcuda1", "580.95.05-1", held=True),
        Package("libnvidia-ml1", "580.95.05-1"),
        Package("nvidia-settings", "570.26-1"),
        Package("libnvidia-compute", "1:580.95.05-0ubuntu1"),
    ]
    found = replace(facts, packages=packages)
    assert _driver.holds_missing(found, VERSION) == ["libnvidia-ml1", "libnvidia-compute"]
    assert _driver.holds_missing(found, "") == []


def test_what_an_interrupted_run_left_of_the_driver_is_no_reason_to_stop(facts):
    assert _driver.refusals(replace(facts, broken=["nvidia-kernel-open-dkms"]), VERSION) == []


@pytest.mark.parametrize(
    ("loaded", "users", "named"),
    [("570.211.01", True, True), (VERSION, True, False), ("", True, False), ("570.211.01", False, False)],
)
def test_only_another_version_that_is_used_stands_in_the_way(facts, loaded, users, named):
    found = replace(facts, loaded=loaded, users=[_driver.User(42, "python3", "")] if users else [])
    assert ("python3 (process 42)" in _driver.in_use(found, VERSION)) is named


def test_modules_go_after_those_that_use_them(host):
    for name, holders in {
        "nvidia": ["nvidia_modeset", "nvidia_uvm", "gdrdrv"],
        "nvidia_modeset": ["nvidia_drm"],
        "nvidia_uvm": ["nvidia_fs"],
        "nvidia_drm": [],
        "nvidia_fs": [],
        "gdrdrv": [],
    }.items():
        host.file(f"sys/module/{name}/refcnt", "0\n")
        for holder in holders:
            host.file(f"sys/module/{name}/holders/{holder}", "")
    assert host.read().unload == ["nvidia_drm", "nvidia_modeset", "nvidia_fs", "nvidia_uvm", "gdrdrv", "nvidia"]


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        (["linux-image-amd64", "linux-image-6.1.0-37-amd64", "linux-image-6.1.0-37-amd64-dbg"], ["amd64"]),
        (["linux-image-cloud-amd64"], ["cloud-amd64"]),
        (["linux-image-amd64-dbg", "linux-image-unsigned-6.8.0-51-generic"], []),
        (["linux-image-generic-hwe-22.04", "linux-image-generic"], ["generic", "generic-hwe-22.04"]),
    ],
)
def test_headers_follow_the_kernels_of_the_host(packages, expected):
    names = _driver.header_packages("6.1.0-37-amd64", packages)
    assert names == [f"linux-headers-{name}" for name in ["6.1.0-37-amd64", *expected]]


@pytest.mark.parametrize(
    ("name", "stops"), [("dkms", False), ("gcc-12", False), ("libc6-dev", False), ("systemd", True)]
)
def test_what_comes_along_with_the_driver_is_set_right_by_the_next_run(facts, name, stops):
    assert bool(_driver.refusals(replace(facts, broken=[name]), VERSION)) is stops
