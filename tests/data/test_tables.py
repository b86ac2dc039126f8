"""No row of a table is lost or garbled in silence: it leaves as written, or with a reason."""

import codecs
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.sources import load_sources
from medft.data.table_row import ReadOptions, TableCounts
from medft.data.tables import Rejected, table_rows
from medft.errors import DataError, RecipeError

IMAGES = {f"{index}.png" for index in range(6)}


def names_image(row):
    return row.get("file") in IMAGES


@pytest.fixture
def read(tmp_path):
    """Reads the content of a table whose images are 0.png to 5.png."""

    def rows(content, kind="csv", counts=None, **options):
        table = tmp_path / f"table.{kind}"
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = ReadOptions(names_image=names_image, **options)
        return list(table_rows(kind, table, options, counts))

    return rows


@pytest.fixture
def prepared(tmp_path):
    """Prepares a table with images in its folder; returns summary, texts and rejects."""
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 255, (20, 20), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")

    def run(content, kind="csv", **keys):
        (tmp_path / f"table.{kind}").write_bytes(content)
        source = {"name": "a", "kind": kind, "path": f"table.{kind}", "image": "file"}
        source |= {"text": "report"} | keys
        spec = {"sources": [source], "split": {"validation": 0.0}}
        (tmp_path / "SOURCES.yaml").write_text(json.dumps(spec))
        out = tmp_path / "out"
        summary = prepare(tmp_path / "SOURCES.yaml", out, max_rejects=1.0)
        rejects = [json.loads(x) for x in (out / "rejects.jsonl").read_text().splitlines()]
        pairs = list(read_pairs(out / "pairs.parquet"))
        return summary["sources"]["a"], pairs, [(x["row"], x["reason"]) for x in rejects]

    return run


def reasons(rows):
    return [row.reason if isinstance(row, Rejected) else None for row in rows]


def texts(rows):
    return [row["report"] for row in rows if isinstance(row, dict)]


# csv: quotes


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("lines", "opening"),
    [
        (["file,report", '0.png,"a', "b", 'c"', '1.png,"open', "more"], 5),
        (["file,report", '0.png,"open'], 2),
        (["file,report", "0.png,a", '1.png,"'], 3),
        (["report,file,more", '"a', 'b",0.png,"open', "x"], 3),
        (["file,report", "", "", '0.png,"a', 'b"', '"1.png'], 6),
    ],
)
def test_a_file_that_ends_inside_a_quoted_cell_names_the_line_that_opens_it(
    read, lines, opening, end
):
    with pytest.raises(DataError, match=f"inside the one that opens on line {opening}:"):
        read(end.join(lines))
    with pytest.raises(DataError, match=f"inside the one that opens on line {opening}:"):
        read(end.join([*lines, ""]))
    assert read(end.join(lines) + '"')


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("lines", "opening", "row"),
    [
        (["file,report", '0.png,"open', "1.png,plain", '2.png,end"', "3.png,x"], 2, 3),
        (["file,report", '0.png,"open', "unknown.png,plain", '2.png,end"'], 2, 4),
        (["file,report", '0.png,"open', "file,report", 'x,end"'], 2, 3),
        (["file;report", '0.png;"open', " file ; report ", 'x;end"'], 2, 3),
        (["report,file", '"open,0.png', "plain,1.png", 'end",2.png'], 2, 2),
        (["report,file", '"open', "plain,1.png", 'end",2.png'], 2, 3),
        (["age,report,file", '7,"a', 'b",0.png', '8,"open', "9,plain,1.png", 'end",2.png'], 4, 5),
        (['file,"report', "0.png,plain", '1.png,end"'], 1, 2),
        (["file,report,more", '0.png,"a', 'b","c', "1.png,plain,x", 'end"'], 3, 4),
    ],
)
def test_a_line_of_a_quoted_cell_that_is_a_row_is_an_error_with_both_lines(
    read, lines, opening, row, end
):
    with pytest.raises(DataError, match=f"opens on line {opening} holds line {row}, which looks"):
        read(end.join(lines))


