#!/usr/bin/env python3
"""What a run that changes nothing costs: tasks and seconds, beside as many pings and beside the drift check, in one go.

Usage: ``tools/bench_rerun.py [-i INVENTORY]``, with the hosts already converged. The pings run over the same
connections, so the ratio tells what the tasks cost beyond their round trips. The drift check runs the same roles in
check mode, and is to cost about as much. Exits 1 when the run changed something, or the check finds drift.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(inventory: str, playbook: str) -> tuple[str, float]:
    """Output and wall time (s) of a playbook run; the run's own output and exit status where it fails."""
    started = time.monotonic()
    done = subprocess.run(
        ["ansible-playbook", "-i", inventory, playbook],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nbench_rerun: {playbook} failed with status {done.returncode}")
    return done.stdout, time.monotonic() - started


def recap(output: str) -> dict[str, int]:
    """Sums over the hosts of the play recap's counters."""
    sums: dict[str, int] = {}
    for key, value in re.findall(r"(\w+)=(\d+)", output.rpartition("PLAY RECAP")[2]):
        sums[key] = sums.get(key, 0) + int(value)
    return sums


def count(output: str) -> int:
    """How many tasks a run had, as it tells them."""
    return len(re.findall(r"^TASK \[", output, re.MULTILINE))


def main() -> None:
    """Run all three and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-i", "--inventory", default="inventory/sandbox")
    inventory = parser.parse_args().inventory

    output, seconds = run(inventory, "site.yml")
    counters, tasks = recap(output), count(output)
    pings = [{"name": f"Ping {number}", "ansible.builtin.ping": {}} for number in range(tasks)]
    play = [{"name": "As many pings", "hosts": "vllm", "gather_facts": False, "tasks": pings}]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as playbook:
        json.dump(play, playbook)  # JSON is YAML
        playbook.flush()
        _, ping_seconds = run(inventory, playbook.name)
    looked, drift_seconds = run(inventory, "playbooks/drift.yml")
    drift_tasks = count(looked)

    print(f"{'':<14}{'tasks':>6}{'seconds':>9}")
    print(f"{'site.yml':<14}{tasks:>6}{seconds:>9.1f}   changed={counters['changed']}")
    print(f"{'ping':<14}{tasks:>6}{ping_seconds:>9.1f}   ratio {seconds / ping_seconds:.1f}")
    print(f"{'drift.yml':<14}{drift_tasks:>6}{drift_seconds:>9.1f}   {drift_seconds / seconds:.2f} of site.yml")
    if counters["changed"]:
        sys.exit("bench_rerun: the run was to change nothing")


if __name__ == "__main__":
    main()
