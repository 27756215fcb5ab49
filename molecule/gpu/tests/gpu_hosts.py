"""Questions to the containers that stand in for GPU hosts, and runs of the repository's playbooks against them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SANDBOX = ROOT / ".sandbox"
SYS = "/opt/nvl-stand-in/sys"
#: The declared version, a newer one, and one that the declared vLLM does not run on. The repository has all three.
DECLARED, NEWER, TOO_OLD = "580.95.05", "580.105.08", "570.211.01"


def run(playbook: str, *arguments: str, host: str = "bookworm", **variables: Any) -> tuple[int, str]:
    """Exit status of a playbook, and what the operator reads, on one line."""
    done = subprocess.run(
        [
            *("ansible-playbook", "-i", "inventory/molecule_gpu", playbook, "--limit", host),
            *("-e", "@molecule/gpu/vars/kernel.yml", "-e", json.dumps(variables), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).replace("\\n", " ").split())


def cuda(*arguments: str, host: str = "bookworm", **variables: Any) -> tuple[int, str]:
    return run("playbooks/cuda.yml", *arguments, host=host, **variables)


def installed(host: Host) -> dict[str, tuple[str, bool]]:
    """Version of each of the driver's packages, and whether it is held."""
    text = host.check_output("dpkg-query -W -f '${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\\n'")
    lines = [line.split() for line in text.splitlines()]
    return {
        name: (version, want == "hold")
        for name, version, want, status in lines
        if status == "installed" and ("nvidia" in name or name == "libcuda1")
    }


def versions(host: Host) -> set[str]:
    """Versions that the driver's packages have; one where all is well."""
    return {version for version, _ in installed(host).values()}


def state(host: Host) -> str:
    """All that a refused run must leave as it was: packages, apt's settings and trusted keys, and what is loaded."""
    return host.check_output(
        "dpkg-query -W -f '${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\\n' | sha256sum; "
        "find /etc/apt /etc/modprobe.d /etc/needrestart /etc/systemd/system -type f | sort | xargs sha256sum; "
        f"cat {SYS}/module/nvidia/version 2>/dev/null || echo nothing is loaded"
    )


def smi(host: Host, field: str) -> list[str]:
    """One value of each GPU, as nvidia-smi has it."""
    return host.check_output("nvidia-smi --query-gpu=%s --format=csv,noheader,nounits", field).splitlines()
