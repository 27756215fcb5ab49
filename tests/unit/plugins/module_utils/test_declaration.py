"""From the operator's variables to complete instances, against the captured help of the pinned vLLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.module_utils._declaration import Declaration, Model, resolve
from ansible_collections.nvl.vllm.plugins.module_utils._manifest import File, Manifest
from ansible_collections.nvl.vllm.plugins.module_utils._serve_help import ServeOptions

ROLE = Path(__file__).parents[4] / "roles/vllm_declaration"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
HELP = (ROLE / f"files/vllm-serve-help-{DEFAULTS['vllm_version']}.txt").read_text()
GUIDE = DEFAULTS["vllm_profiles"]["guide"]
OPTIONS = ServeOptions.parse(HELP)
PAIR = [{"name": "primary", "port": 8001, "gpus": [0]}, {"name": "secondary", "port": 8002, "gpus": [1]}]
COMMIT = "b5c939de8f754692c1647ca79fbf85e8c1e70f8a"
HUB = Model(source="hub", root="/srv/models/m", repository="openai/gpt-oss-120b", revision=COMMIT, required_space=62464)
DECLARED = Declaration(
    inventory_hostname="h100-1",
    device="cuda",
    version="0.32.0",
    host="127.0.0.1",
    home="/var/lib/vllm",
    model=HUB,
    served_model_name="gpt-oss-120b",
    instances=PAIR,
    profile="guide",
    profiles={"guide": GUIDE},
)


def instances(**changes):
    """The instances of a declaration without a mistake."""
    found, _, errors = resolve(dataclasses.replace(DECLARED, **changes), OPTIONS)
    assert errors == []
    return found


def errors(**changes):
    """The mistakes of a declaration, without the host's name that begins each of them."""
    found = resolve(dataclasses.replace(DECLARED, **changes), OPTIONS)[2]
    assert all(error.startswith("h100-1: ") for error in found)
    return [error.partition(": ")[2] for error in found]


def one(**changes):
    """A list of one instance, primary with these changes."""
    return [{**PAIR[0], **changes}]


def test_default_pair_is_complete():
    first, second = instances(instances=DEFAULTS["vllm_instances"])
    assert (first.name, first.unit, first.port, first.url) == (
        "primary",
        "vllm@primary.service",
        8001,
        "http://127.0.0.1:8001",
    )
    assert first.arguments == {
        "model": f"/srv/models/m/{COMMIT}",
        "served-model-name": "gpt-oss-120b",
        "host": "127.0.0.1",
        "port": 8001,
        "tensor-parallel-size": 1,
        "middleware": "nvl_vllm.first_token.FirstToken",
        **GUIDE,
    }
    assert (second.name, second.port, second.gpus, second.arguments["port"]) == ("secondary", 8002, [1], 8002)


@pytest.mark.parametrize("name", GUIDE)
def test_every_value_of_the_guide_is_accepted(name):
    assert instances(profiles={"guide": {name: GUIDE[name]}})[0].arguments[name] == GUIDE[name]


def test_layers_lie_over_each_other_instance_on_top():
    profiles = {"guide": {"max-num-seqs": 1, "max-model-len": 1, "seed": 1}}
    found = instances(
        profiles=profiles,
        arguments={"max-model-len": 2, "seed": 2},
        instances=one(arguments={"seed": 3}),
    )
    chosen = {key: found[0].arguments[key] for key in profiles["guide"]}
    assert chosen == {"max-num-seqs": 1, "max-model-len": 2, "seed": 3}


def test_a_middleware_of_the_operator_replaces_ours_and_an_empty_one_removes_it():
    own = instances(arguments={"middleware": "theirs.Theirs"}, instances=one(arguments={"middleware": ""}) + PAIR[1:])
    assert "middleware" not in own[0].arguments
    assert own[1].arguments["middleware"] == "theirs.Theirs"


def test_an_instance_may_have_another_profile():
    found = instances(
        profiles={"guide": {"seed": 1}, "other": {"seed": 2}},
        instances=[PAIR[0], {**PAIR[1], "profile": "other"}],
    )
    assert [(i.profile, i.arguments["seed"]) for i in found] == [("guide", 1), ("other", 2)]


