"""The profiles that come with the collection, judged by the memory plan for the guide's deployment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._memory_budget import device_by_name
from ansible_collections.nvl.vllm.plugins.module_utils._memory_plan import Host, Wanted, plan
from ansible_collections.nvl.vllm.plugins.module_utils._model_facts import built_in

DEFAULTS = yaml.safe_load((Path(__file__).parents[2] / "roles/vllm_declaration/defaults/main.yml").read_text())


def planned(profile, cards=(0, 1)):
    """The plan of the default pair with a profile."""
    arguments = {**DEFAULTS["vllm_profiles"][profile], "tensor-parallel-size": 1}
    wanted = (Wanted("primary", (cards[0],), arguments), Wanted("secondary", (cards[1],), arguments))
    devices = tuple(device_by_name("NVIDIA H100 NVL", index) for index in (0, 1))
    return plan(Host(devices, built_in(DEFAULTS["vllm_model_repository"]), wanted, DEFAULTS["vllm_version"]))


@pytest.mark.parametrize("profile", DEFAULTS["vllm_profiles"])
def test_every_profile_fits(profile):
    found = planned(profile)
    assert found.errors == []
    assert found.fits


def test_the_guides_values_leave_most_of_the_cache_idle():
    instance = planned("guide").instances[0]
    assert instance.verdict == "wasteful"
    assert instance.idle_kv_gib > instance.budget.kv_gib / 2


def test_h100_nvl_takes_the_models_whole_context_and_wastes_nothing():
    instance = planned("h100_nvl").instances[0]
    assert instance.verdict == "fits"
    assert instance.max_model_len == 131072
    # What the comment beside the profile says.
    assert round(instance.max_concurrency) == 4
    assert instance.kv_tokens // 8192 >= DEFAULTS["vllm_profiles"]["h100_nvl"]["max-num-seqs"] - 4


def test_the_guides_pair_does_not_fit_on_one_card():
    found = planned("guide", cards=(0, 0))
    assert not found.fits
    assert "declare one GPU for each" in found.errors[0]
