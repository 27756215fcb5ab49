"""playbooks/drift.yml itself, run by ansible-playbook, with small roles in place of the collection's."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.nvl.vllm.plugins.filter.drift_turn import drift_turn

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value-of-a-key"
#: Two hosts that are as declared, and one for each way not to be.
HOSTS = ("clean", "other", "drifted", "failing", "broken", "gone", "newly_blind", "refused")

#: Stands for the declaration, which ends all hosts where one is wrong.
DECLARATION = """
- name: Check the declaration
  ansible.builtin.assert:
    that: inventory_hostname != 'broken'
    fail_msg: "vllm_instances is empty"
    quiet: true
  any_errors_fatal: true
"""
SERVER = """
- name: Keep what clients need to know
  ansible.builtin.set_fact:
    address: "{{ inventory_hostname | mandatory }}"
"""
HANDLER = """
- name: Restart the agent platform
  ansible.builtin.command: "false"
"""
ROLES = {
    "cuda": """
- name: The driver of a GPU host
  ansible.builtin.include_tasks: never.yml
  when: false
""",
    "vllm": """
- name: Write the settings
  ansible.builtin.copy:
    content: "mode: fast\\napi_key: new-{{ secret }}\\n"
    dest: "{{ place }}/settings.yaml"
    mode: "0644"

- name: Write the environment
  ansible.builtin.copy:
    content: "VALUE=new-{{ secret }}\\n"
    dest: "{{ place }}/{{ item }}.env"
    mode: "0600"
  loop: [primary, secondary]
  no_log: true

- name: Create directories
  ansible.builtin.file:
    path: "{{ place }}/{{ item }}"
    state: directory
    mode: "0755"
  loop: [one, two]
""",
    "vllm_model": """
- name: Bring {{ inventory_hostname }}
  ansible.builtin.command: "false"
  when: not ansible_check_mode
""",
    "vllm_instances": """
- name: Require what is not there
  ansible.builtin.assert:
    that: inventory_hostname != 'failing'
    fail_msg: "found nothing, password: {{ secret }}"
    quiet: true
""",
    "vllm_health": """
- name: Ask something
  ansible.builtin.command: "false"
  when: inventory_hostname == 'newly_blind'
""",
    "vllm_gateway": """
- name: Nothing to do
  ansible.builtin.debug:
    msg: well
  loop: []
""",
    "vllm_monitoring": """
- name: Write rules
  ansible.builtin.copy:
    content: "new"
    dest: "{{ place }}/rules.yml"
    mode: "0644"
""",
    "agentic_client": """
- name: Require that all servers are known
  ansible.builtin.assert:
    that: groups['vllm'] | map('extract', hostvars) | rejectattr('address', 'defined') | length == 0
    fail_msg: "a server is not known"
    quiet: true

- name: Write the configuration
  ansible.builtin.copy:
    content: "{{ groups['vllm'] | map('extract', hostvars) | map(attribute='address') | join(' ') }}"
    dest: "{{ place }}/settings.yaml"
    mode: "0644"
  notify: Restart the agent platform
""",
    "vllm_drift": """
- name: Look
  ansible.builtin.set_fact:
    __vllm_drift_facts: {findings: [], unknown: [], facts: {uptime: 5}}
    __vllm_drift_content: {findings: [], unknown: [], facts: {}}
    __vllm_drift_refusals: {gpu_preflight: "{{ ['the disk is full'] if inventory_hostname == 'refused' else [] }}"}
""",
}


#: A callback beside the playbook, which lets a part of the drift callback fail.
BREAKER = """
import errno

from ansible.plugins.callback import CallbackBase
from ansible_collections.nvl.vllm.plugins.callback import drift


