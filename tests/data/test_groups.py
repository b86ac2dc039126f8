"""One patient is one group, however many exports and ways of writing there are."""

import json

import pytest
from exports import patients, places

from medft.data import row_images
from medft.data.groups import loose_form
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("00123", "123"),
        ("123", "123.0"),
        ("P-007", "p7"),
        ("A 12/3", "a12-3"),
        ("\uff11\uff12", "12"),
    ],
)
def test_the_loose_form_leaves_out_zeros_case_and_separators(one, other):
    assert loose_form(one) == loose_form(other)


@pytest.mark.parametrize(
    ("one", "other"), [("123", "1230"), ("12", "1.2.1"), ("--", "-"), ("p7", "7")]
)
def test_the_loose_form_keeps_what_is_different(one, other):
    assert loose_form(one) != loose_form(other)


def test_two_exports_of_one_hospital_share_their_patients(exports, tmp_path):
    names = [f"p{i}" for i in range(40)]
    sources = exports(mr=(patients(*names), {}), xray=(patients(*names[20:], "q1"), {}))
    summary = prepare(sources, tmp_path / "out")
    assert all(len(found) == 1 for found in places(tmp_path / "out").values())
    assert summary["groups"] == 41
    assert summary["shared_group_values"] == 20
    assert summary["shared_by_sources"] == {"mr, xray": 20}


def test_a_namespace_keeps_the_values_of_its_sources_apart(exports, tmp_path):
    rows = patients("1", "2", "3")
    sources = exports(a=(rows, {}), b=(rows, {"group_namespace": "north"}),
                      c=(rows[:2], {"group_namespace": "north"}))  # fmt: skip
    summary = prepare(sources, tmp_path / "out")
    assert set(places(tmp_path / "out")) == {f"{n}/{i}" for n in ("group", "north") for i in "123"}
    assert summary["shared_by_sources"] == {"b, c": 2}


WAYS = {
    "table": ([{"patient": "00123"}, {"patient": "P-7"}, {"patient": "9"}], {}),
    "lines": ([{"patient": 123}, {"patient": "p7"}, {"patient": 123.0}], {"kind": "jsonl"}),
}


def test_ways_of_writing_that_meet_loosely_are_an_error_before_images_are_read(
    exports, tmp_path, monkeypatch
):
    monkeypatch.setattr(row_images, "store_encoded_image", None)
    with pytest.raises(DataError) as caught:
        prepare(exports(**WAYS), tmp_path / "out")
    message = str(caught.value)
    assert "2 differ in leading zeros" in message
    assert "'00123' (table) and '123' (lines); 'P-7' (table) and 'p7' (lines)" in message
    assert not (tmp_path / "out").exists()


def test_the_error_shows_the_form_of_values_alone_where_groups_are_hidden(exports, tmp_path):
    sources = exports(**WAYS)
    (sources.parent / "key").write_text("0123456789abcdef")
    sources.write_text(sources.read_text() + "group_key: key\n")
    with pytest.raises(DataError) as caught:
        prepare(sources, tmp_path / "out")
    assert "'00###' (table) and '###' (lines); 'A-#' (table) and 'a#' (lines)" in str(caught.value)


@pytest.mark.parametrize(("form", "groups"), [("loose", 3), ("as_written", 6)])
def test_the_form_decides_what_they_mean(exports, tmp_path, form, groups):
    ways = {name: (rows, {**options, "group_form": form}) for name, (rows, options) in WAYS.items()}
    assert prepare(exports(**ways), tmp_path / "out")["groups"] == groups


def test_the_form_of_one_source_decides_for_those_it_is_compared_with(exports, tmp_path):
    table, lines = WAYS.values()
    ways = {"table": (table[0], {"group_form": "loose"}), "lines": lines}
    assert prepare(exports(**ways), tmp_path / "out")["groups"] == 3
    ways["lines"] = (lines[0], {**lines[1], "group_form": "as_written"})
    with pytest.raises(RecipeError, match="the same group_form in all sources"):
        prepare(exports(**ways), tmp_path / "two")
    ways["lines"] = (lines[0], {**lines[1], "group_namespace": "other"})
    with pytest.raises(DataError, match=r"'123' \(lines\) and '123\.0' \(lines\)"):
        prepare(exports(**ways), tmp_path / "three")


def test_a_map_joins_two_lists_of_pseudonyms(exports, tmp_path):
    sources = exports(
        pacs=(patients("1", "2", "3", "4"), {"group_map": "map.csv"}),
        ris=(patients("R1", "R2", "R3", "1"), {}),
    )
    (sources.parent / "map.csv").write_text("pacs,ris\n1,R1\n2,R2\n2,R3\n9,R9\n")
    summary = prepare(sources, tmp_path / "out")
    # pacs 1 is R1; pacs 2 is R2 and R3; the 1 of ris is another patient; 3 and 4 are in no map
    assert summary["groups"] == 5
    assert summary["shared_group_values"] == 2
    assert summary["sources"]["pacs"]["not_in_group_map"] == 2
    assert summary["sources"]["ris"]["not_in_group_map"] == 0


