"""A row's own names, dates and numbers do not stand in what is written of it."""

import json
import random
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data.identifiers import MASK, Identifiers
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.sources import load_sources
from medft.data.splits import join_groups
from medft.errors import DataError, RecipeError

OUTPUTS = ("pairs.parquet", "summary.json", "rejects.jsonl", "report.html")


def masked(value, text):
    return Identifiers({"c": [value]}).masked(text)


FOUND = [
    ("Meier^Anna Lena", "MEIER, Anna"),
    ("Meier, Anna", "anna"),
    ("Meier^Anna", "Annas"),
    ("Meier^Anna", "Meier's"),
    ("Meier^Anna", "MeierAnna"),
    ("Meier^Anna", "scan_meier_01"),
    ("M\u00fcller^Uwe", "MUELLER"),
    ("Mueller^Uwe", "M\u00fcllers"),
    ("M\u00fcller^Uwe", "Mu\u0308ller"),
    ("Wei\u00df^Ute", "WEISS"),
    ("Weiss^Ute", "Wei\u00df"),
    ("Ren\u00e9^Paul", "Rene"),
    ("Klein-Hansen^Ulla", "Hansen"),
    ("O'Brien^Tim", "O\u2019Brien"),
    ("von der Heide^Uwe", "von der Heide"),
    ("Wu^Li", "Li Wu"),
    ("\u041f\u0435\u0442\u0440\u043e\u0432", "\u041f\u0415\u0422\u0420\u041e\u0412"),
    ("Klein^Eva", "klein"),  # a word like any other
    ("Lang^Eva", "langs"),  # as a genitive, whatever it means
    ("20240307", "20240307"),
    ("20240307", "2024-03-07"),
    ("20240307", "07.03.2024"),
    ("20240307", "7. 3. 2024"),
    ("20240307", "7.3.24"),
    ("20240307", "03/07/2024"),
    ("20240307", "07/03/2024"),
    ("20240307", "20240307101530"),
    ("2024-03-07", "7.3.2024"),
    ("07.03.2024", "3/7/2024"),
    ("03/07/2024", "2024-03-07"),
    ("03/07/2024", "2024-07-03"),
    ("2024-03-07 00:00:00", "07.03.2024"),
    ("20240307101530.5+0100", "07.03.2024"),
    ("Meier Anna 07.03.1950", "7.3.1950"),
    ("A-2024/0017", "A20240017"),
    ("A-2024/0017", "a 2024 0017"),
    ("A20240017", "A-2024-0017"),
    ("P101", "P 101"),
    (12345, "ID12345"),
    (12345.0, "12345"),
    ("12345.0", "12345"),
    (["Meier", {"given": "Anna"}], "Anna"),
]
PASSED = [
    ("Meier^Ann", "Annual"),
    ("Meier^Ann", "Meierei, Obermeier"),
    ("Sch\u00f6n^Eva", "schon"),
    ("Schon^Eva", "sch\u00f6n, scho\u0308n"),
    ("M\u00fcller^Eva", "Muller"),
    ("von der Heide^Uwe", "von der Lunge"),
    ("Wu^Li", "Li 3"),
    ("Dr. Prof. Meier", "Prof. Weber"),
    ("20240307", "2024-03-08, 17.3.2024, 07.03.2025, 120240307, 2024-03-071, 07.03.1924"),
    ("20240307", "7. March 2024"),  # not one of the five ways
    ("03/07/2024", "2024-03-08"),
    ("A-2024/0017", "A-2024-00171, BA20240017"),
    ("12345", "123456, 112345, 12.345"),
    ("FALL 123456", "Fall"),
    ("CT-2024-03-07-1", "07.03.2024"),
]


@pytest.mark.parametrize(("value", "text"), FOUND)
def test_a_value_is_found_however_it_is_written(value, text):
    result = masked(value, f"Bild ({text}): normal.")
    assert MASK in result
    rest = result.replace(MASK, "")
    assert re.fullmatch(r"Bild \((scan_)?(ID)?(_01|101530)?\): normal\.", rest)