def fail(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


class CallbackModule(CallbackBase):
    CALLBACK_NAME = "breaker"

    def v2_playbook_on_start(self, playbook):
        drift.%s = fail
"""


@pytest.fixture
def project(tmp_path):
    """The playbook with roles of its own, and a directory for each host as they write it."""
    for name, tasks in ROLES.items():
        role = tmp_path / "roles" / name
        (role / "tasks").mkdir(parents=True)
        (role / "tasks/main.yml").write_text(tasks)
        if name not in ("vllm_drift", "agentic_client"):
            (role / "meta").mkdir()
            (role / "meta/main.yml").write_text("dependencies: [{role: vllm_declaration}]\n")
    (tmp_path / "roles/agentic_client/tasks/server.yml").write_text(SERVER)
    (tmp_path / "roles/agentic_client/handlers").mkdir()
    (tmp_path / "roles/agentic_client/handlers/main.yml").write_text(HANDLER)
    declaration = tmp_path / "roles/vllm_declaration/tasks"
    declaration.mkdir(parents=True)
    (declaration / "main.yml").write_text(DECLARATION)

    drift = tmp_path / "roles/vllm_drift"
    real = ROOT / "roles/vllm_drift"
    (drift / "tasks/report.yml").symlink_to(real / "tasks/report.yml")
    (drift / "defaults").symlink_to(real / "defaults")
    variables = yaml.safe_load((real / "vars/main.yml").read_text())
    variables["__vllm_drift_blind"] = [{"role": "vllm_model", "tasks": ["Bring *"], "why": "reviewed"}]
    (drift / "vars").mkdir()
    (drift / "vars/main.yml").write_text(yaml.safe_dump(variables))

    playbook = (ROOT / "playbooks/drift.yml").read_text()
    (tmp_path / "drift.yml").write_text(playbook.replace("name: nvl.vllm.", "name: "))
    hosts = {
        name: {"place": str(tmp_path / "hosts" / name), "ansible_connection": "local", "ansible_become": False}
        for name in HOSTS
    }
    # Nothing listens there.
    hosts["gone"].update(ansible_connection="ssh", ansible_host="127.0.0.1", ansible_port=1)
    common = {"secret": SECRET, "ansible_python_interpreter": sys.executable}
    inventory = {"vllm": {"hosts": hosts, "vars": common}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    for name in HOSTS:
        place = tmp_path / "hosts" / name
        for directory in ("one", "two"):
            (place / directory).mkdir(parents=True, mode=0o755)
        (place / "settings.yaml").write_text(f"mode: fast\napi_key: new-{SECRET}\n")
        (place / "settings.yaml").chmod(0o644)
        for instance in ("primary", "secondary"):
            (place / f"{instance}.env").write_text(f"VALUE=new-{SECRET}\n")
            (place / f"{instance}.env").chmod(0o600)
    drifted = tmp_path / "hosts/drifted"
    (drifted / "settings.yaml").write_text(f"mode: slow\napi_key: old-{SECRET}\n")
    (drifted / "primary.env").write_text(f"VALUE=old-{SECRET}\n")
    (drifted / "one").chmod(0o777)
    return tmp_path


def run(project: Path, limit: str, *arguments: str, enabled: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(project / "none.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
        "ANSIBLE_LOCAL_TEMP": str(project / "tmp"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOST_KEY_CHECKING": "0",
    }
    callbacks = "callbacks_enabled = nvl.vllm.drift\n" if enabled else ""
    (project / "none.cfg").write_text(f"[defaults]\n{callbacks}")
    command = ["ansible-playbook", "-i", "hosts.yml", "--limit", limit, "drift.yml", *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def latest(project: Path) -> dict:
    return json.loads((project / ".drift/latest.json").read_text())


def snapshot(directory: Path) -> dict[str, tuple]:
    """Everything below a directory that a change would show in."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (stat.filemode(status.st_mode), status.st_mtime_ns, content)
    return found


def test_hosts_as_declared_are_clean_and_nothing_changes(project):
    before = snapshot(project / "hosts")
    done = run(project, "clean,other", "-e", f"vllm_drift_textfile={project}/drift.prom")
    assert done.returncode == 0, done.stdout + done.stderr
    assert snapshot(project / "hosts") == before
    found = latest(project)
    assert (found["verdict"], found["exit_code"], sorted(found["hosts"])) == ("clean", 0, ["clean", "other"])
    assert found["hosts"]["clean"]["facts"]["nvl.vllm.drift_facts"] == {"uptime": 5}
    assert "Verdict  clean: 2 hosts are as declared" in done.stdout
    prometheus = (project / "drift.prom").read_text()
    assert 'drift_check_failed{host="clean"} 0' in prometheus
    assert stat.S_IMODE((project / "drift.prom").stat().st_mode) == 0o644
    assert stat.S_IMODE((project / ".drift/latest.json").stat().st_mode) == 0o600
    # What the callback wrote is gone with the run.
    assert list((project / "tmp").rglob("*drift*")) == []


def test_a_drifted_host_is_told_apart_and_secrets_stay_hidden(project):
    assert run(project, "drifted").returncode == 2
    (project / "hosts/drifted/one").chmod(0o755)
    (project / "hosts/drifted/two").chmod(0o700)
    done = run(project, "clean,drifted")
    assert done.returncode == 2, done.stdout + done.stderr
    hosts = latest(project)["hosts"]
    assert hosts["clean"]["verdict"] == "clean"
    place = f"{project}/hosts/drifted"
    found = {(one["kind"], one["where"]): one for one in hosts["drifted"]["findings"]}
    assert sorted(found) == [
        ("attributes_changed", f"{place}/two"),
        ("file_changed", f"{place}/primary.env"),
        ("file_changed", f"{place}/settings.yaml"),
    ]
    settings = found["file_changed", f"{place}/settings.yaml"]
    assert settings["diff"].splitlines()[1:] == [
        "-mode: slow",
        "-api_key: ********",
        "+mode: fast",
        "+api_key: ********",
    ]
    assert settings["task"] == "vllm: Write the settings"
    assert "diff" not in found["file_changed", f"{place}/primary.env"]
    two = found["attributes_changed", f"{place}/two"]
    assert (two["found"], two["wanted"]) == ("mode: 0700", "mode: 0755")
    # Compared with the run before.
    assert [one["where"] for one in found.values() if one["new"]] == [f"{place}/two"]
    assert [one["where"] for one in hosts["drifted"]["gone"]] == [f"{place}/one"]
    assert "1 new, 1 gone" in done.stdout
    # Ansible's own output of --diff is not the report's to hide; the report and its files hold no secret.
    kept = [path.read_text() for path in (project / ".drift").rglob("*") if path.is_file()]
    assert [text for text in kept if SECRET in text] == []
    assert SECRET not in done.stdout[done.stdout.index("HOST ") :]


def test_what_cannot_be_looked_at_is_unknown_and_ends_no_other_host(project):
    done = run(project, "all")
    assert done.returncode == 4, done.stdout + done.stderr
    hosts = latest(project)["hosts"]
    verdicts = {name: host["verdict"] for name, host in hosts.items()}
    unknown = ("failing", "broken", "gone", "newly_blind")
    assert verdicts == {
        "clean": "clean",
        "other": "clean",
        "drifted": "drifted",
        "refused": "drifted",
        **dict.fromkeys(unknown, "unknown"),
    }
    assert hosts["failing"]["unknown"] == [
        'role vllm_instances: task "Require what is not there" failed: found nothing, password: ********'
    ]
    assert hosts["broken"]["unknown"] == [
        'role vllm_declaration: task "Check the declaration" failed: vllm_instances is empty'
    ]
    assert len(hosts["gone"]["unknown"]) == 1
    assert hosts["gone"]["unknown"][0].startswith("not reached: ")
    blind = hosts["newly_blind"]["unknown"]
    assert len(blind) == 1
    assert blind[0].startswith('role vllm_health: task "Ask something" is not looked at: command does nothing in check')
    assert len(hosts["drifted"]["findings"]) == 3
    assert [(one["kind"], one["found"]) for one in hosts["refused"]["findings"]] == [
        ("deploy_refused", "the disk is full")
    ]
    assert "could not be looked at in full" in done.stdout


@pytest.mark.parametrize("arguments", [["--tags", "nothing"], ["--start-at-task", "Look"]])
def test_a_run_that_leaves_roles_out_is_not_taken_for_clean(project, arguments):
    assert run(project, "clean", *arguments).returncode == 4
    (told,) = latest(project)["hosts"]["clean"]["unknown"]
    assert told.startswith("not looked at: cuda, vllm, vllm_model, ")


def test_without_the_callback_the_verdict_is_unknown_and_says_what_to_do(project):
    before = snapshot(project / "hosts")
    done = run(project, "clean,drifted", enabled=False)
    assert done.returncode == 4
    assert snapshot(project / "hosts") == before
    told = latest(project)["hosts"]["clean"]["unknown"]
    assert len(told) == 1
    assert "callbacks_enabled = nvl.vllm.drift" in told[0]


def test_a_report_that_cannot_be_kept_is_not_clean(project):
    (project / "file").write_text("")
    done = run(project, "clean", "-e", "vllm_drift_directory=file/below")
    assert done.returncode == 4
    assert "the report cannot be kept" in done.stdout
    assert "Verdict  unknown" in done.stdout


def break_callback(project: Path, name: str) -> None:
    (project / "callback_plugins").mkdir()
    (project / "callback_plugins/breaker.py").write_text(BREAKER % name)


def test_what_the_callback_cannot_note_is_unknown(project):
    """Ansible makes a warning of an error in a callback, and the drift that it was about would be lost."""
    break_callback(project, "changes")
    done = run(project, "clean,drifted")
    assert done.returncode == 4, done.stdout + done.stderr
    hosts = latest(project)["hosts"]
    assert hosts["clean"]["verdict"] == "clean"
    assert hosts["drifted"]["verdict"] == "unknown"
    assert (
        'role vllm: what task "Write the settings" told could not be noted: OSError: [Errno 28] No space left on device'
        in hosts["drifted"]["unknown"]
    )


def test_a_look_that_cannot_even_begin_is_unknown(project):
    break_callback(project, "load_options_vars")
    done = run(project, "clean")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "No space left on device" in latest(project)["hosts"]["clean"]["unknown"][0]


@pytest.mark.parametrize("arguments", [["--skip-tags", "always"], ["--tags", "x", "--skip-tags", "always"]])
def test_a_run_without_a_verdict_is_not_taken_for_clean(project, arguments):
    done = run(project, "clean", *arguments)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Verdict  unknown: no host was judged" in done.stdout
    assert not (project / ".drift").exists()


def test_an_inventory_without_the_hosts_is_not_taken_for_clean(project):
    (project / "hosts.yml").write_text("all: {hosts: {other: {ansible_connection: local}}}")
    done = run(project, "all")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Verdict  unknown: no host was judged" in done.stdout


def test_a_verdict_without_a_report_is_unknown(project):
    done = run(project, "clean,other", "--start-at-task", "The verdict of each host")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no report was made" in done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("vllm_drift_keep", "many", "there is no report: "),
        ("vllm_drift_directory", "{{ nowhere }}", "there is no report: "),
        ("vllm_drift_severities", ["warning"], "vllm_drift_severities is ['warning']: wanted severities by kind"),
        ("vllm_drift_accepted", "all", "vllm_drift_accepted is all: wanted a list"),
        ("vllm_drift_accepted", "{{ nowhere }}", "vllm_drift_accepted cannot be read: "),
        ("vllm_drift_accepted", [{"kind": ["a"], "reason": "{{ nowhere }}"}], "vllm_drift_accepted cannot be read: "),
    ],
)
def test_settings_that_make_no_sense_are_unknown_and_say_so(project, variable, value, told):
    done = run(project, "clean,drifted", "-e", json.dumps({variable: value}))
    assert done.returncode == 4, done.stdout + done.stderr
    assert told in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_damaged_history_is_passed_over(project):
    assert run(project, "clean,drifted").returncode == 2
    (kept,) = (project / ".drift/history").iterdir()
    report = json.loads(kept.read_text())
    del report["hosts"]["drifted"]["findings"]
    kept.write_text(json.dumps(report))
    done = run(project, "clean,drifted")
    assert done.returncode == 2, done.stdout + done.stderr
    hosts = latest(project)["hosts"]
    assert hosts["drifted"]["compared_with"] is None
    assert hosts["clean"]["compared_with"] == report["time"]