def test_arguments_of_one_instance_are_not_those_of_the_other():
    found = instances(instances=[{**PAIR[0], "arguments": {"seed": 3}, "environment": {"A": "1"}}, PAIR[1]])
    assert "seed" not in found[1].arguments
    assert "A" not in found[1].environment


@pytest.mark.parametrize(
    ("given", "value", "name", "wanted"),
    [
        ("max_num_seqs", 4, "max-num-seqs", 4),
        ("--max-num-seqs", 4, "max-num-seqs", 4),
        ("tp", 1, "tensor-parallel-size", 1),
        ("device_memory_utilization", 0.5, "gpu-memory-utilization", 0.5),
        ("no-enable-prefix-caching", True, "enable-prefix-caching", False),
        ("no_enable_prefix_caching", False, "enable-prefix-caching", True),
        ("disable-log-stats", True, "disable-log-stats", True),
        ("max-model-len", "32k", "max-model-len", "32k"),
        ("max-model-len", "auto", "max-model-len", "auto"),
        ("max-model-len", -1, "max-model-len", -1),
        ("gpu-memory-utilization", 1, "gpu-memory-utilization", 1),
        ("kv-cache-dtype", "fp8", "kv-cache-dtype", "fp8"),
        ("speculative-config", {"method": "eagle3"}, "speculative-config", {"method": "eagle3"}),
        ("hf-overrides", {"a": 1}, "hf-overrides", {"a": 1}),
        ("lora-modules", ["a=b", "c=d"], "lora-modules", ["a=b", "c=d"]),
        ("allowed-origins", '["https://a.example"]', "allowed-origins", '["https://a.example"]'),
    ],
)
def test_spellings_end_under_one_name(given, value, name, wanted):
    arguments = instances(instances=one(arguments={given: value}))[0].arguments
    assert arguments[name] == wanted
    assert given == name or given not in arguments


@pytest.mark.parametrize(
    ("given", "value", "complaint"),
    [
        ("max-num-sequences", 8, "vLLM 0.32.0 has no argument --max-num-sequences; did you mean max-num-seqs?"),
        ("xyzzy", 1, "vLLM 0.32.0 has no argument --xyzzy"),
        (
            "disable-log-requests",
            True,
            "vLLM 0.32.0 has no argument --disable-log-requests; "
            "request logging is off unless enable-log-requests is true",
        ),
        ("max-num-seqs", "8", "wanted a whole number"),
        ("max-num-seqs", 8.5, "wanted a whole number"),
        ("max-num-seqs", True, "--max-num-seqs wants a value, not true"),
        ("max-num-seqs", None, "--max-num-seqs wants a value, not none"),
        ("max-num-seqs", [8], "--max-num-seqs takes one value, not a list (a list in JSON is a string)"),
        ("max-num-seqs", {"a": 8}, "--max-num-seqs takes no mapping"),
        ("allowed-origins", ["*"], "--allowed-origins takes one value, not a list (a list in JSON is a string)"),
        ("gpu-memory-utilization", 85, "wanted a number above 0, at most 1"),
        ("gpu-memory-utilization", 0, "wanted a number above 0, at most 1"),
        ("gpu-memory-utilization", "0.85", "wanted a number above 0, at most 1"),
        ("max-model-len", "4 k", "wanted a whole number, or one such as 32k (32000) or 32K (32768)"),
        ("max-num-batched-tokens", "auto", "wanted a whole number, or one such as 32k (32000) or 32K (32768)"),
        ("enable-prefix-caching", "yes", "--enable-prefix-caching is a switch: wanted true or false"),
        ("uvicorn-log-level", "loud", "wanted one of critical, debug, error, info, trace, warning"),
        ("port", 8009, "set the instance's port instead"),
        ("host", "0.0.0.0", "set vllm_host instead"),
        ("model", "a/b", "set vllm_model_source and what belongs to it instead"),
        ("served_model_name", "a", "set vllm_served_model_name instead"),
        ("config", "/a.yaml", "set vllm_arguments or the instance's arguments instead"),
    ],
)
def test_an_argument_that_vllm_would_not_take_is_refused(given, value, complaint):
    wanted = f"{given} is {value!r}: {complaint}"
    assert errors(instances=one(arguments={given: value})) == [f"vllm_instances[0].arguments.{wanted}"]
    assert errors(arguments={given: value}) == [f"vllm_arguments.{wanted}"]
    assert errors(profiles={"guide": {given: value}}) == [f"vllm_profiles.guide.{wanted}"]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"arguments": {"api-key": "sk-123"}}, "vllm_arguments.api-key is ***: set vllm_api_key"),
        ({"arguments": {"--api_key": ["sk-123"]}}, "vllm_arguments.--api_key is ***: set vllm_api_key"),
        ({"arguments": {"hf-token": "sk-123"}}, "vllm_arguments.hf-token is ***: set no token"),
        ({"arguments": {"api-keys": "sk-123"}}, "vllm_arguments.api-keys is ***: vLLM 0.32.0 has no argument"),
        ({"environment": {"VLLM_API_KEY": "sk-123"}}, "vllm_environment.VLLM_API_KEY is ***: set vllm_api_key instead"),
        ({"environment": {"HF_TOKEN": "sk-123\n"}}, "vllm_environment.HF_TOKEN is ***: secrets do not belong here"),
        ({"api_key": "sk-123 "}, "vllm_api_key holds a space"),
    ],
)
def test_a_refused_secret_is_not_printed(changes, advice):
    (error,) = errors(**changes)
    assert error.startswith(advice)
    assert "sk-123" not in error


