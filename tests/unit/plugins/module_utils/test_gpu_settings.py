"""Settings of GPUs: what is to change, what cannot be had, and what did not take."""

from __future__ import annotations

import pytest
from ansible_collections.nvl.vllm.plugins.module_utils import _gpu_settings
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_info import Gpu, Process
from ansible_collections.nvl.vllm.plugins.module_utils._gpu_settings import SettingsError, Wanted

A, B = "GPU-a", "GPU-b"
GPUS = [Gpu("00000000:AD:00.0", index=0, uuid=A), Gpu("00000000:AE:00.0", index=1, uuid=B)]
FIRST = "GPU 0 (00000000:AD:00.0)"
#: A board as engines want it, in the order of the query.
WELL = {
    "persistence_mode": "Enabled",
    "mig_mode": "Disabled",
    "mig_pending": "Disabled",
    "compute_mode": "Default",
    "power_limit_w": "400.00",
    "power_default_w": "400.00",
    "power_min_w": "200.00",
    "power_max_w": "400.00",
}
QUERY = (
    "--query-gpu=uuid,persistence_mode,mig.mode.current,mig.mode.pending,compute_mode,"
    "power.limit,power.default_limit,power.min_limit,power.max_limit"
)


class Boards:
    """A stand-in for nvidia-smi and its boards: answers the query and does what it is told, with faults.

    ``ignores`` are options that it says are done and does not do. ``forgets`` makes a change of MIG
    turn the rest back, ``pending`` makes it wait for a reset.
    """

    def __init__(self, **first):
        self.rows = {A: {**WELL, **first}, B: dict(WELL)}
        self.told = []
        self.ignores = ()
        self.forgets = self.pending = False
        self.says = "All done."

    def __call__(self, argv, timeout):
        assert argv[0] == "nvidia-smi"
        assert timeout == 7.0
        if argv[1].startswith("--id="):
            assert argv[2:] == [QUERY, "--format=csv,noheader,nounits"]
            ids = argv[1][len("--id=") :].split(",")
            return 0, "".join(", ".join([uuid, *self.rows[uuid].values()]) + "\n" for uuid in ids), ""
        self.told.append(argv[1:])
        option, value, row = argv[3], argv[4], self.rows[argv[2]]
        if option in self.ignores:
            return 0, f"{self.says}\n", ""
        if option == "-mig":
            row["mig_pending"] = "Disabled"
            row["mig_mode"] = row["mig_mode"] if self.pending else "Disabled"
            if self.forgets:
                row["persistence_mode"] = "Disabled"
        elif option == "-pm":
            row["persistence_mode"] = {"0": "Disabled", "1": "Enabled"}[value]
        elif option == "-c":
            row["compute_mode"] = {"0": "Default", "3": "Exclusive_Process"}[value]
        else:
            row["power_limit_w"] = f"{float(value):.2f}"
        return 0, "All done.\n", ""

    def settings(self, gpus=GPUS):
        return _gpu_settings.ask(gpus, self, 7.0)

    def bring(self, **options):
        self.tried = []
        return _gpu_settings.bring(GPUS, self.settings(), Wanted(**options), self, 7.0, self.tried)


def changes(boards, **options):
    return [(change.gpu, *change[2:]) for change in _gpu_settings.plan(boards.settings(), Wanted(**options))]


def complaints(boards, gpus=GPUS, **options):
    return _gpu_settings.complaints(boards.settings(), Wanted(**options), gpus)


# What is set


def test_the_settings_of_a_board_are_read():
    assert Boards().settings()[0] == _gpu_settings.Settings(
        gpu=FIRST,
        index=0,
        uuid=A,
        persistence_mode="Enabled",
        mig_mode="Disabled",
        mig_pending="Disabled",
        compute_mode="Default",
        power_limit_w=400.0,
        power_default_w=400.0,
        power_min_w=200.0,
        power_max_w=400.0,
    )


@pytest.mark.parametrize("said", ["[N/A]", "N/A", "[Not Supported]", "[Requested functionality has been deprecated]"])
def test_what_a_board_does_not_have_is_none(said):
    settings = Boards(mig_mode=said, power_limit_w=said).settings()[0]
    assert (settings.mig_mode, settings.power_limit_w, settings.unreadable) == (None, None, {})