def test_a_text_file_that_cannot_be_written_and_the_report_agree(project):
    done = run(project, "clean", "-e", "vllm_drift_textfile=/nowhere/drift.prom")
    assert done.returncode == 4, done.stdout + done.stderr
    assert latest(project)["verdict"] == "unknown"
    (told,) = latest(project)["hosts"]["clean"]["unknown"]
    assert told.startswith("the text file for Prometheus cannot be written: ")


@pytest.fixture
def clients(project):
    """Two hosts in group clients, of which one has an older configuration, and two servers."""
    inventory = yaml.safe_load((project / "hosts.yml").read_text())
    hosts = inventory["vllm"]["hosts"]
    inventory["vllm"]["hosts"] = {"clean": hosts["clean"], "other": hosts["other"]}
    inventory["clients"] = {"hosts": {}, "vars": inventory["vllm"]["vars"]}
    for name, servers in (("client", "clean other"), ("old_client", "clean")):
        place = project / "hosts" / name
        place.mkdir()
        (place / "settings.yaml").write_text(servers)
        (place / "settings.yaml").chmod(0o644)
        inventory["clients"]["hosts"][name] = {**hosts["clean"], "place": str(place)}
    (project / "hosts.yml").write_text(yaml.safe_dump(inventory))
    return project