@pytest.mark.parametrize(("value", "text"), PASSED)
def test_other_words_dates_and_numbers_are_left_alone(value, text):
    identifiers = Identifiers({"c": [value]})
    assert identifiers.masked(f"Bild ({text}): normal.") == f"Bild ({text}): normal."
    assert identifiers.columns_in(text) == []


@pytest.mark.parametrize(
    ("value", "counted"),
    [
        ("12", True), ("4711", True), ("A12", True), ("Li", True), ("Meier^A", True), ("-", True),
        ("von der Heide", True), ("\u5c71\u7530^\u592a\u90ce", True), ("x" * 300, True),
        ("12345", False), ("P101", False), ("Meier", False), ("2024-03-07", False),
        ("", False), (None, False), (float("nan"), False),
    ],
)  # fmt: skip
def test_what_is_too_short_or_too_long_is_counted(value, counted):
    identifiers = Identifiers({"c": [value]})
    assert identifiers.not_searched == (["c"] if counted else [])
    is_empty = value is None or value == "" or value != value
    assert identifiers.empty == (["c"] if is_empty else [])


def test_every_occurrence_is_masked_and_a_second_search_finds_nothing():
    values = {"name": ["Meier^Anna"], "born": ["19500307"], "number": ["101530", "A-17/2024"]}
    identifiers = Identifiers(values)
    text = "Meier, Anna *7.3.50, 19500307101530, A172024 a-17 2024 MEIERS Anna/Meier."
    once = identifiers.masked(text)
    assert identifiers.columns_in(text) == ["name", "born", "number"]
    assert identifiers.columns_in(once) == []
    assert identifiers.masked(once) == once
    assert once == "[...] *[...], [...][...], [...] [...] [...]/[...]."


def test_whatever_a_value_holds_it_is_found_as_it_is_and_masked_for_good():
    draw = random.Random(2)
    signs = "aAeEsSoOuU0189'-^,. /\\[](){}*+?|$\n\t"
    signs += "\u00e4\u00d6\u00fc\u00df\u1e9e\u0130\u0308\u00e9\u2019\ud83d"
    searched = 0
    for _ in range(800):
        value = "".join(draw.choices(signs, k=draw.randrange(25)))
        text = "".join(draw.choices(signs, k=40)) + f" {value} end"
        identifiers = Identifiers({"c": [value]})
        once = identifiers.masked(text)
        assert identifiers.columns_in(once) == []
        if not identifiers.empty and not identifiers.not_searched:
            searched += 1
            assert identifiers.columns_in(text) == ["c"], (value, text)
            assert MASK in once
    assert searched > 200


@pytest.mark.parametrize(
    "text",
    [
        "von " * 50_000, "Anna, " * 50_000, "1" * 300_000, "1 " * 150_000, "a-" * 150_000,
        "\u0308" * 200_000,
    ],
)  # fmt: skip
def test_long_texts_take_no_long_time(text):
    values = ["von der Heide^Anna", "1111-1111-1111", "a1-a1-a1", "11.11.1911"]
    identifiers = Identifiers({"c": values})
    started = time.process_time()
    identifiers.columns_in(identifiers.masked(text))
    assert time.process_time() - started < 20