def test_the_declaration_does_not_show_its_key():
    assert "sk-123" not in repr(dataclasses.replace(DECLARED, api_key="sk-123"))


def test_an_argument_in_two_spellings_is_refused():
    found = errors(arguments={"max-num-seqs": 8, "max_num_seqs": 4})
    assert found == ["vllm_arguments.max_num_seqs is 4: --max-num-seqs is given twice"]


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (
            {"name": "primary", "port": 8002, "gpus": [1]},
            "vllm_instances[1].name is 'primary': vllm_instances[0] has this name: each instance needs its own",
        ),
        (
            {"name": "secondary", "port": 8001, "gpus": [1]},
            "vllm_instances[1].port is 8001: vllm_instances[0] has this port: each instance needs its own",
        ),
        (
            {"name": "secondary", "port": 8002, "gpus": [1, 1]},
            "vllm_instances[1].gpus is [1, 1]: a GPU is named twice",
        ),
    ],
)
def test_names_and_ports_belong_to_one_instance(second, error):
    assert errors(instances=[PAIR[0], second]) == [error]


def test_whether_a_gpu_carries_two_instances_is_for_the_memory_plan():
    assert len(instances(instances=[PAIR[0], {**PAIR[1], "gpus": [0]}])) == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": "Primary"}, "name is 'Primary': wanted up to 32 of a-z, 0-9 and '-', such as primary"),
        ({"name": "a" * 33}, f"name is '{'a' * 33}': wanted up to 32 of a-z, 0-9 and '-', such as primary"),
        ({"name": "../x"}, "name is '../x': wanted up to 32 of a-z, 0-9 and '-', such as primary"),
        ({"name": None}, "name is None: wanted up to 32 of a-z, 0-9 and '-', such as primary"),
        ({"port": "8001"}, "port is '8001': wanted a whole number from 1024 to 65535 (engines are unprivileged)"),
        ({"port": 80}, "port is 80: wanted a whole number from 1024 to 65535 (engines are unprivileged)"),
        ({"port": 65536}, "port is 65536: wanted a whole number from 1024 to 65535 (engines are unprivileged)"),
        ({"port": True}, "port is True: wanted a whole number from 1024 to 65535 (engines are unprivileged)"),
        ({"gpus": 0}, "gpus is 0: wanted a list of GPU indexes or UUIDs, such as [0]"),
        ({"gpus": []}, "gpus is []: wanted at least one GPU index or UUID, such as [0]"),
        ({"gpus": [-1]}, "gpus is -1: wanted a GPU index from 0 or a UUID as nvidia-smi -L prints it"),
        ({"gpus": ["0"]}, "gpus is '0': wanted a GPU index from 0 or a UUID as nvidia-smi -L prints it"),
        ({"gpus": [[0]]}, "gpus is [0]: wanted a GPU index from 0 or a UUID as nvidia-smi -L prints it"),
        ({"profile": "giude"}, "profile is 'giude': wanted one of guide"),
        ({"profile": ["guide"]}, "profile is ['guide']: wanted one of guide"),
        ({"arguments": []}, "arguments is []: wanted a mapping of engine arguments"),
        ({"environment": []}, "environment is []: wanted a mapping of environment variables"),
        ({"gpu": [0]}, "gpu is [0]: no such key; did you mean gpus?"),
    ],
)
def test_an_instance_of_the_wrong_shape_is_refused(changes, error):
    assert error in "\n".join(errors(instances=one(**changes)))
    assert errors(instances=one(**changes))[0].startswith("vllm_instances[0].")