def test_the_configuration_of_clients_is_looked_at_too(clients):
    before = snapshot(clients / "hosts")
    done = run(clients, "all")
    assert done.returncode == 2, done.stdout + done.stderr
    assert snapshot(clients / "hosts") == before
    hosts = latest(clients)["hosts"]
    verdicts = {name: host["verdict"] for name, host in hosts.items()}
    assert verdicts == {"clean": "clean", "other": "clean", "client": "clean", "old_client": "drifted"}
    (found,) = hosts["old_client"]["findings"]
    place = f"{clients}/hosts/old_client/settings.yaml"
    assert (found["kind"], found["where"]) == ("file_changed", place)
    assert found["task"] == "agentic_client: Write the configuration"


def test_clients_of_a_server_that_is_not_known_are_unknown(clients):
    done = run(clients, "clean,client")
    assert done.returncode == 4, done.stdout + done.stderr
    hosts = latest(clients)["hosts"]
    assert hosts["clean"]["verdict"] == "clean"
    assert hosts["client"]["unknown"] == [
        'role agentic_client: task "Require that all servers are known" failed: a server is not known'
    ]


def test_monitoring_is_looked_at_where_it_is_wanted(project):
    done = run(project, "clean", "-e", '{"vllm_drift_monitoring": true}')
    assert done.returncode == 2, done.stdout + done.stderr
    (found,) = latest(project)["hosts"]["clean"]["findings"]
    assert (found["kind"], found["task"]) == ("file_missing", "vllm_monitoring: Write rules")