@pytest.mark.parametrize(
    "text", ["a,b\n1,\n", "a,b,c\n1,2,3\n", "a,b\n", "a\n1\n", "a,b\n1,NULL\n"]
)
def test_a_map_that_is_none_is_one_sentence(exports, tmp_path, text):
    sources = exports(pacs=(patients("1"), {"group_map": "map.csv"}))
    (sources.parent / "map.csv").write_text(text)
    with pytest.raises(DataError, match="correct group_map"):
        prepare(sources, tmp_path / "out")


def test_a_map_without_header_does_not_lose_its_first_patient(exports, tmp_path):
    sources = exports(pacs=(patients("1", "2"), {"group_map": "map.csv"}))
    (sources.parent / "map.csv").write_text("1,R1\n2,R2\n")
    with pytest.raises(DataError, match="its first line holds a value of group"):
        prepare(sources, tmp_path / "out")
    (sources.parent / "map.csv").write_text("pacs,ris\n1,R1\n2,R2\n")
    prepare(sources, tmp_path / "out")
    assert set(places(tmp_path / "out")) == {"group/R1", "group/R2"}


def test_a_map_whose_values_are_written_otherwise_is_an_error(exports, tmp_path):
    sources = exports(pacs=(patients("001", "2"), {"group_map": "map.csv"}))
    (sources.parent / "map.csv").write_text("pacs,ris\n1,R1\n")
    with pytest.raises(DataError, match=r"'001' \(pacs\) and '1' \(pacs\)"):
        prepare(sources, tmp_path / "out")
    loose = exports(pacs=(patients("001", "2"), {"group_map": "map.csv", "group_form": "loose"}))
    prepare(loose, tmp_path / "out")
    assert "group/r1" in places(tmp_path / "out")


EMPTY = [{"patient": "1"}, {"patient": ""}, {"patient": " "}, {"patient": None}, {}, {"patient": 0}]


def test_rows_without_group_are_rejected_and_counted(exports, tmp_path):
    sources = exports(a=(EMPTY, {"kind": "jsonl"}))
    counts = prepare(sources, tmp_path / "out", max_rejects=0.9)["sources"]["a"]
    assert (counts["accepted"], counts["reasons"], counts["empty_groups"]) == (
        2,
        {"empty_group": 4},
        4,
    )
    assert set(places(tmp_path / "out")) == {"group/1", "group/0"}


def test_rows_without_group_are_grouped_by_image_where_that_is_chosen(exports, tmp_path):
    sources = exports(a=(EMPTY, {"kind": "jsonl", "empty_group": "image"}))
    summary = prepare(sources, tmp_path / "out")
    counts = summary["sources"]["a"]
    assert (counts["accepted"], counts["rejected"], counts["empty_groups"]) == (6, 0, 4)
    assert summary["groups"] == 6
    assert sum(name.startswith("image/") for name in places(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": None, "empty_group": "image"}, "a key group beside empty_group"),
        ({"group_namespace": "image"}, "another group_namespace than image"),
        ({"group_namespace": "a/b"}, "group_namespace"),
    ],
)
def test_keys_that_mean_nothing_are_refused(exports, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        prepare(exports(a=(patients("1"), options)), tmp_path / "out")


STUDY = {"study": "s", "text": "t", "question": "q", "license": {"column": "l"}, "keep": ["view"]}


def study(**second):
    same = {"s": "1", "t": "Clear.", "q": "What?", "l": "CC0", "patient": "p"}
    return [{**same, "view": "PA"}, {**same, "view": "lateral", **second}]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"patient": "other"}, "different_groups"),
        ({"l": "CC-BY"}, "different_licenses"),
        ({"q": "Where?"}, "different_questions"),
        ({"t": "Dense."}, "different_texts"),
    ],
)
def test_a_study_whose_rows_disagree_is_rejected(exports, tmp_path, second, reason):
    sources = exports(a=(study(**second), STUDY))
    counts = prepare(sources, tmp_path / "out", max_rejects=1.0)["sources"]["a"]
    assert counts["reasons"] == {reason: 2}


def test_a_study_that_agrees_has_the_fields_of_all_its_rows(exports, tmp_path):
    sources = exports(a=(study(patient="", q=""), STUDY))
    prepare(sources, tmp_path / "out")
    [row] = read_pairs(tmp_path / "out" / "pairs.parquet", images=False)
    assert json.loads(row["fields"]) == {"view": "PA; lateral"}
    assert (row["group_id"], row["question"], row["license"]) == ("group/p", "What?", "CC0")
    assert len(row["sha256"]) == 2