@pytest.mark.parametrize("wrong", [[], {}, None, "primary"])
def test_instances_that_are_no_list_are_refused(wrong):
    assert errors(instances=wrong) == [f"vllm_instances is {wrong!r}: wanted a list of one instance or more"]


def test_an_instance_that_is_no_mapping_is_refused():
    (error,) = errors(instances=["primary"])
    assert error == "vllm_instances[0] is 'primary': wanted a mapping with name, port and gpus"


def test_a_profile_of_all_that_is_unknown_names_that_variable():
    found = errors(profile="h100", instances=[PAIR[0]])
    assert found == ["vllm_profile is 'h100': wanted one of guide"]


def test_all_mistakes_are_told_at_once():
    found = errors(
        arguments={"xyzzy": 1},
        environment={"A B": "1"},
        instances=[{"name": "Primary", "port": 80, "gpus": []}, PAIR[1]],
    )
    variables = [error.partition(" is ")[0] for error in found]
    assert variables == [
        "vllm_arguments.xyzzy",
        "vllm_environment.A B",
        "vllm_instances[0].name",
        "vllm_instances[0].port",
        "vllm_instances[0].gpus",
    ]


def test_tensor_parallel_size_is_the_number_of_gpus():
    assert instances(instances=one(gpus=[0, 1]))[0].arguments["tensor-parallel-size"] == 2


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}, {"tp": 1, "dp": 4}])
def test_parallel_sizes_multiply_to_the_gpus(sizes):
    assert instances(instances=one(gpus=[0, 1, 2, 3], arguments=sizes))
    (error,) = errors(instances=one(gpus=[0, 1], arguments=sizes))
    assert error.startswith("vllm_instances[0].gpus is [0, 1]: primary runs on 4 GPU(s) (")


def test_too_few_gpus_for_tensor_parallel_size():
    assert errors(instances=one(arguments={"tensor-parallel-size": 2})) == [
        "vllm_instances[0].gpus is [0]: primary runs on 2 GPU(s) (tensor 2 x pipeline 1 x data 1 parallel): "
        "declare as many"
    ]


def test_on_cpu_there_are_no_gpus():
    declared = [{"name": "primary", "port": 8001}]
    found = instances(device="cpu", instances=declared)[0]
    assert found.gpus == []
    assert "CUDA_DEVICE_ORDER" not in found.environment
    (error,) = errors(device="cpu", instances=one())
    assert error == "vllm_instances[0].gpus is [0]: vllm_device is cpu, which uses no GPU: leave gpus out"


def test_environment_comes_in_layers_of_strings():
    found = instances(environment={"OMP_NUM_THREADS": 1, "A": "all"}, instances=one(environment={"A": "own"}))[0]
    assert found.environment["OMP_NUM_THREADS"] == "1"
    assert found.environment["A"] == "own"
    assert found.environment["HF_HUB_OFFLINE"] == "1"
    assert found.environment["HOME"] == "/var/lib/vllm"
    assert found.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("CUDA_VISIBLE_DEVICES", "0", "set the instance's gpus instead"),
        ("1A", "x", "wanted a name of letters, digits and '_'"),
        ("A", True, "wanted a string or a number, in quotes where in doubt"),
        ("A", None, "wanted a string or a number, in quotes where in doubt"),
        ("A", ["x"], "wanted a string or a number, in quotes where in doubt"),
        ("A", "x\ny", "wanted one line without control characters"),
    ],
)
def test_an_environment_variable_that_cannot_be_is_refused(name, value, complaint):
    wanted = f"{name} is {value!r}: {complaint}"
    assert errors(environment={name: value}) == [f"vllm_environment.{wanted}"]
    assert errors(instances=one(environment={name: value})) == [f"vllm_instances[0].environment.{wanted}"]


