"""The stand-ins for NVIDIA's repository, for a kernel with NVIDIA's modules, and for nvidia-smi on top of both."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

FAKES = Path(__file__).parents[1] / "fakes"
FIRST, SECOND = "580.95.05", "580.105.08"
RELEASE = os.uname().release
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("NVL_STAND_IN", "NVIDIA_SMI_STATE"))}
#: What a host gets from the Debian repository for computing, without what comes along.
DRIVER = ("nvidia-driver-cuda", "nvidia-kernel-open-dkms")
CLOSURE = {
    *DRIVER,
    "nvidia-kernel-support",
    "firmware-nvidia-gsp",
    "libcuda1",
    "libnvidia-ptxjitcompiler1",
    "libnvidia-ml1",
}


def run(*command, **environment):
    """Status, standard output and standard error of a program."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**CLEAN, **environment}, timeout=60)
    return done.returncode, done.stdout, done.stderr


# The repository


def make(out, *options):
    """The summary of a repository that is made, or found to be there."""
    status, told, complaint = run(FAKES / "nvidia_repository", out, *options)
    assert status == 0, complaint
    return json.loads(told)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("repository") / "debian12"
    make(out)
    return out


class Apt:
    """apt in a root of its own, on a host that has python3 and nothing else."""

    def __init__(self, root):
        self.root = root
        for name in ("lists/partial", "cache/archives/partial"):
            (root / name).mkdir(parents=True)
        (root / "status").write_text(
            "Package: python3\nStatus: install ok installed\nArchitecture: amd64\nVersion: 3.11\n\n"
        )
        settings = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": root,
            "Dir::State::status": root / "status",
            "Dir::Cache": root / "cache",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "",
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
        }
        (root / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))

    def __call__(self, *words):
        status, out, complaint = run(*words, APT_CONFIG=str(self.root / "apt.conf"), LC_ALL="C.UTF-8")
        return status, out + complaint

    def update(self, repository, key="3bf863cc.pub"):
        """Take a repository with the key that it offers."""
        # apt wants a name that says that it is armored.
        (self.root / "key.asc").write_bytes((repository / key).read_bytes())
        (self.root / "sources.list").write_text(f"deb [signed-by={self.root}/key.asc] file:{repository} /\n")
        return self("apt-get", "update")

    def would_install(self, *words):
        """Packages and versions that apt would install."""
        status, told = self("apt-get", "install", "--simulate", "--no-install-recommends", *words)
        assert status == 0, told
        return dict(re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+)", told, re.MULTILINE))


@pytest.fixture
def apt(tmp_path):
    return Apt(tmp_path / "apt")


def offered(apt, package):
    return re.findall(rf"^ *{package} \| (\S+) \|", apt("apt-cache", "madison", package)[1], re.MULTILINE)


@pytest.mark.parametrize(("name", "versions"), [("good", [SECOND, FIRST]), ("old", [FIRST])])
def test_a_well_signed_repository_is_accepted(apt, repository, name, versions):
    status, told = apt.update(repository / name)
    assert status == 0, told
    assert offered(apt, "nvidia-driver-cuda") == [f"{version}-1" for version in versions]
    assert "o=NVIDIA,l=NVIDIA CUDA" in apt("apt-cache", "policy")[1]


@pytest.mark.parametrize(
    ("name", "why"), [("tampered", "Hash Sum mismatch"), ("expired", "EXPKEYSIG"), ("stranger", "NO_PUBKEY")]
)
def test_a_repository_that_is_not_to_be_trusted_is_refused(apt, repository, name, why):
    status, told = apt.update(repository / name)
    assert status != 0
    assert why in told
    assert offered(apt, "nvidia-driver-cuda") == []


def test_the_fingerprint_is_the_good_keys(repository):
    fingerprint = (repository / "fingerprint").read_text().strip()
    for name, same in {"good": True, "old": True, "tampered": True, "stranger": True, "expired": False}.items():
        told = run("gpg", "--show-keys", "--with-colons", repository / name / "3bf863cc.pub")[1]
        assert (f":{fingerprint}:" in told) is same, name