@pytest.mark.parametrize("report", [True, False])
def test_a_published_split_that_shares_groups_is_let_through_and_counted(exports, tmp_path, report):
    rows = [{"patient": p, "part": s} for p, s in (("1", "a"), ("1", "b"), ("2", "a"), ("3", "b"))]
    split = {"column": "part", "train": ["a"], "test": ["b"]}
    split |= {"shared_groups": "report"} if report else {}
    sources = exports(split, a=(rows, {}))
    if not report:
        with pytest.raises(DataError, match="1 of 3 stand in several, first group/1"):
            prepare(sources, tmp_path / "out")
        return
    summary = prepare(sources, tmp_path / "out")
    assert summary["shared_between_splits"] == {"groups": 1, "pairs": 2}
    assert places(tmp_path / "out")["group/1"] == {"train", "test"}


@pytest.mark.parametrize(
    ("text", "options", "reason", "read"),
    [
        ("{}", {}, "duplicate", 20),
        ("", {}, "empty_text", 20),
        ("<image>", {}, "image_placeholder", 20),
        ("other {}", {"id": "id"}, "duplicate_id", 19),
    ],
)
def test_a_rejected_row_still_tells_that_two_names_are_one_patient(
    exports, tmp_path, text, options, reason, read
):
    first = [{"image": f"{n}.png", "patient": f"a{n}", "text": f"t{n}"} for n in range(1, 21)]
    exports(drawn=([{}] * 20, {}))  # images 1 to 20
    other = [
        {**row, "patient": f"b{n}", "text": text.format(row["text"]), "id": "same"}
        for n, row in enumerate(first, start=1)
    ]
    others = [{"patient": f"b{n}", "id": n} for n in range(1, 21)]
    sources = exports(
        {"validation": 0.5, "test": 0.0}, a=(first, {}), b=([*other, *others], options)
    )
    summary = prepare(sources, tmp_path / "out", max_rejects=1.0)
    assert summary["sources"]["b"]["reasons"] == {reason: read}
    assert (summary["groups"], summary["joins"]["joined_by_equal_images"]) == (20, 20)
    assert {len(found) for found in places(tmp_path / "out").values()} == {1}


def test_a_rejected_row_joins_no_groups_by_an_image_that_no_accepted_row_has(exports, tmp_path):
    """Such as the image that an archive sends where it has none."""
    exports(drawn=([{}], {}))
    rows = [{"patient": n, "image": "1.png", "text": ""} for n in "123"]
    summary = prepare(exports(a=([*rows, *patients(*"123")], {})), tmp_path / "out", max_rejects=1)
    assert (summary["pairs"], summary["groups"]) == (3, 3)
    assert summary["joins"] == {
        "groups_given": 3, "joined_by_equal_images": 0, "joined_by_near_copies": 0,
        "near_hashes_left_apart": 0,
    }  # fmt: skip


def test_an_earlier_patient_whose_rows_only_repeat_others_keeps_the_side(exports, tmp_path):
    exports(drawn=([{}] * 12, {}))
    rows = [{"image": f"{n}.png", "patient": f"a{n}", "text": f"t{n}"} for n in range(1, 12)]
    prepare(exports({"validation": 0.5, "test": 0.0}, a=(rows, {})), tmp_path / "old")
    [(group, side), *_] = sorted(places(tmp_path / "old").items())
    assert group == "group/a1"
    again = {"image": "12.png", "patient": "new", "text": "t"}
    rows = [again, {**again, "patient": "a1"}, *rows[1:]]
    split = {"validation": 0.5, "test": 0.0, "keep": "../old/pairs.parquet"}
    prepare(exports(split, a=(rows, {})), tmp_path / "out", max_rejects=1.0)
    found = places(tmp_path / "out")
    assert "group/new" not in found
    assert found["group/a1"] == side


def test_a_split_by_source_is_by_its_name_whatever_a_column_of_that_name_holds(exports, tmp_path):
    rows = [{"patient": "1", "source": "b"}, {"patient": "2"}]
    split = {"column": "source", "train": ["a"], "test": ["b"]}
    sources = exports(split, a=(rows, {"kind": "jsonl"}), b=(patients("3"), {}))
    prepare(sources, tmp_path / "out")
    assert places(tmp_path / "out") == {
        "group/1": {"train"},
        "group/2": {"train"},
        "group/3": {"test"},
    }


def test_an_empty_cell_is_no_way_of_writing(exports, tmp_path):
    rows = patients("NULL", "null")
    sources = exports(a=(rows, {"empty_group": "image"}))
    counts = prepare(sources, tmp_path / "out")["sources"]["a"]
    assert (counts["accepted"], counts["empty_groups"]) == (2, 1)
    with pytest.raises(DataError, match="'NULL'"):
        prepare(exports(a=(rows, {"na_values": []})), tmp_path / "as_written")
