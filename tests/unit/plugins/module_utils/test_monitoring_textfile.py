"""Text files for node exporter: certificates and GPUs."""

from __future__ import annotations

import stat
import subprocess

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _monitoring_textfile as textfile


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of ten days, behind its key, as the gateway has it."""
    directory = tmp_path_factory.mktemp("certificate")
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "10",
    ]
    files = ["-keyout", str(directory / "key"), "-out", str(directory / "crt")]
    subprocess.run([*request, "-subj", "/CN=a", *files], check=True, capture_output=True)
    path = directory / "both.pem"
    path.write_text((directory / "key").read_text() + (directory / "crt").read_text())
    return path


def test_the_end_of_a_certificate(certificate):
    end = textfile.certificate_end(str(certificate), textfile.run_command)
    now = certificate.stat().st_mtime
    assert 9.9 * 86400 < end - now < 10.1 * 86400


def test_certificates_are_written_for_all_to_read(certificate, tmp_path):
    assert textfile.main([str(tmp_path), "--certificate", str(certificate)]) == 0
    path = tmp_path / "vllm_certificates.prom"
    assert f'vllm_certificate_end_timestamp_seconds{{file="{certificate}"}} ' in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_made_anew_stays(certificate, tmp_path, capsys):
    textfile.main([str(tmp_path), "--certificate", str(certificate)])
    before = (tmp_path / "vllm_certificates.prom").read_text()
    assert textfile.main([str(tmp_path), "--certificate", str(certificate), "--certificate", "/nowhere.pem"]) == 1
    assert (tmp_path / "vllm_certificates.prom").read_text() == before
    assert "stays as it is: /nowhere.pem" in capsys.readouterr().err


def test_gpus_that_cannot_be_asked_do_not_keep_certificates_from_being_written(certificate, tmp_path, capsys):
    def run(argv, timeout):
        if argv[0] == "nvidia-smi":
            raise TimeoutError
        return textfile.run_command(argv, timeout)

    assert textfile.main([str(tmp_path), "--gpus", "h1", "--certificate", str(certificate)], run) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["vllm_certificates.prom"]
    assert "vllm_gpus.prom stays as it is: nvidia-smi did not answer" in capsys.readouterr().err


def test_gpus_are_written(tmp_path):
    def run(argv, timeout):
        if argv[0] != "nvidia-smi":
            return 1, "", ""
        answer = '<gpu id="00000000:AD:00.0"><temperature><gpu_temp>32 C</gpu_temp></temperature></gpu>'
        return 0, f"<attached_gpus>1</attached_gpus>{answer}" if "-x" in argv else "", ""

    assert textfile.main([str(tmp_path), "--gpus", "h1"], run) == 0
    text = (tmp_path / "vllm_gpus.prom").read_text()
    assert 'Hostname="h1"} 32\n' in text
