"""Role cuda: what it leaves behind, and what it refuses. Only kernel, boards and NVIDIA's packages are stand-ins."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from gpu_hosts import DECLARED, NEWER, SYS, TOO_OLD, cuda, installed, run, smi, state, versions
from testinfra.host import Host

STRANGER = "0" * 40


# What a deployed host has


def test_the_declared_version_is_installed_held_loaded_and_seen(host: Host) -> None:
    found = installed(host)
    assert {"nvidia-driver-cuda", "nvidia-kernel-open-dkms", "libcuda1", "libnvidia-ml1"} <= set(found)
    assert set(found.values()) == {(f"{DECLARED}-1", True)}
    assert host.file(f"{SYS}/module/nvidia/version").content_string.strip() == DECLARED
    assert smi(host, "driver_version") == [DECLARED] * 2
    assert smi(host, "name") == ["NVIDIA H100 NVL"] * 2


def test_nouveau_made_a_reboot_necessary_on_one_host_only(bookworm: Host, trixie: Host) -> None:
    uptime = "systemctl show --property=UserspaceTimestampMonotonic --value"
    assert int(trixie.check_output(uptime)) > int(bookworm.check_output(uptime))
    for host in (bookworm, trixie):
        assert not host.file(f"{SYS}/module/nouveau").exists
        assert "blacklist nouveau" in host.file("/etc/modprobe.d/nvl-vllm-nouveau.conf").content_string


def test_an_upgrade_of_the_system_leaves_the_driver_alone(host: Host) -> None:
    before = installed(host)
    host.run_expect([0], "apt-get -y -q dist-upgrade")
    assert installed(host) == before
    # Each of hold and pin is enough.
    host.run_expect([0], "mv /etc/apt/preferences.d/nvl-vllm-cuda /root/")
    simulated = host.check_output("apt-get --simulate dist-upgrade")
    host.run_expect([0], "mv /root/nvl-vllm-cuda /etc/apt/preferences.d/")
    assert "nvidia" in simulated  # kept back
    assert "Inst nvidia" not in simulated
    assert NEWER in host.check_output("apt-cache madison nvidia-driver-cuda")
    policy = host.check_output("apt-cache policy nvidia-driver-cuda")
    assert f"Candidate: {DECLARED}-1" in policy


def test_unattended_upgrades_and_needrestart_know(host: Host) -> None:
    assert '"libnvidia-"' in host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    host.run_expect([0], "perl -c /etc/needrestart/conf.d/nvl-vllm.conf")


def test_settings_are_there_again_after_a_reboot(bookworm: Host) -> None:
    assert smi(bookworm, "power.limit") == ["350.00"] * 2
    assert smi(bookworm, "persistence_mode") == ["Enabled"] * 2
    # A boot forgets them; the unit brings them back.
    bookworm.run_expect([0], "systemctl stop nvidia-gpu-settings nvidia-persistenced && kernel boot")
    assert smi(bookworm, "power.limit") == ["400.00"] * 2
    bookworm.run_expect([0], "systemctl start nvidia-gpu-settings nvidia-persistenced")
    assert smi(bookworm, "power.limit") == ["350.00"] * 2
    assert smi(bookworm, "persistence_mode") == ["Enabled"] * 2
    assert bookworm.service("nvidia-gpu-settings").is_enabled


def test_check_mode_changes_nothing(bookworm: Host) -> None:
    before = state(bookworm)
    status, text = cuda("--check", "--diff", cuda_driver_version=NEWER)
    assert status == 0, text
    assert f"+nvidia-driver-cuda {NEWER}-1" in text
    assert state(bookworm) == before


# What is refused, with the host as it was


REFUSED = {
    "too old for the declared vLLM": (
        {"cuda_driver_version": TOO_OLD},
        ["0.32.0", "CUDA 13.0", TOO_OLD, "580.65.06"],
    ),
    "not on offer": ({"cuda_driver_version": "580.200.01"}, ["580.200.01", DECLARED, NEWER]),
    "another key": (
        {"cuda_repository_fingerprints": [STRANGER], "cuda_repository_url": "http://127.0.0.1:8900/old"},
        [STRANGER, "cuda_repository_fingerprints"],
    ),
    "changed index": ({"cuda_repository_url": "http://127.0.0.1:8900/tampered"}, ["apt refuses", "tampered"]),
    "no repository": ({"cuda_repository_url": "http://127.0.0.1:8900/nothing"}, ["apt refuses", "nothing"]),
    "power outside the board's range": ({"cuda_power_limit": "700"}, ["cuda_power_limit", "700", "200", "400"]),
    "other boards": ({"cuda_gpus": ["NVIDIA H100 PCIe"]}, ["cuda_gpus is NVIDIA H100 PCIe", "NVIDIA H100 NVL"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(bookworm: Host, case: str) -> None:
    variables, words = REFUSED[case]
    before = state(bookworm)
    status, text = cuda(**variables)
    assert status != 0, text
    assert [word for word in words if word not in text] == []
    assert state(bookworm) == before


@pytest.mark.parametrize("variant", ["expired", "stranger"])
def test_a_signature_that_apt_does_not_take_is_refused(bookworm: Host, variant: str) -> None:
    key = bookworm.check_output(
        f"cat /srv/made/{variant}/3bf863cc.pub | python3 -c 'import sys; print(len(sys.stdin.read()))'"
    )
    assert int(key) > 100
    before = state(bookworm)
    status, text = cuda(cuda_repository_url=f"http://127.0.0.1:8900/{variant}")
    assert status != 0, text
    assert "Nothing was installed" in text or "nothing was trusted" in text, text
    assert state(bookworm) == before


@pytest.fixture
def secure_boot(bookworm: Host) -> Iterator[None]:
    bookworm.run_expect([0], f"mkdir -p {SYS}/firmware/efi && echo enabled >{SYS}/firmware/secure-boot")
    yield
    bookworm.run_expect([0], f"rm -r {SYS}/firmware/efi {SYS}/firmware/secure-boot")


@pytest.mark.usefixtures("secure_boot")
def test_secure_boot_without_an_enrolled_key_is_refused(bookworm: Host) -> None:
    before = state(bookworm)
    status, text = cuda(cuda_driver_version=NEWER)
    assert status != 0
    assert "Secure Boot is on" in text
    assert "Enroll MOK" in text
    assert state(bookworm) == before


@pytest.fixture
def in_use(bookworm: Host) -> Iterator[str]:
    """A program that has a GPU open."""
    bookworm.run_expect(
        [0], "touch /dev/nvidia0; systemd-run --unit training sh -c 'exec sleep infinity </dev/nvidia0'"
    )
    yield "training.service"
    bookworm.run_expect([0], "systemctl stop training; rm /dev/nvidia0")


def test_a_driver_in_use_is_not_changed(bookworm: Host, in_use: str) -> None:
    before = state(bookworm)
    status, text = cuda(cuda_driver_version=NEWER)
    assert status != 0
    assert in_use in text
    assert "sleep (process" in text
    assert state(bookworm) == before


# Changes


def test_another_version_by_variable_and_back(bookworm: Host) -> None:
    for version in (NEWER, DECLARED):
        status, text = cuda(cuda_driver_version=version)
        assert status == 0, text
        assert set(installed(bookworm).values()) == {(f"{version}-1", True)}
        assert smi(bookworm, "driver_version") == [version] * 2
        assert smi(bookworm, "power.limit") == ["350.00"] * 2
    status, text = cuda()
    assert status == 0
    assert "changed=0" in text


def test_an_engine_that_holds_a_gpu_is_stopped_and_started_where_that_is_allowed(bookworm: Host) -> None:
    unit = "vllm@stand-in.service"
    bookworm.run_expect(
        [0],
        "touch /dev/nvidia0; printf '[Service]\\nExecStart=/bin/sh -c \"exec sleep infinity </dev/nvidia0\"\\n'"
        f" >/run/systemd/system/{unit} && systemctl daemon-reload && systemctl start {unit}",
    )
    pid = bookworm.check_output(f"systemctl show --property MainPID --value {unit}")
    status, text = cuda(cuda_driver_version=NEWER)
    assert status != 0
    assert "cuda_stop_engines" in text
    assert bookworm.check_output(f"systemctl show --property MainPID --value {unit}") == pid
    status, text = cuda(cuda_driver_version=NEWER, cuda_stop_engines=True)
    assert status == 0, text
    assert bookworm.service(unit).is_running
    assert bookworm.check_output(f"systemctl show --property MainPID --value {unit}") != pid
    assert smi(bookworm, "driver_version") == [NEWER] * 2
    # Also where the run fails later on.
    status, text = cuda(cuda_stop_engines=True, cuda_gpus=["NVIDIA H100 PCIe"])
    assert status != 0
    assert smi(bookworm, "driver_version") == [DECLARED] * 2
    assert bookworm.service(unit).is_running
    bookworm.run_expect([0], f"systemctl stop {unit}; rm /run/systemd/system/{unit} /dev/nvidia0")
    assert cuda()[0] == 0


def test_libraries_that_an_upgrade_replaced_are_found_and_brought_back(bookworm: Host) -> None:
    names = " ".join(f"{name}={NEWER}-1" for name in installed(bookworm))
    bookworm.run_expect(
        [0],
        f"mv /etc/apt/preferences.d/nvl-vllm-cuda /root/; apt-get -y -q --allow-change-held-packages install {names}",
    )
    assert bookworm.run("nvidia-smi").rc == 18
    status, text = run("playbooks/preflight.yml", cuda_driver_source="host")
    assert status != 0
    assert "kernel module and libraries are of different versions" in text
    status, text = cuda()
    assert status == 0, text
    assert versions(bookworm) == {f"{DECLARED}-1"}
    assert smi(bookworm, "driver_version") == [DECLARED] * 2


def test_a_module_that_cannot_be_built_is_told_and_the_next_run_mends_it(bookworm: Host) -> None:
    bookworm.run_expect([0], "touch /etc/nvl-stand-in/dkms-fails")
    status, text = cuda(cuda_driver_version=NEWER)
    assert status != 0
    assert f"the driver {NEWER} could not be installed" in text
    assert "nvidia-kernel-open-dkms" in text
    bookworm.run_expect([0], "rm /etc/nvl-stand-in/dkms-fails")
    status, text = cuda()
    assert status == 0, text
    assert versions(bookworm) == {f"{DECLARED}-1"}


def test_the_toolkit_comes_beside_others(bookworm: Host) -> None:
    status, text = cuda(cuda_toolkit_version="13.0")
    assert status == 0, text
    assert "release 13.0" in bookworm.check_output("/usr/local/cuda-13.0/bin/nvcc --version")


# A bare host without a network


def podman(command: str, *arguments: str) -> str:
    argv = ["podman", command, *arguments, "nvl-vllm-gpu-bookworm"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def bare_and_cut_off(bookworm: Host) -> Iterator[None]:
    """No driver, no way out, and no repository but the one on the controller."""
    names = " ".join(installed(bookworm))
    bookworm.run_expect([0], f"apt-get -y -q --allow-change-held-packages purge {names}")
    bookworm.run_expect([0], "rm -f /etc/apt/*.d/*cuda* /etc/apt/keyrings/nvidia-cuda.asc && kernel boot")
    pid = podman("inspect", "--format", "{{.State.Pid}}")
    # With this machine's rights, as containers may not change their routes.
    inside = ["nsenter", "--target", pid, "--net", "--mount", "ip", "route"]
    route = bookworm.check_output("ip route show default").split()
    subprocess.run([*inside, "del", "default"], check=True)
    bookworm.run_expect([0], "systemctl stop stand-in-repository")
    assert bookworm.run("ip route get 192.0.2.1").rc != 0
    yield
    subprocess.run([*inside, "add", *route], check=True)
    bookworm.run_expect([0], "systemctl start stand-in-repository")
    status, text = cuda()
    assert status == 0, text


@pytest.mark.usefixtures("bare_and_cut_off")
def test_a_directory_on_the_controller_is_enough(bookworm: Host) -> None:
    directory = ".sandbox/nvidia-debian12"
    before = state(bookworm)
    for variant, words in (("tampered", "apt refuses"), ("stranger", "apt refuses")):
        status, text = cuda(cuda_repository_directory=f"{{{{ inventory_dir }}}}/../../{directory}/{variant}")
        assert status != 0, text
        assert words in text
        assert installed(bookworm) == {}
    status, text = cuda(
        cuda_repository_directory=f"{{{{ inventory_dir }}}}/../../{directory}/good",
        cuda_repository_fingerprints=[STRANGER],
    )
    assert status != 0, text
    assert installed(bookworm) == {}
    assert "nothing is loaded" in before
    status, text = cuda(cuda_repository_directory=f"{{{{ inventory_dir }}}}/../../{directory}/good")
    assert status == 0, text
    assert versions(bookworm) == {f"{DECLARED}-1"}
    assert smi(bookworm, "driver_version") == [DECLARED] * 2