@pytest.mark.parametrize("said", ["ERR!", "[Unknown Error]", "[GPU is lost]", ""])
def test_what_cannot_be_read_is_not_taken_for_not_there(said):
    settings = Boards(compute_mode=said, power_limit_w=said).settings()[0]
    assert settings.compute_mode is None
    assert settings.unreadable == {"compute_mode": said, "power_limit_w": said}


def test_lines_around_the_answer_do_no_harm():
    def run(argv, timeout):
        _, out, err = Boards()(argv, timeout)
        return 14, f"{out}WARNING: infoROM is corrupted at gpu 0000:AE:00.0\n", err

    assert [settings.uuid for settings in _gpu_settings.ask(GPUS, run, 7.0)] == [A, B]


def test_a_gpu_that_the_answer_leaves_out_is_named():
    def run(argv, timeout):
        return 4, f"{A}, {', '.join(WELL.values())}\n", "Insufficient Permissions\n"

    with pytest.raises(SettingsError) as error:
        _gpu_settings.ask(GPUS, run, 7.0)
    assert str(error.value).startswith("nvidia-smi does not tell the settings of GPU 1 (00000000:AE:00.0): ")
    assert "run this as root" in str(error.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(TimeoutError(), "did not answer within 7 s"), (PermissionError(13, "Permission denied"), "cannot be started")],
)
def test_nvidia_smi_that_hangs_or_does_not_start(fault, words):
    def run(argv, timeout):
        raise fault

    with pytest.raises(SettingsError, match=words):
        _gpu_settings.ask(GPUS, run, 7.0)


# Which GPUs


@pytest.mark.parametrize(("names", "indexes"), [((), [0, 1]), (("1",), [1]), ((A,), [0]), ((B, "0", "1"), [0, 1])])
def test_gpus_are_chosen_by_index_or_uuid(names, indexes):
    chosen, wrong = _gpu_settings.select(GPUS, Wanted(gpus=names))
    assert ([gpu.index for gpu in chosen], wrong) == (indexes, [])


def test_a_gpu_that_is_not_there():
    _, wrong = _gpu_settings.select(GPUS, Wanted(gpus=("0", "2"), prefix="cuda_"))
    assert wrong == [
        "cuda_gpus names 2, and the host has 0 (GPU-a), 1 (GPU-b): name its GPUs by index or UUID",
    ]


@pytest.mark.parametrize("uuid", [None, B])
def test_a_lost_gpu_is_an_error_only_where_it_is_chosen(uuid):
    gpus = [GPUS[0], Gpu("00000000:AE:00.0", index=1, uuid=uuid, lost=True)]
    assert _gpu_settings.select(gpus, Wanted(gpus=("0",))) == ([GPUS[0]], [])
    _, wrong = _gpu_settings.select(gpus, Wanted(prefix="cuda_"))
    assert wrong == [
        "GPU 1 (00000000:AE:00.0) is lost, so cuda_gpus cannot be set with it: reboot the host, or name only the other "
        "GPUs in cuda_gpus"
    ]


# What is to change


def test_nothing_changes_where_all_is_as_wanted():
    assert changes(Boards()) == []