def test_exact_versions_bring_the_whole_driver_at_that_version(apt, repository):
    apt.update(repository / "good")
    exact = (f"{name}={FIRST}-1" for name in CLOSURE)
    assert apt.would_install(*exact) == {**dict.fromkeys(CLOSURE, f"{FIRST}-1"), "dkms": "99"}
    assert apt.would_install(*DRIVER) == {**dict.fromkeys(CLOSURE, f"{SECOND}-1"), "dkms": "99"}


def test_the_metapackage_alone_locks_no_version(apt, repository):
    apt.update(repository / "good")
    found = apt.would_install(f"nvidia-open={FIRST}-1")
    assert found.pop("nvidia-open") == f"{FIRST}-1"
    assert found == {**dict.fromkeys(CLOSURE, f"{SECOND}-1"), "dkms": "99"}


def test_headers_and_toolkits_do_not_follow_the_driver(apt, repository):
    apt.update(repository / "good")
    assert apt.would_install("linux-headers-amd64", "cuda-toolkit-13-0", "cuda-toolkit-12-9") == {
        "linux-headers-amd64": "99",
        f"linux-headers-{RELEASE}": "1",
        "cuda-toolkit-13-0": "13.0.2-1",
        "cuda-nvcc-13-0": "13.0.88-1",
        "cuda-toolkit-12-9": "12.9.1-1",
        "cuda-nvcc-12-9": "12.9.86-1",
    }


def test_ubuntu_has_names_with_the_branch(apt, tmp_path):
    make(tmp_path / "out", "--distribution", "ubuntu2404", "--version", FIRST)
    status, told = apt.update(tmp_path / "out/good")
    assert status == 0, told
    wanted = ("libnvidia-compute-580", "nvidia-utils-580", "nvidia-dkms-580-open", "nvidia-compute-utils-580")
    found = apt.would_install(*wanted, "nvidia-modprobe")
    names = (*wanted, "nvidia-modprobe", "nvidia-kernel-common-580")
    assert found == {**dict.fromkeys(names, f"{FIRST}-0ubuntu1"), "dkms": "99"}


def test_debian13_offers_its_key_under_its_own_name(apt, tmp_path):
    summary = make(tmp_path / "out", "--distribution", "debian13", "--version", FIRST)
    assert apt.update(tmp_path / "out/good", summary["key_file"])[0] == 0
    assert summary["key_file"] == "8793F200.pub"


def test_every_package_says_what_it_is(repository):
    debs = list((repository / "good").glob("*.deb"))
    assert len(debs) == 7 + 2 * 11
    for deb in debs:
        assert "stand-in for tests" in run("dpkg-deb", "--field", deb, "Description")[1].splitlines()[0], deb.name


def test_the_package_with_nvidia_smi_knows_its_version(repository, tmp_path):
    run("dpkg-deb", "--extract", repository / f"good/nvidia-driver-cuda_{FIRST}-1_amd64.deb", tmp_path)
    assert (tmp_path / "usr/share/nvl-stand-in/library-version").read_text() == f"{FIRST}\n"
    assert (tmp_path / "usr/bin/nvidia-smi").read_bytes() == (FAKES / "nvidia-smi").read_bytes()
    assert os.access(tmp_path / "usr/bin/nvidia-smi", os.X_OK)