FINDINGS = [
    "Kein Pneumothorax, keine Erg\u00fcsse. Kontrolle {decoy}.",
    "No focal consolidation. Compared with {decoy}, unchanged.",
    "Kleinhirn und Hirnstamm regelrecht, {decoy}.",
    "Annual screening, stable nodule of 12 mm, {decoy}.",
    "Frakturspalt am Radius, Voraufnahme {decoy}; Langzeitverlauf.",
    "Mild cardiomegaly; follow-up {decoy}. Dr. Weber",
]
DECOYS = [
    "am 11.09.2021", "from 2021-09-11", "(09/11/2021)", "Befund-Nr. B-2021-9911", "1500 ml",
    "Annahme und Meierei", "vol. 202109", "ID 998877", "im Jahr 2023", "L\u00e4ngs- und Kleinbild",
]  # fmt: skip
PEOPLE = [
    ("Meier^Anna Lena", ["Meier", "ANNA", "Meiers", "Lena Meier"]),
    ("M\u00fcller, J\u00fcrgen", ["Mueller", "JUERGEN", "M\u00fcllers", "J\u00fcrgen M\u00fcller"]),
    ("Gross^Ann", ["Gro\u00df", "Ann", "Ann's", "GROSS, ANN"]),
    ("von der Heide^Kai-Uwe", ["Heide", "Kai-Uwe", "von der Heide", "heides"]),
    ("O'Neil^Sean", ["O\u2019Neil", "Sean", "Neil's", "Sean O'Neil"]),
    ("Klein, Lang", ["Klein", "lang", "Kleins", "Lang Klein"]),
]
DATES = [
    "{y}{m:02}{d:02}", "{y}-{m:02}-{d:02}", "{d:02}.{m:02}.{y}", "{m:02}/{d:02}/{y}",
    "{d:02}/{m:02}/{y}",
]  # fmt: skip
NUMBERS = ["A-{0}/{1}", "A{0}{1}", "a-{0}-{1}", "A {0} {1}"]


