"""The full set of failover drills, and the other expressions of role vllm_verify, as Ansible works them out."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.nvl.vllm.plugins.modules import failover_drill

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/vllm_verify"
DRILLS = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__vllm_verify_drills"]
NAMES = [drill["name"] for drill in DRILLS]
# Keys of the table that are no options of the module.
OWN_KEYS = {"name", "engines"}
STATISTICS = """\
# pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,wretr,wredis,status,weight
door,FRONTEND,,,0,0,648,0,0,0,0,0,0,,,,,OPEN,
engines,primary,0,0,0,0,9,0,0,0,,0,,0,0,0,0,UP,1
engines,secondary,0,0,0,0,9,0,0,0,,0,,0,0,0,0,{state},1
engines,BACKEND,0,0,0,0,65,0,0,0,0,0,,0,0,0,0,UP,2
"""


def load(path):
    return DataLoader().load_from_file(str(path), trusted_as_template=True)


def worked_out(name, **variables):
    """The value of a variable of the role, with its defaults and these variables of others."""
    everything = {
        "ansible_check_mode": False,
        "vllm_device": "cpu",
        "vllm_api_key": "engine-key",
        "vllm_declared": {"instances": instances(2)},
        "vllm_gateway_enabled": True,
        "vllm_gateway_host": "127.0.0.1",
        "vllm_gateway_port": 8000,
        "vllm_gateway_tls": "off",
        "vllm_gateway_keys": [],
        **load(ROLE / "defaults/main.yml"),
        **load(ROLE / "vars/main.yml"),
        **variables,
    }
    return Templar(DataLoader(), everything).template(everything[name])


def instances(number, **arguments):
    names = ["primary", "secondary"][:number]
    arguments = {"max-model-len": 4096, **arguments}
    return [
        {"name": name, "url": f"http://{name}:1", "unit": name, "gpus": [], "arguments": arguments} for name in names
    ]


def names_of(drills):
    return [drill["name"] for drill in drills]


# The table


@pytest.mark.parametrize("drill", DRILLS, ids=NAMES)
def test_a_drill_is_what_the_module_knows(drill):
    spec = failover_drill.argument_spec()
    assert drill.keys() - OWN_KEYS <= spec.keys()
    assert drill["fault"] in spec["fault"]["choices"]
    assert drill["via"] in spec["via"]["choices"]
    assert drill.get("budget", {}).keys() <= spec["budget"]["options"].keys()
    assert drill["name"].endswith(f" via {drill['via']}")


def test_names_and_proofs_are_told_apart():
    proofs = [drill["proof"] for drill in DRILLS if "proof" in drill]
    assert len(set(NAMES)) == len(NAMES)
    assert len(set(proofs)) == len(proofs) == 4


def test_the_page_names_the_whole_set():
    page = (ROOT / "docs/drill.md").read_text()
    section = page.partition("## The full set")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([^`]+ via [^`]+)`", section, re.MULTILINE) == NAMES


def test_only_a_killed_engine_needs_the_librarys_retries():
    retried = {drill["fault"] for drill in DRILLS if drill.get("gateway_retries")}
    assert retried == {"kill"}


# What a host allows


@pytest.mark.parametrize(
    ("gateway", "number", "wanted"),
    [
        (True, 2, NAMES),
        (False, 2, [name for name in NAMES if not name.endswith("gateway")]),
        (
            *(True, 1),
            *[["gateway_reload via gateway", "gateway_kill via gateway", "kill via single", "hang via single"]],
        ),
        (False, 1, ["kill via single", "hang via single"]),
    ],
)
def test_drills_that_a_host_allows(gateway, number, wanted):
    found = worked_out(
        "__vllm_verify_possible", vllm_gateway_enabled=gateway, vllm_declared={"instances": instances(number)}
    )
    assert names_of(found) == wanted


@pytest.mark.parametrize(
    ("gateway", "number", "wanted"),
    [
        (True, 2, ["kill via gateway", "drain via gateway", "gateway_reload via gateway"]),
        (True, 1, ["gateway_reload via gateway"]),
        (False, 2, ["kill via client"]),
        (False, 1, []),
    ],
)
def test_drills_after_a_deploy(gateway, number, wanted):
    found = worked_out(
        "__vllm_verify_quick", vllm_gateway_enabled=gateway, vllm_declared={"instances": instances(number)}
    )
    assert names_of(found) == wanted
    assert all(drill["fault_seconds"] == 3 for drill in found)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ([], NAMES),
        (["kill via client", "hang via gateway"], ["hang via gateway", "kill via client"]),
        ("hang via gateway, kill via client", ["hang via gateway", "kill via client"]),
    ],
)
def test_drills_that_are_asked_for_keep_the_order_of_the_set(asked, wanted):
    assert names_of(worked_out("__vllm_verify_chosen", vllm_verify_faults=asked)) == wanted


def test_limits_follow_the_variables():
    drills = {
        drill["name"]: drill
        for drill in worked_out(
            "__vllm_verify_drills",
            vllm_verify_budget_eject=7,
            vllm_verify_budget_eject_hang=8,
            vllm_verify_budget_lost_gateway_kill=9,
            vllm_verify_budget_recovery=100,
        )
    }
    assert drills["kill via gateway"]["budget"] == {"eject": 7}
    assert drills["hang via gateway"]["budget"] == {"eject": 8}
    assert drills["gateway_kill via gateway"]["budget"] == {"lost": 9, "recovery": 10}
    # Two engines start one after the other.
    assert drills["both_down via gateway"]["budget"] == {"lost": 4, "recovery": 200, "refusal": 5}
    assert drills["both_down via gateway"]["recovery_timeout"] == 200


@pytest.mark.parametrize(("device", "given", "wanted"), [("cpu", 0, 600), ("cuda", 0, 1200), ("cuda", "90", 90)])
def test_the_limit_of_a_recovery(device, given, wanted):
    found = worked_out("__vllm_verify_recovery", vllm_device=device, vllm_verify_budget_recovery=given)
    assert float(found) == wanted


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, 4096 - 32 - 200),
        ({"vllm_verify_failover_prompt_tokens": 1000}, 1000),
        ({"vllm_declared": {"instances": instances(2, **{"max-model-len": "auto"})}}, 4000),
        (
            {
                "vllm_declared": {"instances": instances(2, **{"max-model-len": "auto"})},
                "vllm_gateway_max_model_len": 8192,
            },
            8192 - 232,
        ),
    ],
)
def test_long_prompts_are_as_long_as_they_may_be(variables, wanted):
    assert worked_out("__vllm_verify_long_prompt", **variables) == wanted


# The gateway


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"vllm_gateway_host": "0.0.0.0", "vllm_gateway_port": 80}, "http://127.0.0.1:80"),
        ({"vllm_gateway_host": "::"}, "http://[::1]:8000"),
        ({"vllm_gateway_host": "10.0.0.5", "vllm_gateway_tls": "files"}, "https://10.0.0.5:8000"),
        ({"vllm_verify_gateway_url": "https://llm.example:443"}, "https://llm.example:443"),
    ],
)
def test_where_the_gateway_is(variables, url):
    assert worked_out("__vllm_verify_gateway_url", **variables) == url


@pytest.mark.parametrize(
    ("keys", "own", "wanted"),
    [
        ([], "", "engine-key"),
        ([], "unused", "engine-key"),
        ([{"name": "a", "sha256": "0"}, {"name": "b", "key": "key-of-b"}], "", "key-of-b"),
        ([{"name": "a", "sha256": "0"}, {"name": "b", "key": "key-of-b"}], "mine", "mine"),
        ([{"name": "a", "sha256": "0"}], "", ""),
    ],
)
def test_the_key_of_the_gateway(keys, own, wanted):
    assert worked_out("__vllm_verify_gateway_key", vllm_gateway_keys=keys, vllm_verify_gateway_key=own) == wanted


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, {}),
        ({"vllm_gateway_tls": "self_signed"}, {"SSL_CERT_FILE": "/etc/vllm/gateway/self_signed.pem"}),
        ({"vllm_verify_gateway_ca": "/etc/ca.pem"}, {"SSL_CERT_FILE": "/etc/ca.pem"}),
    ],
)
def test_whose_certificates_are_trusted(variables, wanted):
    assert worked_out("__vllm_verify_environment", **variables) == wanted


@pytest.mark.parametrize(
    ("state", "wanted"),
    [("UP", ["primary", "secondary"]), ("UP 1/3", ["primary", "secondary"]), ("DRAIN", ["primary"])],
)
def test_engines_that_the_gateway_uses(state, wanted):
    statistics = {"content": STATISTICS.format(state=state)}
    found = worked_out("__vllm_verify_used", __vllm_verify_statistics=statistics)
    assert [name for name in found if name != "BACKEND"] == wanted


def test_a_gateway_that_is_no_part_of_the_play_is_none():
    everything = {**load(ROLE / "vars/main.yml")}
    assert Templar(DataLoader(), everything).template(everything["__vllm_verify_gateway"]) is False


# What came of it


def test_a_drill_without_a_verdict_is_a_failure_unless_it_was_skipped():
    results = [
        {"item": {"name": "one"}, "verdict": "passed"},
        {"item": {"name": "two"}, "verdict": "failed", "msg": "Drill failed: lost 3"},
        {"item": {"name": "three"}, "msg": "Drill refused, nothing was touched: because"},
        {"item": {"name": "four"}, "skipped": True, "msg": "Would send"},
    ]
    assert worked_out("__vllm_verify_sentences", __vllm_verify_drilled={"results": results}) == [
        "two: Drill failed: lost 3",
        "three: Drill refused, nothing was touched: because",
    ]


def test_a_change_of_any_helper_is_another_subject():
    """What is copied to the hosts is among the files that are looked at."""
    roles = ROLE.parent
    copied = [
        *yaml.safe_load((roles / "vllm_health/vars/main.yml").read_text())["__vllm_health_files"],
        *yaml.safe_load((roles / "vllm_instances/vars/main.yml").read_text())["__vllm_instances_helper"],
        {"dest": "/usr/local/libexec/vllm-gateway"},
        {"dest": "/etc/vllm/gateway/haproxy.cfg"},
        {"dest": "/etc/systemd/system/vllm-health.service"},
    ]
    assert len(copied) > 20
    (block,) = (task["block"] for task in load(ROLE / "tasks/main.yml") if "block" in task)
    (find,) = (task["ansible.builtin.find"] for task in block if "ansible.builtin.find" in task)
    library = re.compile(r"\{\{ __vllm_\w+_lib \}\}")
    for item in copied:
        path = Path(library.sub("/usr/local/lib/nvl-vllm/nvl_vllm", item["dest"]))
        assert str(path.parent) in find["paths"]
        assert any(fnmatch(path.name, pattern) for pattern in worked_out("__vllm_verify_patterns")), path


def test_another_gateway_is_another_subject():
    units = {"fingerprints": {"primary": "a"}}
    files = {"files": [{"path": "/b", "checksum": "2"}, {"path": "/a", "checksum": "1"}]}

    def subject(**variables):
        return worked_out("__vllm_verify_subject", __vllm_verify_units=units, **variables)

    first = subject(__vllm_verify_files=files)
    assert first == subject(__vllm_verify_files={"files": files["files"][::-1]})
    assert first != subject(__vllm_verify_files={"files": [{"path": "/a", "checksum": "3"}]})
    assert first != subject(vllm_gateway_enabled=False)
