"""What is read from apt's output."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _apt

REPOSITORY = "http://repo.example/debian12/x86_64/"
MADISON = """\
nvidia-driver-cuda | 590.48.01-1 | http://repo.example/debian12/x86_64  Packages
nvidia-driver-cuda | 585.1.01-1 | http://deb.debian.org/debian bookworm/non-free amd64 Packages
nvidia-driver-cuda | 580.95.05-1 | http://repo.example/debian12/x86_64  Packages
libcuda1 | 590.48.01-1ubuntu1 | http://repo.example/debian12/x86_64  Packages
libcuda1 | 590.48.01-1ubuntu1 | file:/var/cache  Packages
N: Unable to locate package nvidia-persistenced
"""
SIMULATION = """\
NOTE: This is only a simulation!
Remv nvidia-settings [535.1-1]
Inst libcuda1 [580.95.05-1] (580.105.08-1 NVIDIA CUDA:flat [amd64]) []
Inst nvidia-driver-cuda (580.105.08-1 NVIDIA CUDA:flat [amd64])
Remv xserver-foo:i386 [1.2-3]
Conf libcuda1 (580.105.08-1 NVIDIA CUDA:flat [amd64])
"""
URIS = """\
'file:/var/cache/nvl-vllm/cuda/./nvidia-driver-cuda_580.95.05-1_amd64.deb' nvidia-driver-cuda_580.deb 1024 SHA256:ab
'file:/var/cache/nvl-vllm/cuda/sub/lib%2bcuda1_580.95.05-1_amd64.deb' libcuda1_580.95.05-1_amd64.deb 10 SHA256:cd
'http://deb.debian.org/debian/pool/main/d/dkms/dkms_3.0.10-8_all.deb' dkms_3.0.10-8_all.deb 48684 SHA256:ef
"""


def test_versions_on_offer():
    assert _apt.offers(MADISON, REPOSITORY) == {
        "nvidia-driver-cuda": ["590.48.01-1", "580.95.05-1"],
        "libcuda1": ["590.48.01-1ubuntu1"],
    }


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("580.95.05-1", "580.95.05"),
        ("580.95.05-0ubuntu0.24.04.1", "580.95.05"),
        ("1:580.95.05-1ubuntu1", "580.95.05"),
        ("13.0.2", "13.0.2"),
        ("2:1.0", "1.0"),
    ],
)
def test_upstream(version, expected):
    assert _apt.upstream(version) == expected


def test_a_version_is_chosen_by_what_is_on_offer():
    chosen, complaints = _apt.choose(
        ["nvidia-driver-cuda", "libcuda1", "nvidia-persistenced"], "580.95.05", _apt.offers(MADISON, REPOSITORY)
    )
    assert chosen == {"nvidia-driver-cuda": "580.95.05-1"}
    assert complaints == [
        "cuda_driver_version is 580.95.05, and of libcuda1 the repository has 590.48.01: declare one of these",
        "the repository has no package nvidia-persistenced: its index is not complete, or NVIDIA has changed the name",
    ]


def test_steps_of_an_installation():
    assert _apt.steps(SIMULATION) == [
        ("nvidia-settings", "535.1-1", ""),
        ("libcuda1", "580.95.05-1", "580.105.08-1"),
        ("nvidia-driver-cuda", "", "580.105.08-1"),
        ("xserver-foo", "1.2-3", ""),
    ]


def test_files_of_a_repository_on_the_host():
    assert _apt.local_files(URIS, "/var/cache/nvl-vllm/cuda") == [
        "./nvidia-driver-cuda_580.95.05-1_amd64.deb",
        "sub/lib+cuda1_580.95.05-1_amd64.deb",
    ]
    assert _apt.local_files(URIS, "/srv/elsewhere") == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Reading...\nE: Version '1' for 'a' was not found\n", "Version '1' for 'a' was not found"),
        (
            "dpkg: error processing package nvidia-kernel-open-dkms (--configure):\nE: Sub-process dpkg returned 1\n",
            "error processing package nvidia-kernel-open-dkms (--configure):; Sub-process dpkg returned 1",
        ),
        ("W: only a warning\nE: the cause\n", "the cause"),
        ("some last words\n", "some last words"),
        ("", "it wrote nothing"),
    ],
)
def test_why_it_failed(output, expected):
    assert _apt.reason(output) == expected
