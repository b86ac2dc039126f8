"""A library that was not tested is named before training, and in the record of the run."""

import json
from pathlib import Path

import pytest

from medft import compat

ROOT = Path(__file__).parent.parent


def test_the_tested_minors_hold_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, minors in compat.TESTED.items():
        assert pinned[name].startswith(tuple(f"{minor}." for minor in minors)), name


@pytest.mark.parametrize(
    ("version", "is_named"), [("5.23.4", False), ("5.24.0", True), ("6", True)]
)
def test_another_minor_is_named(monkeypatch, version, is_named):
    monkeypatch.setattr(compat, "TESTED", {"transformers": ["5.17", "5.23"]})
    monkeypatch.setattr(
        compat, "package_versions", lambda: {"transformers": version, "pillow": "99.0"}
    )
    assert compat.untested_versions() == ({"transformers": version} if is_named else {})


def test_a_run_on_an_untested_version_says_so_once_and_records_it(
    monkeypatch, sections, write_recipe, run_script, caplog
):
    monkeypatch.setitem(compat.TESTED, "peft", ["0.1"])
    recipe = sections("siglip")
    recipe["train"] |= {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0}
    file = write_recipe(recipe)
    run_script("siglip", file)
    [line] = [message for message in caplog.messages if "was tested with" in message]
    record = json.loads((file.with_suffix("") / "run.json").read_text())
    assert record["untested_packages"] == {"peft": record["packages"]["peft"]}
    assert line.endswith(f": peft {record['packages']['peft']}")