@pytest.mark.parametrize(
    "record",
    [
        '0.png,"Findings:\r\nno effusion, no mass\r\n\r\nImpression: clear"',
        '0.png,"Lungs clear.\nHeart 1.png"',
        '0.png,"Compare:\n9.png,not of this source"',
        '0.png,"He said ""no"",\nand ""yes"""',
        '0.png,"file\nreport"',
        '0.png,"\n"',
        '0.png,"it\'s\nfine"',
    ],
)
def test_a_report_of_several_lines_is_accepted_as_it_is(read, record):
    counts = TableCounts()
    rows = read(f"file,report\n{record}\n1.png,next\n", counts=counts)
    text = record.partition(",")[2][1:-1].replace('""', '"')
    assert texts(rows) == [text, "next"]
    assert (counts.lines, counts.records) == (3 + text.count("\n"), 3)


def test_the_image_of_a_row_may_stand_after_its_report_of_several_lines(read):
    rows = read('report,file\n"a\nb",0.png\n"c\nd, e",1.png\n')
    assert texts(rows) == ["a\nb", "c\nd, e"]
    assert [row["file"] for row in rows] == ["0.png", "1.png"]


def test_a_quote_inside_an_unquoted_cell_is_text(read):
    assert texts(read('file,report\n0.png,5" tube\n1.png,a "b" c\n2.png,end"\n')) == [
        '5" tube', 'a "b" c', 'end"',
    ]  # fmt: skip


def test_a_quote_that_nothing_may_follow_rejects_its_row_and_no_other(read):
    rows = read('file,report\n0.png,"a "b" c"\n1.png,"a ""b"" c"\n2.png,"5" tube"\n3.png,d\n')
    assert reasons(rows) == ["bad_csv", None, "bad_csv", None]
    assert texts(rows) == ['a "b" c', "d"]
    assert "line 4" in rows[2].detail


def test_where_rows_begin_after_a_quote_too_many_is_not_guessed(read):
    with pytest.raises(DataError, match=r"opens on line 2 meets a quote on line 3"):
        read('report,file\n"open,0.png\n"other",1.png\n')
    assert texts(read('report,file\n"closed",0.png\n"other",1.png\n')) == ["closed", "other"]


def test_a_swallowed_row_stops_prepare_before_anything_is_written(prepared, tmp_path):
    with pytest.raises(DataError, match="line 2 holds line 3"):
        prepared(b'file,report\n0.png,"open\n1.png,text\n2.png,end"\n')
    with pytest.raises(DataError, match="opens on line 4"):
        prepared(b'file,report\n0.png,a\n1.png,b\n2.png,"open\n3.png,d\n')
    assert not (tmp_path / "out").exists()
    counts, pairs, _ = prepared(b'file,report\n0.png,"of two\nlines"\n\n1.png,text\n9.png,lost\n')
    assert [row["text"] for row in pairs] == ["of two\nlines", "text"]
    assert (counts["lines"], counts["records"], counts["read"]) == (6, 4, 3)


def test_lines_and_records_are_counted_for_csv_only(prepared):
    counts, _, _ = prepared(b'{"file": "0.png", "report": "a"}\n', kind="jsonl")
    assert counts["read"] == 1
    assert "lines" not in counts
    assert "records" not in counts


# csv: everything else


@pytest.mark.parametrize(
    "head",
    [
        "file;report, in words;more", "sep=;\nfile;report, in words;more",
        "sep=;\r\n\r\nfile;report, in words;more", "\n\n file ; report, in words ;more",
        "SEP=;\nfile;report, in words;more;;", "file|report, in words|more",
        'file\t"report, in words"\tmore', "file's;report, in words;more's",
    ],
)  # fmt: skip
def test_the_header_decides_the_delimiter(read, head):
    sign = next(sign for sign in "\t|;" if sign in head.replace("sep=;", ""))
    rows = read(f"{head}\n\n0.png{sign}a, b{sign}c\n")
    assert [row["report, in words"] for row in rows] == ["a, b"]
    assert len(rows[0]) == 3