def test_a_second_run_leaves_what_is_there(tmp_path):
    out = tmp_path / "out"
    options = ("--version", FIRST)
    first = make(out, *options)
    again = make(out, *options)
    assert (first.pop("result"), again.pop("result")) == ("created", "unchanged")
    assert first == again
    packages = (out / "good/Packages").read_bytes()
    # A new version makes it anew, with new keys and the same packages.
    assert make(out, *options, "--version", SECOND)["result"] == "created"
    assert (out / "old/Packages").read_bytes() == packages


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--version", "580"), "--version 580: wanted a driver's version such as 580.95.05"),
        (("--version", FIRST, "--version", FIRST), f"--version: {FIRST} {FIRST} names a version twice"),
        (("--distribution", "ubuntu2404", "--version", "590.48.01"), "known up to branch 580"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(tmp_path, options, why):
    status, _, complaint = run(FAKES / "nvidia_repository", tmp_path / "out", *options)
    assert status == 1
    assert why in complaint
    assert not (tmp_path / "out").exists()


def test_somebody_elses_directory_is_left_alone(tmp_path):
    (tmp_path / "precious").touch()
    status, _, complaint = run(FAKES / "nvidia_repository", tmp_path)
    assert (status, (tmp_path / "precious").exists()) == (1, True)
    assert "was not made here: name another directory" in complaint


# The kernel


class Machine:
    """A host of the stand-ins, all below one directory."""

    def __init__(self, root):
        self.root = root
        self.sys = root / "run/nvl-stand-in/sys"
        (root / "bin").mkdir(parents=True)
        for name in ("kernel", "modprobe", "rmmod", "modinfo", "mokutil"):
            (root / "bin" / name).symlink_to(FAKES / "kernel")
        (root / "bin/nvidia-smi").symlink_to(FAKES / "nvidia-smi")
        self.environment = {"NVL_STAND_IN_ROOT": str(root), "NVIDIA_SMI_STATE": "idle"}

    def __call__(self, program, *words):
        """Status and what was written, on either stream."""
        status, out, complaint = run(self.root / "bin" / program, *words, **self.environment)
        return status, (out + complaint).strip()

    def write(self, path, text=""):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def built(self, version):
        """The packages' module is on disk."""
        self.write(f"lib/modules/{RELEASE}/updates/dkms/nvidia.ko", f"{version}\n")

    def installed(self, version):
        """The package with nvidia-smi is installed."""
        self.write("usr/share/nvl-stand-in/library-version", f"{version}\n")

    @property
    def loaded(self):
        return {path.name for path in (self.sys / "module").glob("*")}

    def query(self, fields, *words):
        status, told = self("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *words)
        assert status == 0, told
        return told.splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "machine")


def test_a_module_that_was_not_built_is_not_found(machine):
    absent = f"Module nvidia not found in directory /lib/modules/{RELEASE}"
    assert machine("modprobe", "nvidia") == (1, f"modprobe: FATAL: {absent}")
    assert machine("modprobe", "-a", "nvidia") == (1, f"modprobe: WARNING: {absent}")
    assert machine("modprobe", "-q", "nvidia") == (1, "")
    assert machine("modinfo", "-F", "version", "nvidia") == (1, "modinfo: ERROR: Module nvidia not found.")
    assert machine.loaded == set()


def test_a_module_is_loaded_with_what_it_needs_at_the_version_on_disk(machine):
    machine.built(FIRST)
    assert machine("modprobe", "nvidia-uvm") == (0, "")
    assert machine.loaded == {"nvidia", "nvidia_uvm"}
    # What is loaded stays what it is when the file changes.
    machine.built(SECOND)
    assert machine("modprobe", "nvidia") == (0, "")
    assert (machine.sys / "module/nvidia/version").read_text() == f"{FIRST}\n"
    assert machine("modinfo", "-k", RELEASE, "-F", "version", "nvidia") == (0, SECOND)
    assert machine("modinfo", "-k", "1.0", "-F", "version", "nvidia")[0] == 1


def test_words_after_a_module_are_its_parameters(machine):
    machine.built(FIRST)
    machine("modprobe", "nvidia", "nvidia-uvm")
    assert machine.loaded == {"nvidia"}
    machine("modprobe", "--all", "nvidia", "nvidia-uvm")
    assert machine.loaded == {"nvidia", "nvidia_uvm"}


def test_a_module_in_use_stays(machine):
    machine.built(FIRST)
    machine("modprobe", "nvidia-uvm")
    assert machine("rmmod", "nvidia") == (1, "rmmod: ERROR: Module nvidia is in use by: nvidia_uvm")
    assert machine("modprobe", "-r", "nvidia") == (1, "modprobe: FATAL: Module nvidia is in use.")
    machine("rmmod", "nvidia_uvm")
    machine.write("run/nvl-stand-in/sys/module/nvidia/in_use")
    assert machine("rmmod", "nvidia") == (1, "rmmod: ERROR: Module nvidia is in use")
    assert machine("modprobe", "-r", "nvidia") == (1, "modprobe: FATAL: Module nvidia is in use.")
    assert machine.loaded == {"nvidia"}


def test_modules_are_removed(machine):
    machine.built(FIRST)
    machine("modprobe", "nvidia-uvm")
    assert machine("modprobe", "-r", "nvidia-uvm", "nvidia") == (0, "")
    assert machine.loaded == set()
    assert machine("modprobe", "-r", "nvidia") == (0, "")
    assert machine("rmmod", "nvidia") == (1, "rmmod: ERROR: Module nvidia is not currently loaded")


def test_secure_boot_may_reject_the_module(machine):
    machine.built(FIRST)
    machine.write("run/nvl-stand-in/sys/firmware/secure-boot-rejects")
    rejected = "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service"
    assert machine("modprobe", "nvidia") == (1, rejected)
    assert machine.loaded == set()


def test_nouveau_keeps_the_gpus_for_itself(machine):
    machine.built(FIRST)
    machine.write("run/nvl-stand-in/sys/firmware/has-nouveau")
    assert machine("kernel", "boot") == (0, "loaded nouveau")
    assert machine("modprobe", "nvidia") == (1, "modprobe: ERROR: could not insert 'nvidia': No such device")
    assert machine("modprobe", "-r", "nouveau") == (1, "modprobe: FATAL: Module nouveau is in use.")
    machine.write("etc/modprobe.d/x.conf", "# ours\nblacklist nouveau\noptions nouveau modeset=0\n")
    assert machine("kernel", "boot") == (0, "loaded nvidia")
    assert machine.loaded == {"nvidia"}


@pytest.mark.parametrize("line", ["blacklist nvidia", "install nvidia /bin/false"])
def test_a_boot_leaves_out_what_is_blocked(machine, line):
    machine.built(FIRST)
    machine.write("etc/modprobe.d/x.conf", f"{line}\n")
    assert machine("kernel", "boot") == (0, "")
    assert machine.loaded == set()


def test_a_boot_loads_what_is_on_disk_now(machine):
    machine.built(FIRST)
    machine("modprobe", "nvidia-uvm")
    machine.write("run/nvl-stand-in/sys/module/nvidia/in_use")
    machine.built(SECOND)
    machine("kernel", "boot")
    assert machine.loaded == {"nvidia"}
    assert [path.name for path in (machine.sys / "module/nvidia").iterdir()] == ["version"]
    assert (machine.sys / "module/nvidia/version").read_text() == f"{SECOND}\n"


def test_firmware_tells_of_secure_boot_and_of_keys(machine, tmp_path):
    key = tmp_path / "mok.pub"
    assert machine("mokutil", "--sb-state") == (1, "EFI variables are not supported on this system")
    machine.write("run/nvl-stand-in/sys/firmware/secure-boot", "enabled\n")
    assert machine("mokutil", "--sb-state") == (0, "SecureBoot enabled")
    assert machine("mokutil", "--test-key", key) == (255, f"Failed to open {key}")
    key.touch()
    assert machine("mokutil", "--test-key", key) == (0, f"{key} is not enrolled")
    machine.write("run/nvl-stand-in/sys/firmware/enrolled", f"{key}\n")
    assert machine("mokutil", "--test-key", key) == (1, f"{key} is already enrolled")


def test_gpus_come_onto_the_bus_and_go(machine):
    devices = machine.sys / "bus/pci/devices"
    machine("kernel", "pci", "3", "2330")
    machine("kernel", "pci", "2")
    assert sorted(path.name for path in devices.iterdir()) == ["0000:ad:00.0", "0000:ae:00.0"]
    told = {path.name: path.read_text().strip() for path in (devices / "0000:ae:00.0").iterdir()}
    assert told == {"vendor": "0x10de", "class": "0x030200", "device": "0x2321"}
    machine("kernel", "pci", "0")
    assert list(devices.iterdir()) == []


def test_the_tree_is_where_the_environment_or_a_file_says(machine, tmp_path):
    machine.write("etc/nvl-stand-in/sys", f"{tmp_path}/filed\n")
    machine("kernel", "pci", "1")
    machine.environment["NVL_STAND_IN_SYS"] = f"{tmp_path}/named"
    machine("kernel", "pci", "3")
    assert len(machine.query("index")) == 3
    del machine.environment["NVL_STAND_IN_SYS"]
    assert len(machine.query("index")) == 1
    assert not machine.sys.exists()


# nvidia-smi


def test_an_installed_nvidia_smi_needs_a_module_of_its_version(machine):
    machine.installed(SECOND)
    status, told = machine("nvidia-smi")
    assert status == 9
    assert "couldn't communicate with the NVIDIA driver" in told
    machine.built(FIRST)
    machine("modprobe", "nvidia")
    told = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105"
    assert machine("nvidia-smi") == (18, told)
    machine("modprobe", "-r", "nvidia")
    machine.built(SECOND)
    machine("modprobe", "nvidia")
    assert machine.query("driver_version,persistence_mode") == [f"{SECOND}, Disabled"] * 2


def test_an_installed_nvidia_smi_is_in_the_state_that_was_chosen(machine):
    machine.installed("590.48.01")
    machine.built("590.48.01")
    machine("modprobe", "nvidia")
    machine.environment["NVIDIA_SMI_STATE"] = "busy mib=4096"
    assert machine.query("memory.used,driver_version", "-i", "0") == ["4096, 590.48.01"]
    assert "CUDA Version: 13.1" in machine("nvidia-smi")[1]
    machine.environment["NVIDIA_SMI_STATE"] = "no_devices"
    assert machine("nvidia-smi")[0] == 6


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_gpus_are_those_on_the_bus(machine, count):
    machine("kernel", "pci", str(count))
    places = [f"{index}, 00000000:{place}:00.0" for index, place in enumerate(["AD", "AE", "AF", "B0"][:count])]
    assert machine.query("index,pci.bus_id") == places
    assert len(set(machine.query("uuid"))) == count


def test_bridges_join_cards_in_pairs(machine):
    machine("kernel", "pci", "4")
    rows = [line.split("\t")[:5] for line in machine("nvidia-smi", "topo", "-m")[1].splitlines()[1:5]]
    assert rows == [
        ["GPU0", " X ", "NV12", "SYS", "SYS"],
        ["GPU1", "NV12", " X ", "SYS", "SYS"],
        ["GPU2", "SYS", "SYS", " X ", "NV12"],
        ["GPU3", "SYS", "SYS", "NV12", " X "],
    ]


@pytest.mark.parametrize(
    ("words", "field", "before", "after", "told"),
    [
        (("-pm", "0"), "persistence_mode", "Enabled", "Disabled", "Disabled persistence mode for GPU {}."),
        (
            ("-c", "3"),
            "compute_mode",
            "Default",
            "Exclusive_Process",
            "Set compute mode to EXCLUSIVE_PROCESS for GPU {}.",
        ),
        (("-c", "EXCLUSIVE_PROCESS"), "compute_mode", "Default", "Exclusive_Process", "Set compute mode to {1}"),
        (
            ("-pl", "310"),
            "power.limit",
            "400.00",
            "310.00",
            "Power limit for GPU {} was set to 310.00 W from 400.00 W.",
        ),
        (("-mig", "1"), "mig.mode.current", "Disabled", "Enabled", "Enabled MIG Mode for GPU {}"),
    ],
)
def test_a_setting_reads_back_on_its_gpu_alone(machine, words, field, before, after, told):
    status, text = machine("nvidia-smi", "-i", "1", *words)
    assert (status, text.splitlines()[-1]) == (0, "All done.")
    assert told.format("00000000:AE:00.0", "EXCLUSIVE_PROCESS") in text
    assert machine.query(field) == [before, after]


def test_a_setting_without_a_gpu_is_for_all_and_told_in_the_xml(machine):
    machine("nvidia-smi", "-pl", "250.5")
    machine("nvidia-smi", "-c", "3")
    xml = machine("nvidia-smi", "-q", "-x")[1]
    assert xml.count("<current_power_limit>250.50 W</current_power_limit>") == 2
    assert xml.count("<compute_mode>Exclusive_Process</compute_mode>") == 2
    assert machine("nvidia-smi", "-pm", "1")[1].count("Persistence mode is already Enabled for GPU") == 2
    assert machine("nvidia-smi", "-c", "3")[1].count("Compute mode is already set to EXCLUSIVE_PROCESS for GPU") == 2
    machine("nvidia-smi", "-c", "DEFAULT")
    assert machine.query("compute_mode,power.limit") == ["Default, 250.50"] * 2


@pytest.mark.parametrize("watts", ["199", "401"])
def test_a_power_limit_outside_the_boards_range_is_refused(machine, watts):
    status, told = machine("nvidia-smi", "-i", "0", "-pl", watts)
    assert status == 2
    assert told == (
        f"Provided power limit {watts}.00 W is not a valid power limit which should be between 200.00 W and 400.00 W "
        "for GPU 00000000:AD:00.0\nTerminating early due to previous errors."
    )
    assert machine.query("power.limit") == ["400.00"] * 2


def test_without_persistence_mode_a_power_limit_is_lost_at_once(machine):
    machine("nvidia-smi", "-pl", "300")
    machine("nvidia-smi", "-pm", "0")
    assert machine.query("power.limit") == ["400.00"] * 2
    status, told = machine("nvidia-smi", "-pl", "300")
    assert status == 0
    assert "persistence mode is disabled on device 00000000:AD:00.0" in told
    assert machine.query("power.limit") == ["400.00"] * 2


def test_mig_waits_for_the_processes_of_the_gpu(machine):
    machine.environment["NVIDIA_SMI_STATE"] = "busy"
    status, told = machine("nvidia-smi", "-mig", "1")
    assert status == 0
    assert "MIG mode is in pending enable state for GPU 00000000:AD:00.0:In use by another client" in told
    assert "Enabled MIG Mode for GPU 00000000:AE:00.0" in told
    assert machine.query("mig.mode.current,mig.mode.pending") == ["Disabled, Enabled", "Enabled, Enabled"]


def test_settings_go_with_the_module_and_with_a_boot(machine):
    machine.installed(FIRST)
    machine.built(FIRST)
    wants = ["Enabled, Exclusive_Process, 300.00"] * 2
    forgotten = ["Disabled, Default, 400.00"] * 2
    for forget in (("modprobe", "-r", "nvidia"), ("kernel", "boot")):
        machine("modprobe", "nvidia")
        for words in (("-pm", "1"), ("-c", "3"), ("-pl", "300")):
            machine("nvidia-smi", *words)
        assert machine.query("persistence_mode,compute_mode,power.limit") == wants
        machine(*forget)
        machine("modprobe", "nvidia")
        assert machine.query("persistence_mode,compute_mode,power.limit") == forgotten


@pytest.mark.parametrize("words", [("-pm", "2"), ("-c", "1"), ("-pl", "much"), ("-mig", "on")])
def test_a_setting_that_is_none_is_refused(machine, words):
    assert machine("nvidia-smi", *words)[0] == 2
    assert not (machine.sys / "nvl-settings.json").exists()
