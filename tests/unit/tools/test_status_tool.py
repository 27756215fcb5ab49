"""tools/status is ansible-playbook with one screen, wherever it is called from."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_relative_inventory_is_that_of_the_callers_directory(tmp_path: Path):
    (tmp_path / "mine.yml").write_text("vllm: {hosts: {elsewhere: {}}}\n")
    done = subprocess.run(
        [ROOT / "tools/status", "-i", "mine.yml", "--list-hosts"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "elsewhere" in done.stdout, done.stdout + done.stderr
