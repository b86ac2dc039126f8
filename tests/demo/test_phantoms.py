"""What a report says is visible in the image, and the exports hold what a demo needs."""

import json
import re

import numpy as np
import pytest

from medft.data.prepare import prepare
from medft.demo import chain
from medft.demo.exports import write_exports
from medft.demo.phantoms import MODALITIES, SIZES, Phantom, caption, draw_phantom, render, report
from medft.errors import RunError
from medft.metrics.assertions import mentions
from medft.metrics.lexicon import load_lexicon

LEVELS, SIDES = ("upper", "lower"), ("left", "right")


def quadrant_of_change(phantom, seed, **options):
    """Where an image differs most from the same image without finding."""
    empty = Phantom(phantom.modality, None, *_rest(phantom))
    with_finding, without = (
        render(p, np.random.default_rng(seed), **options) for p in (phantom, empty)
    )
    half = len(without) // 2
    change = np.abs(with_finding - without).mean(axis=2)
    change[change < 35] = 0  # noise, which is drawn anew
    sums = {
        (level, side): change[rows, columns].sum()
        for level, rows in zip(LEVELS, (slice(0, half), slice(half, None)), strict=True)
        for side, columns in zip(SIDES, (slice(0, half), slice(half, None)), strict=True)
    }
    return max(sums, key=sums.get), change.sum()


def _rest(phantom):
    return phantom.count, phantom.size, phantom.level, phantom.side


@pytest.mark.parametrize("modality", MODALITIES)
def test_side_level_count_and_size_of_the_report_are_those_of_the_image(modality):
    for look in MODALITIES[modality].looks:
        for level in LEVELS:
            for side in SIDES:
                phantom = Phantom(modality, look, 1, "small", level, side)
                place, small = quadrant_of_change(phantom, seed=4)
                assert place == (level, side)
                text = report(phantom, np.random.default_rng(0))
                assert {level, side, "one", "small"} <= set(re.findall(r"\w+", text.lower()))
        three = Phantom(modality, look, 3, "small", "upper", "left")
        large = Phantom(modality, look, 1, "large", "upper", "left")
        assert quadrant_of_change(three, seed=4)[1] > 1.5 * small
        assert quadrant_of_change(large, seed=4)[1] > 1.5 * small


def test_a_lateral_view_shows_the_level_only():
    look = MODALITIES["chest"].looks[0]
    for level in LEVELS:
        views = [
            quadrant_of_change(Phantom("chest", look, 1, "large", level, side), 4, lateral=True)
            for side in SIDES
        ]
        assert views[0] == views[1]
        assert views[0][0][0] == level


def test_findings_of_a_modality_look_different():
    for modality, kind in MODALITIES.items():
        images = []
        for look in kind.looks:
            phantom = Phantom(modality, look, 1, "large", "upper", "left")
            images.append(render(phantom, np.random.default_rng(1)))
        radius = SIZES["large"] * len(images[0])
        for one, other in zip(images, images[1:] + images[:1], strict=True):
            assert np.abs(one - other).mean(axis=2).sum() > 20 * np.pi * radius**2


def test_reports_name_the_finding_as_the_lexicon_knows_it_and_none_where_there_is_none():
    lexicon, random = load_lexicon(), np.random.default_rng(2)
    for modality in MODALITIES:
        for _ in range(60):
            phantom = draw_phantom(modality, random)
            found = mentions(report(phantom, random), lexicon)
            if phantom.look is None:
                assert found == {("no finding", "")}
                assert caption(phantom) == "no discs."
            else:
                assert len(found) == 1, report(phantom, random)
                assert next(iter(found))[1] == phantom.side
                assert phantom.look.noun not in caption(phantom)


def test_without_pydicom_the_demo_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r'pip install "medft\[dicom\]"'):
        chain.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_exports_are_drawn_from_their_seed(tmp_path):
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_exports(tmp_path / name, pairs=12, seed=seed)
        files[name] = {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


@pytest.mark.slow
def test_the_demos_exports_give_2317_pairs_and_116_to_validate(tmp_path):
    sources = write_exports(tmp_path / "raw", pairs=2317, seed=17)
    summary = prepare(sources, tmp_path)
    assert summary["pairs"] == 2317
    assert summary["splits"] == {"train": 2201, "validation": 116}
    assert summary["shared_by_sources"] == {"chest, ct": 290}  # films and slices of one patient
    assert summary["largest_group"] <= 12
    assert set(summary["sources"]) == {"knee", "skin", "chest", "ct"}
    chest = summary["sources"]["chest"]
    assert chest["accepted"] > 1.2 * chest["pairs"]  # studies with two views
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {(line["source"], line["reason"]) for line in rejects} == {
        ("knee", "missing_image"),
        ("knee", "bad_image"),
        ("knee", "empty_text"),
        ("knee", "duplicate"),
        ("skin", "bad_image"),
        ("skin", "outside_root"),
        ("chest", "outside_root"),
        ("ct", "burned_in_annotation"),
        ("ct", "no_image"),
    }