def made_reports():
    """300 rows; the first 60 in a random order have one identifier planted."""
    draw = random.Random(5)
    rows = []
    for i in range(300):
        name, forms = PEOPLE[i % len(PEOPLE)]
        born = {"y": 1930 + i % 70, "m": 1 + i % 12, "d": 1 + i % 28}
        number = (2010 + i % 10, 10_000 + 37 * i)
        text = draw.choice(FINDINGS).format(decoy=draw.choice(DECOYS))
        row = {
            "file": f"{i}.png", "name": name, "born": DATES[i % 5].format(**born),
            "accession": NUMBERS[0].format(*number), "report": f"{i}: {text}",
            "question": "Was ist zu sehen?", "view": "PA", "planted": None, "value": None,
        }  # fmt: skip
        if i < 60:
            column = ("name", "born", "accession")[i % 3]
            row["value"] = {
                "name": draw.choice(forms),
                "born": DATES[i // 3 % 5].format(**born),
                "accession": NUMBERS[i // 3 % 4].format(*number),
            }[column]
            place = ("report", "report", "report", "question", "view")[i // 3 % 7 % 5]
            words = row[place].split(" ")
            words.insert(draw.randrange(len(words) + 1), f"({row['value']})")
            row[place] = " ".join(words)
            row["planted"] = (column, {"report": "text", "view": "field view"}.get(place, place))
        rows.append(row)
    draw.shuffle(rows)
    return rows


def test_sixty_of_three_hundred_reports_have_an_identifier_and_those_are_found():
    found = missed = wrong = 0
    for row in made_reports():
        identifiers = Identifiers({name: [row[name]] for name in ("name", "born", "accession")})
        places = {"text": row["report"], "question": row["question"], "field view": row["view"]}
        got = {(c, place) for place, text in places.items() for c in identifiers.columns_in(text)}
        wanted = {row["planted"]} - {None}
        found += len(got & wanted)
        missed += len(wanted - got)
        wrong += len(got - wanted)
    assert (found, missed, wrong) == (60, 0, 0)


YAML = """\
sources:
  - name: a
    kind: json
    path: table.json
    images: images
    image: file
    text: report
    question: question
    keep: [view]
    group: patient
%s
split: {validation: 0.2}
%s
"""


@pytest.fixture
def export(tmp_path):
    """Writes rows, an image for each, and SOURCES.yaml; prepares, and gives what came out."""

    def run(rows, extra="", top="", out="out", yaml=YAML):
        (tmp_path / "images").mkdir(exist_ok=True)
        for index, row in enumerate(rows):
            row.setdefault("patient", f"pat{index}")
            pixels = np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)
            if row["file"] and not row["file"].startswith("lost"):
                Image.fromarray(pixels).save(tmp_path / "images" / row["file"])
        (tmp_path / "table.json").write_text(json.dumps(rows))
        (tmp_path / "SOURCES.yaml").write_text(yaml % (extra and f"    {extra}", top))
        summary = prepare(tmp_path / "SOURCES.yaml", tmp_path / out, max_rejects=1.0)
        lines = (tmp_path / out / "rejects.jsonl").read_text().splitlines()
        pairs = list(read_pairs(tmp_path / out / "pairs.parquet"))
        return summary, pairs, [json.loads(line) for line in lines]

    return run


def row(**cells):
    plain = {"file": "0.png", "report": "Normal.", "question": "Normal?", "view": "PA"}
    return plain | {"name": "Meier^Anna", "born": "19500307"} | cells


def outputs(folder):
    """All that was written, also what Parquet holds compressed, as one text."""
    texts = [(folder / name).read_bytes().decode("latin-1") for name in OUTPUTS]
    table = pq.read_table(folder / "pairs.parquet").drop_columns("images")
    names = [i["path"] for r in read_pairs(folder / "pairs.parquet") for i in r["images"]]
    return "\n".join([*texts, json.dumps(table.to_pylist(), ensure_ascii=False), repr(names)])


IDENTIFIERS = "identifiers: [name, born]"
MASKED = "identifiers: [name, born]\n    on_identifier: mask"


@pytest.mark.parametrize("mode", ["reject", "mask"])
def test_the_made_reports_go_through_prepare(export, tmp_path, capfd, mode):
    rows = made_reports()
    keys = f"identifiers: [name, born, accession]\n    on_identifier: {mode}"
    summary, pairs, lines = export(rows, keys)
    counts = summary["sources"]["a"]
    assert {c: one["found"] for c, one in counts["identifiers"].items()} == dict.fromkeys(
        ("name", "born", "accession"), 20
    )
    assert sum(sum(o["where"].values()) for o in counts["identifiers"].values()) == 60
    assert (counts["read"], counts["searched"]) == (300, 300)
    planted = {index for index, one in enumerate(rows, start=1) if one["planted"]}
    if mode == "reject":
        assert {line["row"] for line in lines} == planted
        assert counts["reasons"] == {"identifier": 60}
        first = next(line for line in lines if line["row"] == min(planted))
        column, place = rows[min(planted) - 1]["planted"]
        assert first["detail"] == f"{column} in {place}"
    else:
        assert lines == []
        texts = [f"{p['text']} {p['question']} {p['fields']}" for p in pairs]
        assert sum(MASK in text for text in texts) == 60
        for text, one in zip(texts, rows, strict=True):
            own = {name: [one[name]] for name in ("name", "born", "accession")}
            assert Identifiers(own).columns_in(text) == []
    written = outputs(tmp_path / "out") + "".join(capfd.readouterr())
    assert not [one["value"] for one in rows if one["planted"] and f"({one['value']})" in written]
    assert f"({next(one['value'] for one in rows if one['planted'])})" in json.dumps(
        rows, ensure_ascii=False
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"report": "Anna is well."}, "name in text"),
        ({"question": "Is Meier well?"}, "name in question"),
        ({"view": "PA, 7.3.1950"}, "born in field view"),
        ({"file": "meier.png"}, "name in file name"),
        ({"report": "Meier", "file": "19500307.png"}, "name in text; born in file name"),
    ],
)
def test_a_row_is_rejected_with_column_and_place_but_without_value(export, tmp_path, change, where):
    summary, pairs, [line] = export([row(**change), row(file="1.png")], IDENTIFIERS)
    assert (line["row"], line["reason"], line["detail"]) == (1, "identifier", where)
    assert len(pairs) == 1
    assert summary["sources"]["a"]["rejected"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "exact search" in page
    assert "no de-identification" in page
    assert not re.search("meier|anna|1950", outputs(tmp_path / "out"), re.IGNORECASE)


def test_rows_are_masked_and_their_file_names_dropped(export, tmp_path):
    text = "Frau Meier kam. Annas Lunge, geb. 07.03.1950, 3/7/1950."
    rows = [
        row(report=text, file="meier.png", view="Anna"),
        row(report="Annual check.", file="1.png"),
        row(report="Meier, Anna.", file="2.png"),
    ]
    summary, pairs, [line] = export(rows, MASKED)
    assert pairs[0]["text"] == "Frau [...] kam. [...] Lunge, geb. [...], [...]."
    assert json.loads(pairs[0]["fields"]) == {"view": "[...]"}
    assert [pair["images"][0]["path"] for pair in pairs] == [None, "1.png"]
    assert pairs[1]["text"] == "Annual check."
    assert line["detail"] == "nothing is left of text but masks"
    assert summary["sources"]["a"]["identifiers"] == {
        "name": {
            "found": 2,
            "where": {"field view": 1, "file name": 1, "text": 2},
            "not_searched": 0,
            "empty": 0,
        },
        "born": {"found": 1, "where": {"text": 1}, "not_searched": 0, "empty": 0},
    }
    assert not re.search("meier|annas|1950", outputs(tmp_path / "out"), re.IGNORECASE)


def test_rows_of_sources_without_identifiers_stay_as_they_are(export):
    rows = [row(report="Meier", file="meier.png"), row(file="lost.png")]
    summary, [pair], [line] = export(rows)
    assert (pair["text"], pair["images"][0]["path"]) == ("Meier", "meier.png")
    assert line["detail"] == "no file lost.png"
    assert summary["sources"]["a"]["identifiers"] == {}
    assert summary["group_ids"] == "clear"


def test_only_the_rows_own_values_are_searched_for(export):
    rows = [row(report="Weber is well."), row(file="1.png", name="Weber", report="Meier is well.")]
    _, pairs, lines = export(rows, IDENTIFIERS)
    assert (len(pairs), lines) == (2, [])


def test_all_rows_of_a_study_give_their_values(export):
    rows = [
        row(study="s", patient="p"),
        row(file="1.png", name="Weber", study="s", patient="p", report="Weber kam."),
        row(file="2.png", name="Weber", study="t"),
    ]
    rows[0]["report"] = rows[1]["report"]
    _, [pair], lines = export(rows, f"{IDENTIFIERS}\n    study: study")
    assert pair["text"] == "Normal."
    assert [(line["row"], line["detail"]) for line in lines] == [
        (1, "name in text"),
        (2, "name in text"),
    ]


def test_short_and_empty_values_are_counted_by_pair(export):
    rows = [row(name="Li", report="Li"), row(file="1.png", name=""), row(file="2.png")]
    del rows[2]["born"]
    summary, pairs, _ = export(rows, IDENTIFIERS)
    assert len(pairs) == 3
    counts = summary["sources"]["a"]["identifiers"]
    assert (counts["name"]["not_searched"], counts["name"]["empty"]) == (1, 1)
    assert (counts["born"]["not_searched"], counts["born"]["empty"]) == (0, 1)


def test_a_kept_identifier_is_found_however_short_it_is(export):
    keys = IDENTIFIERS.replace("]", ", view]")
    _, pairs, lines = export([row(), row(file="1.png", view="")], keys)
    assert (len(pairs), [line["detail"] for line in lines]) == (1, ["view in field view"])
    keys += "\n    on_identifier: mask"
    _, pairs, _ = export([row(), row(file="1.png", view="")], keys)
    assert [json.loads(pair["fields"])["view"] for pair in pairs] == [MASK, ""]


def test_an_id_with_an_identifier_is_replaced_or_rejected(export):
    rows = [row(key="meier-1"), row(file="1.png", key="x-1")]
    _, [pair], [line] = export(rows, f"{IDENTIFIERS}\n    id: key")
    assert (pair["id"], line["detail"]) == ("x-1", "name in id")
    _, pairs, _ = export(rows, f"{MASKED}\n    id: key")
    assert re.fullmatch("[0-9a-f]{16}", pairs[0]["id"])
    assert pairs[1]["id"] == "x-1"


def test_details_of_other_reasons_quote_nothing(export, tmp_path):
    """File names, ids and texts of rejected rows hold what the search would have found."""
    rows = [
        row(file="lost meier.png"),
        row(file="lost/../../meier.png"),
        row(file="lost" + "meier" * 60),
        row(file="lost_damaged_meier.png"),
        row(file="1.png", report="Meier \ud83d"),
        row(file="2.png"),
        row(file="3.png", report="Other."),
        row(file="4.png", report=""),
    ]
    rows = [one | {"key": "k7"} for one in rows]
    (tmp_path / "images" / "lost").mkdir(parents=True)
    (tmp_path / "images" / "lost_damaged_meier.png").write_bytes(b"no image")
    (tmp_path / "meier.png").write_bytes(b"not reached")
    for extra, is_open in ((f"{IDENTIFIERS}\n    id: key", False), ("id: key", True)):
        _, _, lines = export(rows, extra)
        reasons = {line["reason"]: line["detail"] for line in lines}
        assert reasons["empty_text"] == "report is empty"
        assert set(reasons) - {"identifier", "bad_text"} == {
            "missing_image", "outside_root", "bad_image", "duplicate_id", "empty_text"
        }  # fmt: skip
        rejected = (tmp_path / "out" / "rejects.jsonl").read_text()
        page = (tmp_path / "out" / "report.html").read_text()
        for value in ("meier", "k7"):
            assert (value in rejected.lower(), value in page.lower()) == (is_open, is_open)


def test_a_missing_identifier_column_is_an_error_before_work_begins(export, tmp_path):
    with pytest.raises(DataError, match="the columns nmae in"):
        export([row()], "identifiers: [nmae]")
    assert not (tmp_path / "out").exists()
    (tmp_path / "SOURCES.yaml").write_text(YAML % ("    on_identifier: ignore", ""))
    with pytest.raises(RecipeError, match="on_identifier"):
        load_sources(tmp_path / "SOURCES.yaml")


@pytest.mark.parametrize(("extra", "is_open"), [("", True), (IDENTIFIERS, False)])
def test_the_sentence_about_a_divided_group_does_not_name_it(export, extra, is_open):
    own = "split: {column: view, train: [PA], test: [AP]}"
    rows = [row(patient="Meier"), row(file="1.png", patient="Meier", view="AP")]
    with pytest.raises(DataError, match="stand in several") as caught:
        export(rows, extra, yaml=YAML.replace("split: {validation: 0.2}", own))
    assert ("Meier" in str(caught.value)) == is_open


@pytest.mark.parametrize(("extra", "is_open"), [("", True), (MASKED, False)])
def test_the_sentence_about_a_changed_image_does_not_name_it(
    export, tmp_path, monkeypatch, extra, is_open
):
    from medft.data import assign

    def join_late(*arguments):
        (tmp_path / "images" / "meier.png").write_bytes(b"changed")
        return join_groups(*arguments)

    monkeypatch.setattr(assign, "join_groups", join_late)
    with pytest.raises(DataError, match="was changed meanwhile") as caught:
        export([row(file="meier.png")], extra)
    assert ("meier" in str(caught.value)) == is_open


KEY = "group_key: key.txt"


def test_groups_are_keyed_and_the_split_stays_as_it_was(export, tmp_path):
    (tmp_path / "key.txt").write_bytes(b"0123456789abcdef\n")
    (tmp_path / "other.txt").write_bytes(b"another secret of some length")
    rows = [
        row(file=f"{i}.png", patient=f"pat-{i // 2}", report=f"No. {i}", key=f"pat-{i // 2}-{i}")
        for i in range(40)
    ]
    results = {}
    for name, top in (("clear", ""), ("one", KEY), ("again", KEY), ("two", "group_key: other.txt")):
        results[name] = export(rows, "id: key", top, out=name)
    pairs = {name: result[1] for name, result in results.items()}
    ids = {name: [pair["group_id"] for pair in found] for name, found in pairs.items()}
    splits = {name: [pair["split"] for pair in found] for name, found in pairs.items()}
    assert results["clear"][0]["group_ids"] == "clear"
    assert results["one"][0]["group_ids"] == "keyed"
    assert splits["clear"] == splits["one"] == splits["two"]
    assert {"train", "validation", "test"} == set(splits["clear"])
    assert ids["one"] == ids["again"]
    assert not set(ids["one"]) & set(ids["two"])
    assert len(set(zip(ids["clear"], ids["one"], strict=True))) == len(set(ids["one"])) == 20
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids["one"])
    assert "pat-" in outputs(tmp_path / "clear")
    assert "pat-" not in outputs(tmp_path / "one")
    assert "in the clear" in (tmp_path / "clear" / "report.html").read_text()
    assert "keyed hashes" in (tmp_path / "one" / "report.html").read_text()
    assert results["one"][0]["sources"]["a"]["keyed_ids"] == 40
    assert len({pair["id"] for pair in pairs["one"]}) == 40