@pytest.mark.parametrize(
    ("first", "options", "change"),
    [
        ({"persistence_mode": "Disabled"}, {}, ("persistence", "Disabled", "Enabled", "-pm", "1")),
        ({"mig_mode": "Enabled", "mig_pending": "Enabled"}, {}, ("mig", "Enabled", "Disabled", "-mig", "0")),
        (
            {"mig_pending": "Enabled"},
            {},
            ("mig", "Disabled, Enabled after a reset", "Disabled", "-mig", "0"),
        ),
        (
            {"mig_mode": "Enabled"},
            {},
            ("mig", "Enabled, Disabled after a reset", "Disabled", "-mig", "0"),
        ),
        ({"compute_mode": "Prohibited"}, {}, ("compute_mode", "Prohibited", "Default", "-c", "0")),
        ({"power_limit_w": "310.00"}, {}, ("power_limit", "310.00 W", "400.00 W", "-pl", "400")),
        (
            {"power_limit_w": "400.00", "power_default_w": "310.00"},
            {},
            ("power_limit", "400.00 W", "310.00 W", "-pl", "310"),
        ),
        (
            {"power_limit_w": "350.50"},
            {"power_limit": "350.25", "gpus": ("0",)},
            ("power_limit", "350.50 W", "350.25 W", "-pl", "350.25"),
        ),
    ],
)
def test_one_difference_is_one_change(first, options, change):
    setting, before, after, option, value = change
    found = [each for each in changes(Boards(**first), **options) if each[0] == FIRST]
    assert found == [(FIRST, setting, before, after, ["nvidia-smi", "-i", A, option, value])]


def test_what_is_to_be_left_is_left():
    boards = Boards(mig_mode="Enabled", mig_pending="Enabled", compute_mode="Prohibited", power_limit_w="ERR!")
    wanted = {"mig": "leave", "compute_mode": "leave", "power_limit": "leave"}
    assert changes(boards, **wanted) == []
    assert complaints(boards, **wanted) == []


def test_exclusive_and_without_persistence_on_all_gpus():
    found = changes(Boards(), persistence=False, compute_mode="exclusive_process")
    assert [each[1:4] for each in found] == 2 * [
        ("persistence", "Enabled", "Disabled"),
        ("compute_mode", "Default", "Exclusive_Process"),
    ]


def test_the_commands_set_all_from_scratch_and_leave_out_what_a_board_does_not_have():
    boards = Boards(mig_mode="[N/A]", mig_pending="[N/A]")
    start = [["nvidia-smi", "-i", uuid] for uuid in (A, B)]
    assert _gpu_settings.commands(boards.settings(), Wanted(power_limit="350")) == [
        [*start[0], "-pm", "1"],
        [*start[0], "-c", "0"],
        [*start[0], "-pl", "350"],
        [*start[1], "-mig", "0"],
        [*start[1], "-pm", "1"],
        [*start[1], "-c", "0"],
        [*start[1], "-pl", "350"],
    ]


# What cannot be had


@pytest.mark.parametrize("limit", ["0", "-5", "350 W", "nan", "1e3", "", "max"])
def test_a_power_limit_that_is_no_number_of_watts(limit):
    assert _gpu_settings.value_complaints(Wanted(power_limit=limit, prefix="cuda_")) == [
        f"cuda_power_limit is {limit}: wanted a number of watts such as 350, or default, or leave"
    ]


@pytest.mark.parametrize("limit", ["350", "350.5", "default", "leave"])
def test_a_power_limit_that_is_one(limit):
    assert _gpu_settings.value_complaints(Wanted(power_limit=limit)) == []


def test_settings_that_do_not_outlive_the_last_process_are_refused():
    wrong = _gpu_settings.value_complaints(
        Wanted(persistence=False, power_limit="350", compute_mode="exclusive_process", prefix="cuda_")
    )
    assert [sentence.partition(", which")[0] for sentence in wrong] == [
        "cuda_persistence is false and cuda_compute_mode is exclusive_process",
        "cuda_persistence is false and cuda_power_limit is 350",
    ]
    assert _gpu_settings.value_complaints(Wanted(persistence=False, power_limit="leave")) == []


@pytest.mark.parametrize(("limit", "fits"), [("199.9", False), ("200", True), ("400", True), ("401", False)])
def test_a_power_limit_must_be_in_the_range_of_each_board(limit, fits):
    boards = Boards(power_min_w="100.00", power_max_w="500.00")
    sentence = (
        f"cuda_power_limit is {limit} W, and GPU 1 (00000000:AE:00.0) takes 200 to 400 W: set cuda_power_limit to a "
        "value in this range or to default"
    )
    assert complaints(boards, power_limit=limit, prefix="cuda_") == ([] if fits else [sentence])


NOTHING = dict.fromkeys(WELL, "[N/A]")