def test_a_header_of_one_column_has_no_delimiter_to_guess(read):
    assert read("report of the lung\nclear\n") == [{"report of the lung": "clear"}]


def test_columns_without_a_name_at_the_end_do_not_take_part_of_a_report(read):
    rows = read("file,report,,\n0.png,a,,\n1.png,b\n2.png,c, d\n")
    assert reasons(rows) == [None, None, "wrong_cell_count"]
    assert rows[:2] == [{"file": "0.png", "report": "a"}, {"file": "1.png", "report": "b"}]
    assert rows[2].detail == "line 4: 3 cells for 2 columns"
    assert read(",file,report\n7,0.png,a\n") == [{"": "7", "file": "0.png", "report": "a"}]


def test_null_characters_reject_their_row(read):
    rows = read(b"file,report\n0.png,a\x00b\n1.png,c\n\x00\x00\x00\x00")
    assert reasons(rows) == ["null_character", None, "null_character"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"sep=;\n", b"file,report\n"])
def test_a_table_without_rows_has_none(read, content):
    assert read(content) == []


@pytest.mark.parametrize("seed", range(20))
def test_bytes_of_any_kind_end_in_rows_or_a_sentence(read, seed):
    random = np.random.default_rng(seed)
    content = b"file,report\n" + bytes(random.choice(list(b'"",;\n\r\0 a0.png\\'), 400).tolist())
    counts = TableCounts()
    try:
        rows = read(content, counts=counts)
    except DataError as error:
        assert "expected" in str(error)  # noqa: PT017
    else:
        assert len(rows) == counts.records - 1


# json


JSONL = b"""\
{"file": "0.png", "report": "a"}
{torn

[1]
{"file": "1.png", "report": "b", "report": "c"}
{"file": "1.png", "report": "b", "deep": [{"x": 1, "x": 1}]}
{"file": "2.png", "report": "d", "deep": [{"x": 1}, {"x": 1}]}
{"file": "2.png", "report": Infinity}
{"file": "2.png", "report": NaN, "age": NaN}
null
"""


def test_a_bad_line_of_jsonl_is_a_rejected_row_with_its_line(read):
    rows = read(JSONL, kind="jsonl")
    assert reasons(rows) == [
        None, "bad_json", "bad_json", "repeated_key", "repeated_key", None, "bad_json", None,
        "bad_json",
    ]  # fmt: skip
    lines = [row.detail.partition(":")[0] for row in rows if isinstance(row, Rejected)]
    assert lines == ["line 2, column 2", "line 4", "line 5", "line 6", "line 8", "line 10"]
    assert "'report'" in rows[3].detail
    deep = b"[" * 100_000 + b"\n" + b'{"a": ' + b"9" * 5000 + b"}\n"
    assert reasons(read(deep, kind="jsonl")) == ["bad_json"] * 2


def test_every_row_of_a_jsonl_with_bad_lines_is_accounted_for(prepared):
    counts, pairs, rejects = prepared(JSONL, kind="jsonl")
    assert [row["text"] for row in pairs] == ["a", "d"]
    assert (counts["read"], counts["accepted"], counts["rejected"]) == (9, 2, 7)
    assert (8, "empty_text") in rejects


def test_a_jsonl_without_any_row_says_why_its_first_is_none(prepared):
    with pytest.raises(DataError, match=r"none that can be used \(bad_json: line 1, column 2"):
        prepared(b"{torn\n", kind="jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"file": "0.png", "report": "a", "report": "b"}]', "the key 'report' stands twice"),
        (b'[{"file": "0.png", "deep": {"x": 1, "x": 2}}]', "the key 'x' stands twice"),
        (b'[{"file": "0.png", "report": -Infinity}]', "-Infinity is no JSON"),
        (b'[{"file": "0.png"}, {]', "could not parse it"),
        (b'[{"file": "0.png"}, 1]', "got int"),
    ],
)
def test_a_malformed_json_list_is_an_error(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content, kind="json")