def test_with_a_key_no_file_name_and_no_detail_shows_a_group(export, tmp_path):
    (tmp_path / "key.txt").write_bytes(b"0123456789abcdef")
    rows = [
        row(file="PAT-7_front.png", patient="pat-7", key="x1"),
        row(file="1.png", patient="pat-8", key="x2"),
        row(file="2.png", patient="pat-9", key="x2", report="Other."),
        row(file="lost pat-9.png", patient="pat-9"),
    ]
    summary, pairs, lines = export(rows, "id: key", KEY)
    assert [pair["images"][0]["path"] for pair in pairs] == [None, "1.png"]
    assert [pair["id"] for pair in pairs] == ["x1", "x2"]
    assert summary["sources"]["a"]["dropped_file_names"] == 1
    assert [line["reason"] for line in lines] == ["duplicate_id", "missing_image"]
    assert "pat-" not in outputs(tmp_path / "out").lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"could not read .*key\.txt \(No such file or directory\)"),
        (b"", "it has 0"),
        (b"fifteen bytes..\r\n", "it has 15"),
    ],
)
def test_a_missing_or_short_key_is_one_sentence(export, tmp_path, content, message):
    if content is not None:
        (tmp_path / "key.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        export([row()], "", KEY)
    assert len(caught.value.problems) == 1
    assert "fifteen" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("top", ["group_key: ''", "group_key: .", 'group_key: "a\\0b"'])
def test_a_key_that_is_no_file_is_one_sentence(export, top):
    with pytest.raises(RecipeError, match="expected group_key to name a file"):
        export([row()], "", top)


def test_with_a_key_a_source_may_not_write_its_group_in_the_clear(export, tmp_path):
    (tmp_path / "key.txt").write_bytes(b"0123456789abcdef")
    rows = [row(patient="pat-7")]
    with pytest.raises(RecipeError, match="the column view of source a, keep would write it"):
        export(rows, "", KEY, yaml=YAML.replace("group: patient", "group: view"))
    by_patient = "language: {column: patient}"
    with pytest.raises(RecipeError, match="the column patient of source a, language would write"):
        export(rows, by_patient, KEY)
    assert export(rows, by_patient.replace("patient", "view"), KEY)[0]["pairs"] == 1


def test_dates_and_numbers_of_parquet_are_values_too(tmp_path):
    import datetime

    Image.new("L", (8, 8), 90).save(tmp_path / "0.png")
    table = {
        "file": ["0.png"] * 3,
        "report": ["geb. 7.3.1950", "Nr. 12345", "Normal."],
        "born": [datetime.date(1950, 3, 7)] * 3,
        "number": [12345.0, 12345.0, None],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (tmp_path / "SOURCES.yaml").write_text(
        "sources:\n  - {name: p, kind: parquet, path: t.parquet, image: file, text: report, "
        "identifiers: [born, number]}\n"
    )
    prepare(tmp_path / "SOURCES.yaml", tmp_path / "out", max_rejects=1.0)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    details = [json.loads(line)["detail"] for line in lines]
    assert details == ["born in text", "number in text"]