def test_each_look_reads_another_part(project):
    for turn in (1, 2):
        assert run(project, "clean").returncode == 0
        assert latest(project)["hosts"]["clean"]["turn"] == turn
    assert drift_turn(str(project / ".drift"), "clean") == 2
    assert drift_turn(str(project / ".drift"), "other") == 0


def test_where_no_report_can_be_kept_the_text_file_says_so(project):
    (project / "file").write_text("")
    textfile = project / "drift.prom"
    done = run(project, "clean", "-e", f"vllm_drift_directory=file/below vllm_drift_textfile={textfile}")
    assert done.returncode == 4, done.stdout + done.stderr
    assert 'drift_check_failed{host="clean"} 1' in textfile.read_text()


def test_what_ends_a_deploy_of_the_driver_is_known_to_the_drift_check(tmp_path):
    """Role cuda goes on past it where the drift check asks, and role vllm_drift tells it."""

    def require(*conditions: str, **variables) -> dict:
        variables = {"cuda_driver_source": "host", **variables}
        return {"ansible.builtin.assert": {"that": list(conditions)}, "vars": variables}

    driver = {"loaded": "", "errors": [], "users": [], "engines_in_use": [], "gpus": [1, 2]}
    known = {"__cuda_os_release": {"content": "SUQ9ZGViaWFuCg=="}, "cuda_driver": {**driver, "in_use": "it is used"}}
    tasks = [
        # Not looked at yet.
        require("__cuda_objections == []"),
        {"ansible.builtin.set_fact": known},
        require("__cuda_objections == []"),
        require("'it is used' in __cuda_objections", cuda_driver_source="nvidia"),
        require(
            "__cuda_objections | length == 2",
            "__cuda_objections[0] == 'GPU 1 is lost'",
            "__cuda_objections[1] is search('2 NVIDIA GPUs are on the PCI bus, and nvidia-smi shows 1')",
            __cuda_settings={"failed": False, "msg": "GPU 1 is lost"},
            __cuda_gpus={"problem": "", "gpus": [{"name": "H100"}]},
        ),
    ]
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": [f"{ROOT}/roles/cuda/{part}/main.yml" for part in ("defaults", "vars")],
        "vars": {"vllm_version": "0.32.0"},
        "tasks": tasks,
    }
    (tmp_path / "objections.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "-c", "local", "objections.yml"],
        cwd=tmp_path,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
