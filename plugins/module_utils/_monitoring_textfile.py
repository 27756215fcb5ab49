# Copyright: the nvl.vllm authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""What no exporter of a host tells, as text files for node exporter: certificates, and GPUs without dcgm-exporter.

Run by vllm-textfile.timer. A file that cannot be made anew stays as it is; its age is an alert.
"""

from __future__ import annotations

import argparse
import calendar
import os
import sys
import time
from collections.abc import Callable, Sequence

from . import _gpu_metrics
from ._gpu_info import TimedRunner, read, run_command

#: How long one command may take (s).
TIMEOUT = 10.0
CERTIFICATE = "vllm_certificate_end_timestamp_seconds"


def certificate_end(path: str, run: TimedRunner) -> float:
    """When a certificate ends, as a time stamp. Raises ValueError with the reason where that is not to be had."""
    try:
        status, out, err = run(["openssl", "x509", "-enddate", "-noout", "-in", path], TIMEOUT)
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error
    name, _, end = out.strip().partition("=")
    if status != 0 or name != "notAfter":
        raise ValueError(f"{path}: openssl cannot read a certificate in it: {err.strip() or out.strip()}")
    return float(calendar.timegm(time.strptime(end, "%b %d %H:%M:%S %Y GMT")))


def certificates_page(paths: Sequence[str], run: TimedRunner) -> str:
    """The end of each certificate in Prometheus' text format. Raises ValueError."""
    lines = [f"# HELP {CERTIFICATE} When the certificate in the file ends.", f"# TYPE {CERTIFICATE} gauge"]
    for path in paths:
        lines.append(f'{CERTIFICATE}{{file="{_gpu_metrics.escaped(path)}"}} {certificate_end(path, run):.0f}')
    return "\n".join(lines) + "\n"


def gpus_page(hostname: str, run: TimedRunner) -> str:
    """The figures of the GPUs in Prometheus' text format. Raises ValueError where no GPU can be asked."""
    facts = read(run, TIMEOUT)
    if facts.problem:
        raise ValueError(facts.problem)
    try:
        asked = _gpu_metrics.ask(run, TIMEOUT)
    except OSError as error:
        raise ValueError(f"nvidia-smi: {error}") from error
    return _gpu_metrics.page(facts, asked, hostname)


def write(path: str, text: str) -> None:
    """Replace a file at once: node exporter must not read half of it."""
    # Only names that end in .prom are read.
    with open(f"{path}.new", "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), 0o644)
        stream.write(text)
    os.replace(f"{path}.new", path)


def main(argv: Sequence[str], run: TimedRunner = run_command) -> int:
    """Write the files; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-textfile", description="Write text files for node exporter.")
    parser.add_argument("directory")
    parser.add_argument("--gpus", metavar="HOSTNAME", default="")
    parser.add_argument("--certificate", metavar="FILE", action="append", default=[])
    arguments = parser.parse_args(argv)
    pages: dict[str, Callable[[], str]] = {}
    if arguments.gpus:
        pages["vllm_gpus.prom"] = lambda: gpus_page(arguments.gpus, run)
    if arguments.certificate:
        pages["vllm_certificates.prom"] = lambda: certificates_page(arguments.certificate, run)
    status = 0
    for name, page in pages.items():
        try:
            write(f"{arguments.directory}/{name}", page())
        except ValueError as error:
            print(f"vllm-textfile: {name} stays as it is: {error}", file=sys.stderr)
            status = 1
    return status