def test_equal_keys_of_different_objects_are_fine(read):
    content = b'[{"a": {"x": 1}, "b": {"x": 1}}, {"a": NaN}]'
    first, second = read(content, kind="json")
    assert first == {"a": {"x": 1}, "b": {"x": 1}}
    assert second["a"] != second["a"]  # NaN, an empty cell


def test_parquet_columns_of_one_name_are_an_error(tmp_path):
    table = pa.table([["0.png"], ["a"], ["b"]], names=["file", "report", "report"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="got file, report, report: rename one"):
        list(table_rows("parquet", tmp_path / "t.parquet"))
    pq.write_table(table.rename_columns(["file", "report", "other"]), tmp_path / "t.parquet")
    [row] = table_rows("parquet", tmp_path / "t.parquet")
    assert row == {"file": "0.png", "report": "a", "other": "b"}


# encoding


HEART = "Herz gr\u00f6\u00dfer \u2013 \u201eunklar\u201c"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_one_byte_that_is_not_utf8_is_an_error_with_its_place(read, end):
    lines = [b"file,report", "0.png,gr\u00f6\u00dfer".encode(), b"1.png,gr\xf6"]
    with pytest.raises(DataError, match=r"line 3, byte 9 of the line \(0xf6\).*give encoding"):
        read(end.encode().join(lines))
    with pytest.raises(DataError, match="line 1, byte 5 of"):
        read(codecs.BOM_UTF8 + b"a\xff,report")
    assert texts(read(end.encode().join(lines[:2]))) == ["gr\u00f6\u00dfer"]


@pytest.mark.parametrize(
    "encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]
)
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_the_encoding_of_a_source_is_used(read, kind, encoding):
    content = f"file,report\n0.png,{HEART}\n"
    if kind != "csv":
        row = json.dumps({"file": "0.png", "report": HEART}, ensure_ascii=False)
        content = f"[{row}]" if kind == "json" else row
    assert texts(read(content.encode(encoding), kind=kind, encoding=encoding)) == [HEART]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_of_wider_characters_says_what_it_looks_like(read, kind, encoding):
    with pytest.raises(DataError, match=f"begins like {encoding.upper()}: give encoding"):
        read("file,report\n0.png,x\n".encode(encoding), kind=kind)


def test_wider_characters_without_a_mark_are_not_taken_for_columns(read):
    with pytest.raises(DataError, match="its header has null characters: give encoding"):
        read("file,report\n0.png,x\n".encode("utf-16-le"))


@pytest.mark.parametrize(
    ("encoding", "content", "place"),
    [
        ("cp1252", b"file,report\n0.png,a\x81\n", "line 2, byte 8"),
        ("utf-16", "file,report\n0.png,a".encode("utf-16") + b"\x00\xd8", "line 2, byte 15"),
        ("ascii", b"file,report\r\n0.png,a\n1.png,\xe4\n", "line 3, byte 7"),
    ],
)
def test_a_given_encoding_that_is_wrong_is_an_error_with_the_place(read, encoding, content, place):
    with pytest.raises(DataError, match=f"{place}.*correct encoding"):
        read(content, encoding=encoding)


def test_prepare_reads_the_encoding_of_its_source(prepared, tmp_path):
    content = f"file,report\n0.png,{HEART}\n".encode("cp1252")
    with pytest.raises(DataError, match="line 2, byte 14 of the line"):
        prepared(content)
    assert not (tmp_path / "out").exists()
    assert prepared(content, encoding="cp1252")[1][0]["text"] == HEART


@pytest.mark.parametrize("name", ["nonsense", "base64", "hex", "", "a\0b", "undefined", "idna"])
def test_a_name_that_is_no_codec_is_a_recipe_error(prepared, name):
    with pytest.raises(RecipeError, match=r"SOURCES.yaml:1: sources.0.encoding: expected a codec"):
        prepared(b"file,report\n0.png,x\n", encoding=name)


def test_parquet_has_no_encoding(tmp_path):
    text = "sources:\n  - {name: a, kind: %s, path: f, text: t, encoding: cp1252%s}\n"
    (tmp_path / "SOURCES.yaml").write_text(text % ("parquet", ", image: i"))
    with pytest.raises(RecipeError, match="no key encoding for parquet"):
        load_sources(tmp_path / "SOURCES.yaml")
    (tmp_path / "f").mkdir()
    pq.write_table(pa.table({"file_name": ["a"], "t": ["b"]}), tmp_path / "f/metadata.parquet")
    (tmp_path / "SOURCES.yaml").write_text(text % ("imagefolder", ""))
    with pytest.raises(DataError, match="expected no encoding"):
        prepare(tmp_path / "SOURCES.yaml", tmp_path / "out")


# cells that say nothing


def test_texts_of_nothing_are_empty_cells_wherever_they_are_read(prepared):
    table = (
        b"file,report,more,patient,license,id,age\n"
        b"0.png,NULL, nan ,p,MIT,x,1\n"
        b"1.png,N/A,clear,-,None,NULL,-\n"
        b"NULL,text,,p,MIT,y,1\n"
        b"2.png,Nan means bread,None of it,p,MIT,z,null\n"
        b"3.png,,,p,MIT,v,1\n"
    )
    counts, pairs, rejects = prepared(
        table, text="{report} {more}", group="patient", empty_group="image", id="id",
        license={"column": "license"}, keep=["age"],
    )  # fmt: skip
    assert rejects == [(1, "empty_text"), (3, "no_image"), (5, "empty_text")]
    assert [row["text"] for row in pairs] == ["clear", "Nan means bread None of it"]
    assert pairs[0]["group_id"].startswith("image/")
    assert pairs[0]["license"] is None
    assert [json.loads(row["fields"]) for row in pairs] == [{"age": ""}, {"age": "null"}]
    assert (pairs[0]["id"] == "NULL", pairs[1]["id"]) == (False, "z")
    assert counts["na_cells"] == 8


def test_na_values_are_those_of_the_source(prepared):
    table = b"file,report\n0.png,NULL\n1.png,unknown\n2.png,\n"
    counts, pairs, rejects = prepared(table, na_values=[" unknown "])
    assert [row["text"] for row in pairs] == ["NULL"]
    assert rejects == [(2, "empty_text"), (3, "empty_text")]
    assert counts["na_cells"] == 1
    counts, pairs, _ = prepared(table, na_values=[])
    assert [row["text"] for row in pairs] == ["NULL", "unknown"]
    assert counts["na_cells"] == 0


def test_where_and_question_see_empty_cells(prepared):
    table = b"file,report,view,q\n0.png,a,-,Q?\n1.png,b,,NULL\n2.png,c,PA,Q?\n"
    _, pairs, rejects = prepared(table, where={"view": ""}, question="q")
    assert [row["text"] for row in pairs] == ["a"]
    assert rejects == [(2, "empty_question")]
    assert prepared(table, where={"view": "-"}, na_values=[])[1][0]["text"] == "a"


@pytest.mark.parametrize("wanted", ["-", ["PA", "NULL"], " None "])
def test_a_where_that_no_cell_can_have_is_a_recipe_error(prepared, wanted):
    with pytest.raises(RecipeError, match=r"in where of view, which is a text of na_values"):
        prepared(b"file,report,view\n0.png,a,PA\n", where={"view": wanted})
    assert len(prepared(b"file,report,view\n0.png,a,PA\n", where={"view": ["PA", None]})[1]) == 1


def test_cells_of_other_types_stay_as_they_are(read):
    row = {
        "a": None,
        "b": 0,
        "c": {"bytes": None, "path": "NULL"},
        "d": ["-"],
        "e": " - ",
        "f": "x",
    }
    counts = TableCounts()
    na = frozenset({"", "-", "NULL", "None", "0"})
    [got] = read(json.dumps(row), kind="jsonl", na_values=na, counts=counts)
    assert got == row | {"e": ""}
    assert counts.na_cells == 1