def test_a_board_that_has_none_of_it_is_left_alone_with_notes():
    boards = Boards(**NOTHING)
    assert changes(boards) == []
    assert complaints(boards) == []
    assert _gpu_settings.notes(boards.settings(), Wanted(prefix="cuda_")) == [
        f"{FIRST} does not have the setting, so cuda_{setting} does nothing there"
        for setting in ("mig", "persistence", "compute_mode", "power_limit")
    ]


def test_a_board_that_does_not_tell_its_default_limit_keeps_the_one_it_has():
    boards = Boards(power_default_w="[N/A]", power_limit_w="310.00")
    assert (changes(boards), complaints(boards)) == ([], [])
    assert len(_gpu_settings.notes(boards.settings(), Wanted())) == 1


def test_another_value_than_the_default_is_an_error_there():
    assert complaints(Boards(**NOTHING), power_limit="350", compute_mode="exclusive_process", prefix="cuda_") == [
        f"cuda_compute_mode is exclusive_process, and {FIRST} does not have that setting: set cuda_compute_mode to "
        "default, or leave this GPU out of cuda_gpus",
        f"cuda_power_limit is 350, and {FIRST} does not have that setting: set cuda_power_limit to default, or leave "
        "this GPU out of cuda_gpus",
    ]
    (sentence,) = complaints(Boards(**NOTHING), persistence=False)
    assert sentence.startswith("persistence is false, and ")
    assert "set persistence to true" in sentence


def test_a_limit_is_wanted_and_the_board_tells_no_range():
    assert complaints(Boards(power_min_w="[N/A]", power_max_w="[N/A]"), power_limit="350") == []


@pytest.mark.parametrize(
    ("name", "setting", "asked"),
    [
        ("mig_pending", "mig", "mig.mode.pending"),
        ("persistence_mode", "persistence", "persistence_mode"),
        ("compute_mode", "compute_mode", "compute_mode"),
        ("power_limit_w", "power_limit", "power.limit"),
        ("power_default_w", "power_limit", "power.default_limit"),
        ("power_min_w", "power_limit", "power.min_limit"),
    ],
)
def test_a_value_that_cannot_be_read_is_an_error(name, setting, asked):
    (sentence,) = complaints(Boards(**{name: "ERR!"}), prefix="cuda_")
    assert sentence.startswith(f"cuda_{setting} cannot be checked on {FIRST}, as nvidia-smi tells ERR! for {asked}: ")


def test_mig_is_not_changed_under_processes():
    boards = Boards(mig_mode="Enabled", mig_pending="Enabled")
    busy = [
        Gpu("00000000:AD:00.0", index=0, uuid=A, processes=[Process(42, "python3", 100), Process(7, "train", None)]),
        GPUS[1],
    ]
    assert complaints(boards, gpus=busy, prefix="cuda_") == [
        f"cuda_mig is off, and MIG of {FIRST} is Enabled while processes use the GPU: end 42 (python3), 7 (train), and "
        "run this again"
    ]
    assert complaints(Boards(persistence_mode="Disabled"), gpus=busy) == []


# Changing


def test_all_differences_are_changed_in_order_and_only_these():
    boards = Boards(mig_mode="Enabled", mig_pending="Enabled", persistence_mode="Disabled", power_limit_w="310.00")
    after, failures = boards.bring()
    assert failures == []
    assert boards.told == [["-i", A, "-mig", "0"], ["-i", A, "-pm", "1"], ["-i", A, "-pl", "400"]]
    assert [change.setting for change in boards.tried] == ["mig", "persistence", "power_limit"]
    assert after == Boards().settings()
    assert boards.bring() == (after, [])
    assert boards.tried == []


def test_what_a_change_of_mig_made_the_board_forget_is_set_again():
    boards = Boards(mig_mode="Enabled", mig_pending="Enabled")
    boards.forgets = True
    after, failures = boards.bring()
    assert failures == []
    assert boards.told == [["-i", A, "-mig", "0"], ["-i", A, "-pm", "1"]]
    assert after == Boards().settings()


