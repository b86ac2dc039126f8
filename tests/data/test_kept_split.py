"""Patients of an earlier export keep their side, whatever comes later."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from exports import patients, places

from medft.data.prepare import prepare
from medft.errors import DataError

SHARES = {"validation": 0.2, "test": 0.2, "seed": 5}


def side(out):
    return {group: next(iter(found)) for group, found in places(out).items()}


def keeping(earlier):
    return {**SHARES, "keep": str(earlier / "pairs.parquet")}


def test_three_growing_exports_keep_every_earlier_side(exports, tmp_path):
    names, earlier = [f"p{i}" for i in range(60)], None
    for number, count in enumerate((40, 50, 60)):
        split = keeping(earlier) if earlier else SHARES
        sources = exports(split, folder=str(number), a=(patients(*names[:count]), {}))
        summary = prepare(sources, tmp_path / f"out{number}")
        now = side(tmp_path / f"out{number}")
        if earlier:
            before = side(earlier)
            assert {name: now[name] for name in before} == before
            known = len(before)
            assert summary["kept"] == {"groups": known, "pairs": known, "not_found": 0}
        assert summary["splits"] == {"test": count // 5, "train": count * 3 // 5,
                                     "validation": count // 5}  # fmt: skip
        earlier = tmp_path / f"out{number}"
    # the opposite: drawn anew, earlier patients change their side
    prepare(exports(SHARES, folder="anew", a=(patients(*names), {})), tmp_path / "anew_out")
    before = side(tmp_path / "out0")
    anew = side(tmp_path / "anew_out")
    assert {name: anew[name] for name in before} != before


@pytest.fixture
def first(exports, tmp_path):
    """An export of 20 patients and its prepared folder, with one of train and one of test."""
    rows = patients(*range(20))
    sources = exports(SHARES, folder="first", a=(rows, {}))
    prepare(sources, tmp_path / "earlier")
    by_side = {place: name for name, place in side(tmp_path / "earlier").items()}
    table = (sources.parent / "a.csv").read_text().splitlines()[1:]
    image_of = {f"group/{line.split(',')[2]}": line.split(",")[1] for line in table}
    images = {place: image_of[name] for place, name in by_side.items()}
    return sources.parent, tmp_path / "earlier", by_side, images


def later(exports, first, rows, split=None, **options):
    """A later export with new rows, which may name images of the first."""
    sources = exports(split or keeping(first[1]), folder="later", a=(rows, options))
    for path in (first[0] / "images").iterdir():
        shutil.copy(path, sources.parent / "images")
    return sources


def test_a_known_image_brings_a_new_patient_to_its_side(exports, tmp_path, first):
    _, _, _, images = first
    rows = [{"patient": f"new{i}", "image": images["test"]} for i in range(2)]
    prepare(later(exports, first, [*rows, *patients("n1", "n2")]), tmp_path / "out")
    assert side(tmp_path / "out")["group/new0"] == "test"


def test_an_image_that_joins_both_sides_is_an_error_that_names_the_groups(exports, tmp_path, first):
    _, _, by_side, images = first
    name = by_side["train"].removeprefix("group/")
    sources = later(exports, first, [{"patient": name, "image": images["test"]}])
    with pytest.raises(DataError) as caught:
        prepare(sources, tmp_path / "out")
    for place in ("train", "test"):
        assert f"{by_side[place]} ({place})" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_patient_who_was_joined_with_another_keeps_the_side_without_the_image(
    exports, tmp_path, first
):
    _, _, _, images = first
    rows = [{"patient": p, "image": images["test"], "text": p} for p in ("zoe", "adam")]
    prepare(later(exports, first, rows), tmp_path / "joined")
    assert set(side(tmp_path / "joined")) == {"group/adam"}
    again = exports(keeping(tmp_path / "joined"), folder="again", a=(patients("zoe"), {}))
    prepare(again, tmp_path / "out")  # no image of then, and the name that was not the group's
    assert side(tmp_path / "out") == {"group/zoe": "test"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: None, "an older medft wrote it"),
        (lambda groups: {**groups, "key_id": "x"}, "group_key differs"),
    ],
)
def test_group_ids_of_another_kind_cannot_be_kept(exports, tmp_path, first, change, message):
    path = first[1] / "pairs.parquet"
    table = pq.read_table(path)
    known = json.loads(table.schema.metadata[b"medft"])
    known["groups"] = change(known["groups"])
    pq.write_table(table.replace_schema_metadata({b"medft": json.dumps(known)}), path)
    with pytest.raises(DataError, match=message):
        prepare(later(exports, first, patients("1")), tmp_path / "out")


def test_earlier_patients_that_are_not_found_are_counted(exports, tmp_path, first):
    summary = prepare(later(exports, first, patients(3, 4, "new")), tmp_path / "out")
    assert summary["kept"] == {"groups": 2, "pairs": 2, "not_found": 18}
    padded = later(exports, first, patients("03", 4), group_form="as_written")
    assert prepare(padded, tmp_path / "padded")["kept"]["not_found"] == 19


@pytest.mark.parametrize("same", [True, False])
def test_keyed_groups_are_kept_by_the_same_key_alone(exports, tmp_path, same):
    def keyed(split, folder, names, key):
        sources = exports(split, folder=folder, a=(patients(*names), {}))
        (sources.parent / "key").write_text(key)
        sources.write_text(sources.read_text() + "group_key: key\n")
        return sources

    prepare(keyed(SHARES, "one", range(20), "0123456789abcdef"), tmp_path / "one_out")
    key = "0123456789abcdef" if same else "another key of 16 bytes"
    later = keyed(keeping(tmp_path / "one_out"), "two", range(30), key)
    if not same:
        with pytest.raises(DataError, match="group_key differs"):
            prepare(later, tmp_path / "two_out")
        return
    assert prepare(later, tmp_path / "two_out")["kept"]["groups"] == 20
    before, now = side(tmp_path / "one_out"), side(tmp_path / "two_out")
    assert {name: now[name] for name in before} == before


def test_a_file_of_other_patients_is_an_error(exports, tmp_path, first):
    with pytest.raises(DataError, match="among the rows, none is"):
        prepare(later(exports, first, patients("a", "b")), tmp_path / "out")
