"""run.json keeps every part of a run, and says what changed from one to the next."""

import json
import logging

import pytest

from medft.models.run_record import parts_of, resumed_steps
from medft.models.saved import RunLayout
from medft.training.parts import changes_between_parts, go_on, update_part

MACHINE = {
    "medft": {"version": "1", "commit": "a", "dirty": False},
    "packages": {"torch": "2.13.0"},
    "hardware": {"machine": "x86_64", "cpu_count": 2, "gpus": ["A"]},
    "launch": {
        "launcher": "python",
        "strategy": "single",
        "asked_processes": None,
        "processes": 1,
        "threads": 1,
    },
}
OLD = {
    "status": "failed", "started": "first", "error": "x", "steps_done": 7, "argv": ["r.yaml"],
    "recipe": {"train": {"seed": 1}}, **MACHINE,
}  # fmt: skip


def test_a_record_without_parts_is_its_own_first_part():
    last = {key: OLD[key] for key in OLD if key != "recipe"}
    assert parts_of(OLD) == [last | {"from_step": 0}]
    assert resumed_steps(OLD) == []
    resumed = OLD | {"resumed": ["second", "third"], "resumed_from_steps": [3, 5]}
    assert parts_of(resumed) == [
        {"started": "first", "from_step": 0},
        {"started": "second", "from_step": 3},
        last | {"started": "third", "from_step": 5},
    ]
    assert resumed_steps(resumed) == [3, 5]
    older = OLD | {"resumed": ["second", "third"], "resumed_from_steps": [5]}
    assert [part["from_step"] for part in parts_of(older)] == [0, None, 5]
    assert resumed_steps(older) == [5]


@pytest.fixture
def begin(runs, tmp_path):
    """Begin a part of a run whose record is given; gives the record as it is then."""
    start = {"started": "now", "recipe": {"train": {"seed": 2, "save_steps": 5}}, **MACHINE}
    layout = RunLayout(tmp_path)
    content = json.loads((runs / "decoder" / "run.json").read_text())
    content = {key: content[key] for key in ("base", "data", "batch")}

    def run(earlier, checkpoint=None, **changes):
        if earlier is not None:
            layout.record.write_text(json.dumps(content | earlier))
        record = start | {"status": "running", "parts": [{"started": "now", "from_step": 0}]}
        record |= changes
        go_on(layout, record, tmp_path / f"checkpoint-{checkpoint}" if checkpoint else None)
        update_part(record)
        return record

    return run


def test_a_part_is_put_behind_the_earlier_ones_which_stay_as_they_were(begin):
    first = begin(None)
    assert (first["started"], first["parts"][0]["from_step"]) == ("now", 0)
    assert first["parts"][0]["packages"] == {"torch": "2.13.0"}
    record = begin(OLD | {"init_from": {"path": "a", "sha256": "b"}}, checkpoint=4)
    assert record["started"] == "first"
    assert record["init_from"] == {"path": "a", "sha256": "b"}
    assert record["parts"][0] == parts_of(OLD)[0]
    part = record["parts"][1]
    assert (part["from_step"], part["status"], part["started"]) == (4, "running", "now")
    assert part["changed"] == {"train.seed": [1, 2], "train.save_steps": [None, 5]}
    assert "error" not in part
    record["status"] = "completed"
    update_part(record)
    assert [part["status"] for part in record["parts"]] == ["failed", "completed"]
    afresh = begin(OLD)
    assert [part["from_step"] for part in afresh["parts"]] == [0, 0]


def test_what_differs_from_the_part_before_is_one_warning(begin, caplog):
    changes = {
        "medft": {"version": "1", "commit": "b", "dirty": False},
        "packages": {"torch": "2.15.0"},
        "hardware": {"machine": "x86_64", "cpu_count": 64, "gpus": ["B"]},
        "launch": {"threads": 2},
    }
    with caplog.at_level(logging.WARNING, logger="medft"):
        begin(OLD, checkpoint=4)
        assert not caplog.text
        record = begin(OLD, checkpoint=4, **changes)
    [entry] = caplog.records
    sentences = ["medft.commit was a and is b", "packages.torch was 2.13.0 and is 2.15.0",
                 "hardware.gpus was ['A'] and is ['B']", "threads was 1 and is 2"]  # fmt: skip
    said = ", ".join(sentences)
    assert entry.getMessage().endswith(f"{said}; MEDFT_THREADS=1 restores the threads")
    assert changes_between_parts(record) == [f"from step 4 on, {text}" for text in sentences]
    caplog.clear()
    without = {key: OLD[key] for key in OLD if key != "launch"}
    begin(without, checkpoint=4, launch={"threads": 2})
    assert not caplog.text


def test_a_part_that_began_afresh_goes_on_with_nothing_of_the_one_before():
    parts = [MACHINE, MACHINE | {"launch": {"threads": 2}}]
    for step, found in ((4, 1), (0, 0)):
        begun = [{**part, "started": "x", "from_step": step} for part in parts]
        assert len(changes_between_parts({"parts": begun})) == found