@pytest.mark.parametrize(
    ("first", "option", "sentence"),
    [
        (
            {"persistence_mode": "Disabled"},
            "-pm",
            "persistence did not take on {gpu}: wanted Enabled, and it is Disabled; nvidia-smi wrote All done.: look",
        ),
        (
            {"compute_mode": "Prohibited"},
            "-c",
            "compute_mode did not take on {gpu}: wanted Default, and it is Prohibited; nvidia-smi wrote All done.: ",
        ),
        (
            {"power_limit_w": "310.00"},
            "-pl",
            "power_limit did not take on {gpu}: wanted 400.00 W, and it is 310.00 W; nvidia-smi wrote All done.: look",
        ),
        (
            {"mig_mode": "Enabled", "mig_pending": "Enabled"},
            "-mig",
            "mig did not take on {gpu}: wanted Disabled, and it is Enabled; nvidia-smi wrote All done.: end all that "
            "uses the GPU, monitoring too, destroy its instances (nvidia-smi mig -i GPU-a -dci, ",
        ),
    ],
)
def test_a_setting_that_did_not_take_is_told_whatever_the_exit_status(first, option, sentence):
    boards = Boards(**first)
    boards.ignores = (option,)
    _, (failure,) = boards.bring()
    assert failure.startswith(sentence.format(gpu=FIRST))


def test_one_that_did_not_take_does_not_hold_up_the_others():
    boards = Boards(persistence_mode="Disabled", power_limit_w="310.00")
    boards.ignores = ("-pm",)
    after, failures = boards.bring(prefix="cuda_")
    assert len(failures) == 1
    assert failures[0].startswith("cuda_persistence did not take")
    assert after[0].power_limit_w == 400.0


def test_mig_that_waits_for_a_reset():
    boards = Boards(mig_mode="Enabled", mig_pending="Enabled")
    boards.pending = True
    _, (failure,) = boards.bring()
    assert "it is Enabled, Disabled after a reset; " in failure
    assert failure.endswith(": reboot the host, or with nothing on the GPU run nvidia-smi --gpu-reset -i GPU-a")


def test_without_the_right_to_change_it():
    boards = Boards(power_limit_w="310.00")
    boards.ignores, boards.says = ("-pl",), "Failed to set power management limit: Insufficient Permissions"
    _, (failure,) = boards.bring()
    assert "run this as root (become: true)" in failure


def test_a_value_that_cannot_be_read_back_did_not_take():
    boards = Boards(persistence_mode="Disabled")
    before = boards.settings()
    boards.rows[A]["persistence_mode"] = "[N/A]"
    (failure,) = _gpu_settings.missed(before, boards.settings(), Wanted(), {})
    assert failure.startswith(f"persistence did not take on {FIRST}: wanted Enabled, and it is not told; ")


def test_after_a_hang_nothing_more_is_asked():
    boards = Boards(persistence_mode="Disabled", power_limit_w="310.00")
    before, asked, tried = boards.settings(), [], []

    def run(argv, timeout):
        asked.append(argv)
        raise TimeoutError

    with pytest.raises(SettingsError, match=f"nvidia-smi -i {A} -pm 1: nvidia-smi did not answer within 7 s"):
        _gpu_settings.bring(GPUS, before, Wanted(), run, 7.0, tried)
    assert len(asked) == 1
    assert [change.setting for change in tried] == ["persistence"]


def test_the_prediction_is_what_comes_out():
    def boards():
        return Boards(mig_mode="Enabled", mig_pending="Enabled", compute_mode="Prohibited", persistence_mode="[N/A]")

    wanted = {"power_limit": "250", "compute_mode": "exclusive_process"}
    after, failures = boards().bring(**wanted)
    assert failures == []
    assert _gpu_settings.predicted(boards().settings(), Wanted(**wanted)) == after


def test_the_lines_of_a_diff():
    assert _gpu_settings.describe(Boards(mig_mode="[N/A]").settings(GPUS[:1])) == (
        f"{FIRST}: persistence_mode Enabled\n"
        f"{FIRST}: mig_mode N/A\n"
        f"{FIRST}: mig_pending Disabled\n"
        f"{FIRST}: compute_mode Default\n"
        f"{FIRST}: power_limit 400.00 W\n"
    )
