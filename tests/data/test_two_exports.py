"""Two exports of one hospital: 200 patients, 60 in both in three ways of writing, empty cells."""

import json
import random
from collections import defaultdict

import pytest

from medft.data.pairs import read_pairs

SHARED = range(70, 130)
"""Patients of both exports; the first has 0 to 129, the second 70 to 199."""


def written(patient, way):
    return (f"{patient:05d}", patient, float(patient))[way % 3]


@pytest.fixture
def hospital(exports):
    """Write both exports; a row's text names the true patient, about one cell in ten is empty."""

    def write(**options):
        drawn = random.Random(7)
        tables, empty = {}, {}
        for name, patients in (("xray", range(130)), ("ct", range(70, 200))):
            rows = []
            for patient in patients:
                for number in range(1 + patient % 2):
                    cell = f"{patient:05d}" if name == "xray" else written(patient, patient)
                    cell = "" if drawn.random() < 0.1 else cell
                    rows.append({"patient": cell, "text": f"{patient} {name} {number}"})
            kind = "csv" if name == "xray" else "jsonl"
            tables[name] = (rows, {"kind": kind, **options})
            empty[name] = sum(row["patient"] == "" for row in rows)
        return exports({"validation": 0.1, "test": 0.1}, **tables), tables, empty

    return write


def known(tables, name):
    return {row["text"].split()[0] for row in tables[name][0] if row["patient"] != ""}


def test_ways_of_writing_are_refused_with_two_pairs_and_nothing_is_written(
    hospital, tmp_path, medft, capsys
):
    sources, _, _ = hospital()
    assert medft("data", "prepare", sources, "--out", tmp_path / "out") == 2
    sentence = capsys.readouterr().err
    assert sentence.count(" (xray) and ") == 2
    assert sentence.count(" (ct)") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty_group", ["reject", "image"])
def test_no_patient_stands_on_two_sides_and_what_is_shared_or_empty_is_counted(
    hospital, tmp_path, medft, capsys, empty_group
):
    sources, tables, empty = hospital(group_form="loose", empty_group=empty_group)
    words = ("data", "prepare", sources, "--out", tmp_path / "out")
    assert medft(*words, "--max-rejects", "0.3") == 0
    printed = capsys.readouterr().out
    shared = len(known(tables, "xray") & known(tables, "ct"))
    assert 50 < shared <= len(SHARED)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["shared_group_values"] == shared
    assert {name: s["empty_groups"] for name, s in summary["sources"].items()} == empty
    assert min(empty.values()) > 5
    for name, counts in summary["sources"].items():
        assert counts["accepted"] + counts["rejected"] == counts["read"] == len(tables[name][0])

    sides, groups = defaultdict(set), defaultdict(set)
    for row in read_pairs(tmp_path / "out" / "pairs.parquet", images=False):
        if not row["group_id"].startswith("image/"):
            sides[row["text"].split()[0]].add(row["split"])
            groups[row["text"].split()[0]].add(row["group_id"])
    assert len(sides) == len(known(tables, "xray") | known(tables, "ct"))
    assert all(len(found) == 1 for found in (*sides.values(), *groups.values()))
    assert {side for found in sides.values() for side in found} == {"train", "validation", "test"}

    page = (tmp_path / "out" / "report.html").read_text()
    became = {"reject": "were rejected", "image": "were grouped by image"}[empty_group]
    for text in (printed, page):
        assert f"{shared} group values stand in several sources (xray, ct {shared})" in text
        for name, count in empty.items():
            assert f"{name}: {count} rows have no patient and {became}" in text