def test_beyond_loopback_a_key_is_wanted():
    (error,) = errors(host="0.0.0.0")
    assert error == "vllm_host is '0.0.0.0': set vllm_api_key before engines listen beyond loopback"
    assert instances(host="0.0.0.0", api_key="sk-123")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8001"),
        ("localhost", "http://127.0.0.1:8001"),
        ("::", "http://[::1]:8001"),
        ("::1", "http://[::1]:8001"),
        ("10.0.0.11", "http://10.0.0.11:8001"),
    ],
)
def test_url_is_the_one_that_the_host_itself_reaches(host, url):
    assert instances(host=host, api_key="sk-123")[0].url == url


MANIFEST = Manifest({"config.json": File(2**20 + 1, "0" * 64)})


def checkpoint(**changes):
    """The checkpoint of a declaration without a mistake."""
    _, found, errors = resolve(dataclasses.replace(DECLARED, model=dataclasses.replace(HUB, **changes)), OPTIONS)
    assert errors == []
    return found


def model_errors(**changes):
    """The mistakes of a declaration whose model is changed."""
    return errors(model=dataclasses.replace(HUB, **changes))


def test_the_hubs_checkpoint_is_named_after_its_commit():
    found = checkpoint()
    assert (found.path, found.root) == (f"/srv/models/m/{COMMIT}", "/srv/models/m")
    assert (found.repository, found.revision, found.manifest) == ("openai/gpt-oss-120b", COMMIT, {})
    assert found.required_space == 62464


def test_a_manifest_tells_the_space_and_names_what_has_no_commit():
    found = checkpoint(source="controller", directory="/models/m", manifest=MANIFEST.dump())
    assert found.path == f"/srv/models/m/{MANIFEST.name}"
    assert found.required_space == 2
    assert found.manifest == MANIFEST.as_dict()
    # Repository and revision are the hub's and do not count here.
    assert (found.repository, found.revision) == ("", "")


def test_what_is_on_the_host_is_used_in_place():
    found = checkpoint(source="host", directory="/mnt/models/m")
    assert (found.path, found.root, found.required_space) == ("/mnt/models/m", "", 0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source": "nfs"}, "vllm_model_source is 'nfs': wanted one of hub, controller, host"),
        (
            {"repository": "gpt-oss"},
            "vllm_model_repository is 'gpt-oss': wanted OWNER/NAME, such as openai/gpt-oss-120b",
        ),
        (
            {"revision": "v1"},
            "vllm_model_revision is 'v1': wanted a full commit of 40 hexadecimal digits, as a branch or tag can move "
            "to other bytes (git ls-remote https://huggingface.co/openai/gpt-oss-120b v1 tells it)",
        ),
        (
            {"endpoint": "hub.example.com"},
            "vllm_model_endpoint is 'hub.example.com': wanted the address of a hub, such as https://hub.example.com",
        ),
        (
            {"endpoint": "http://hub.example.com", "token": "hf_secret"},
            "vllm_model_endpoint is 'http://hub.example.com': wanted https, which hides vllm_model_token on the way",
        ),
        (
            {"source": "host", "directory": "models"},
            "vllm_model_directory is 'models': wanted the absolute path of the checkpoint, "
            "as vllm_model_source is host",
        ),
        (
            {"source": "controller", "directory": "/m"},
            "vllm_model_manifest is '': wanted the checkpoint's manifest, as vllm_model_source is controller: "
            "tools/manifest writes it",
        ),
        (
            {"manifest": dataclasses.replace(MANIFEST, revision="0" * 40).dump()},
            f"vllm_model_revision is '{COMMIT}': the manifest in vllm_model_manifest is for {'0' * 40}",
        ),
    ],
)
def test_mistakes_of_the_model(changes, error):
    assert model_errors(**changes) == [error]


def test_a_manifest_that_is_none_is_told():
    (error,) = model_errors(manifest="{}")
    assert error.startswith("vllm_model_manifest: wanted an object with 'files'")


def test_the_token_is_in_no_text():
    assert "hf_secret" not in repr(Model(source="hub", root="/m", token="hf_secret"))
    assert "hf_secret" not in str(model_errors(endpoint="http://hub.example.com", token="hf_secret"))
