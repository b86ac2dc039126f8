"""report.html of prepared data: true numbers, what needs a look first, no word cut."""

import html
import io
import json
import random
import re
import time
import tracemalloc
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from exports import patients
from PIL import Image

from medft.data.charts import Bar, binned, chart
from medft.data.images import MAX_PIXELS
from medft.data.pairs import GroupFacts, read_pairs, write_pairs
from medft.data.prepare import prepare
from medft.data.report import write_data_report
from medft.data.statistics import Statistics, spread
from medft.pages import shortened

VOID = {"meta", "img", "br", "line", "rect"}


class Page(HTMLParser):
    """Elements, texts and attributes of a page; every element is closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], Counter(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def prepared(exports, tmp_path):
    """Prepare sources, given as to `exports`; gives the summary, the rows and the page."""

    def run(split=None, /, *, max_rejects=0.9, **sources):
        spec = exports(split, **sources)
        summary = prepare(spec, tmp_path / "out", max_rejects=max_rejects)
        rows = list(read_pairs(tmp_path / "out" / "pairs.parquet", images=False))
        return summary, rows, (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    return run


def cards(page):
    """Number and small print by label."""
    found = re.findall(r'class="card"><b>([\d,]+)</b>(.*?)<br><span>(.*?)</span>', page)
    return {label: (int(number.replace(",", "")), below) for number, label, below in found}


def bars(page, title):
    """Label and number of a chart's bars, as drawn."""
    drawing = page.split(f"<h3>{title}</h3>")[1].split("</svg>")[0]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    spoken = html.unescape(re.search('aria-label="([^"]*)"', drawing)[1])
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert spoken == f"{title}: " + ", ".join(f"{label}: {number}" for label, number in pairs)
    return [(label, int(number.replace(",", ""))) for label, number in pairs]


def tables(page):
    """Cells of every table."""
    return [
        [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", one)]
        for one in re.findall("<table>(.*?)</table>", page, re.DOTALL)
    ]


def lost(count):
    return [{"patient": "z", "image": f"lost{index}.png"} for index in range(count)]


def words(count):
    return " ".join(["lung"] * count)


LENGTHS = (1, 2, 2, 4, 30, 1000, 1001)


def test_the_numbers_are_those_of_the_summary_and_of_the_rows(prepared):
    texts = [{"patient": f"p{i // 2}", "text": words(n)} for i, n in enumerate(LENGTHS)]
    summary, rows, page = prepared(
        {"validation": 0.3, "test": 0.2},
        a=(texts + lost(3), {}),
        b=(patients(*range(9)), {"na_values": ["report 12"]}),
    )
    assert {"train", "validation", "test"} == set(summary["splits"])
    read = sum(one["read"] for one in summary["sources"].values())
    rejected = sum(one["rejected"] for one in summary["sources"].values())
    groups = {s: len({r["group_id"] for r in rows if r["split"] == s}) for s in summary["splits"]}
    assert read == 19
    assert rejected == 4
    found = cards(page)
    assert found["pairs"] == (len(rows), "of 19 rows read")
    assert found["groups"] == (summary["groups"], f"largest: {summary['largest_group']} pairs")
    assert found["images"][0] == len({digest for row in rows for digest in row["sha256"]})
    assert found["rows rejected"] == (4, "of 19, 21.1 %")
    for split, count in summary["splits"].items():
        share = f"{100 * count / len(rows):.1f} % of pairs, {groups[split]} groups"
        assert found[split] == (count, share)
    assert bars(page, "Pairs and groups by split") == [
        bar
        for split in ("train", "validation", "test")
        for bar in ((split, summary["splits"][split]), ("its groups", groups[split]))
    ]
    lengths = Counter(len(row["text"].split()) for row in rows)
    assert lengths == Counter(LENGTHS) + Counter({2: 8})
    assert bars(page, "Lengths of texts") == [
        ("1", 1), ("2", 10), ("3 to 5", 1), ("6 to 10", 0), ("11 to 20", 0), ("21 to 50", 1),
        ("51 to 100", 0), ("101 to 200", 0), ("201 to 500", 0), ("501 to 1,000", 1),
        ("over 1,000", 1),
    ]  # fmt: skip
    assert bars(page, "Sizes of images") == [("1 to 128", len(rows))]
    head, a, b = tables(page)[0]
    assert [a[: len(head)], b] == [
        ["a", "10", "7", "3", "7", "missing_image 3", "patient", "0", "11", "11"],
        ["b", "9", "8", "1", "8", "empty_text 1", "patient", "1", "10", "10"],
    ]
    assert head[-3:] == ["cells emptied by na_values", "lines of CSV", "records of CSV"]


def test_columns_of_tables_are_there_only_where_a_source_has_such_a_count(prepared):
    *_, page = prepared(a=(patients(1, 2, 3), {"kind": "jsonl"}))
    assert "na_values" not in page
    assert "of CSV" not in page
    *_, page = prepared(a=(patients(1, 2, 3), {"kind": "jsonl"}), b=(patients(4, 5), {}))
    head, a, b = tables(page)[0]
    assert head[-2:] == ["lines of CSV", "records of CSV"]
    assert (a[-2:], b[-2:]) == (["", ""], ["3", "3"])


def test_an_image_of_several_rows_counts_once_and_its_uses_are_named(prepared):
    rows = [{"patient": 1}, {"patient": 1, "image": "1.png"}, {"patient": 2}]
    _, _, page = prepared(a=(rows, {}))
    assert cards(page)["images"] == (2, "3 with repeats")
    assert bars(page, "Sizes of images") == [("1 to 128", 3)]


def test_what_needs_a_look_comes_before_charts_tables_and_sources(prepared):
    rows = [{"patient": p, "name": "Anna Meier"} for p in (1, "", 2, 3)]
    options = {"empty_group": "image", "identifiers": ["name"]}
    rows[0]["text"] = "Meier is well"
    _, _, page = prepared(a=(rows, options), b=(patients(2, 4), {}), c=(patients(5), {}))
    order = [
        '<div class="cards">', '<ul class="warning">', "1 group values stand in several sources",
        "a: 1 rows have no patient and were grouped by image",
        "a: 4 pairs were searched for identifiers; found: name 1 (rejected)", "</ul>",
        "No group stands in two splits", "b; c: no identifiers are named",
        "Group ids stand in the clear", "<h3>Pairs and groups by split", "<h3>Lengths of texts",
        "<h3>Sizes of images", "<h2>Sources", "<h2>Groups", "<h2>Identifiers", "<h2>a</h2>",
        "<h2>b</h2>", "<h2>Rejected rows",
    ]  # fmt: skip
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert "Meier" not in page


def test_where_nothing_needs_a_look_there_is_no_warning(prepared):
    rows = [{"patient": p, "name": "Anna Meier"} for p in range(5)]
    _, _, page = prepared(a=(rows, {"identifiers": ["name"]}))
    assert 'class="warning"' not in page
    for line in ("No group stands in two splits.", "identifiers; none of name found."):
        assert re.search(f'<p class="note">[^<]*{re.escape(line)}</p>', page)


def test_keyed_ids_and_dropped_file_names_are_counted(exports, tmp_path):
    rows = [{"patient": f"pat-{i}", "key": f"pat-{i}/x" if i < 3 else i} for i in range(5)]
    spec = exports(a=(rows, {"id": "key"}))
    image = spec.parent / "images" / "1.png"
    image.rename(image.with_name("pat-0.png"))
    table = spec.parent / "a.csv"
    table.write_text(table.read_text().replace(",1.png,", ",pat-0.png,"))
    (spec.parent / "key.txt").write_text("a secret of some length")
    spec.write_text(spec.read_text() + "group_key: key.txt\n")
    prepare(spec, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "keyed hashes, as are 3 ids that held a group or an identifier; 1 file names" in page
    assert "pat-" not in page


def test_a_group_in_two_splits_is_a_warning_and_a_kept_split_is_one_if_groups_lack(
    prepared, tmp_path
):
    own = {"column": "fold", "train": ["x"], "test": ["y"], "shared_groups": "report"}
    rows = [{"patient": p, "fold": f} for p, f in ((1, "x"), (1, "y"), (2, "x"))]
    _, _, page = prepared(own, a=(rows, {}))
    warnings = page.split('<ul class="warning">')[1].split("</ul>")[0]
    assert "1 groups (2 pairs) stand in several splits" in warnings
    assert "No group stands in two splits" not in page

    shared = {"validation": 0.2, "test": 0.2}
    prepared(shared, a=(patients(*range(10)), {}))
    (tmp_path / "out").rename(tmp_path / "earlier")
    keep = {**shared, "keep": str(tmp_path / "earlier" / "pairs.parquet")}
    *_, page = prepared(keep, a=(patients(*range(12)), {}))
    assert 'class="warning"' not in page
    assert page.index("10 groups (10 pairs) keep the split") < page.index("<h3>Pairs and groups")
    *_, page = prepared(keep, a=(patients(*range(8)), {}))
    warnings = page.split('<ul class="warning">')[1].split("</ul>")[0]
    assert "8 groups (8 pairs) keep the split" in warnings
    assert "2 of its groups are not among the rows" in warnings


def test_warnings_of_many_sources_are_one_that_opens(prepared):
    names = [f"department of radiology and nuclear medicine, archive {i}" for i in range(20)]
    rows = patients(1, 2, "")
    summary, _, page = prepared(**{name: (rows, {"empty_group": "image"}) for name in names})
    parsed = Page(page)
    opened = page.split("<details>")[1].split("</details>")[0]
    assert "<summary>20 rows without group, in 20 sources</summary>" in opened
    assert opened.count("<li>") == 20
    assert parsed.tags["details"] == 1
    assert len(tables(page)[0]) == 21
    combinations = len(summary["shared_by_sources"])
    assert page.count('<td class="t">shared by ') == combinations >= 1
    for name in names:
        assert f"<h2>{name}</h2>" in page
    *_, page = prepared(a=(rows, {"empty_group": "image"}), b=(rows, {"empty_group": "image"}))
    assert "<details>" not in page
    assert page.count("rows have no patient") == 2


def test_sources_split_by_image_are_named_in_one_sentence(prepared):
    by_image = {name: (patients(1), {"group": None}) for name in "abcdefg"}
    *_, page = prepared(**by_image)
    assert page.count("split by image:") == 1
    assert "a, b, c and 4 others are split by image:" in page
    *_, page = prepared(a=by_image["a"], z=(patients(1), {}))
    assert ">a is split by image:" in page


HOSTILE = "<script>alert('1')</script> <img src=x onerror=1> \"quoted\" & &lt;b&gt; ]]> --> </svg>"


def test_texts_and_names_of_sources_are_escaped(prepared):
    row = {"patient": "<b>p", "text": HOSTILE, "question": HOSTILE, "owner": HOSTILE}
    rows = [row, {**row, "patient": 2}, {**row, "image": f"{HOSTILE}.png"}]
    options = {"kind": "jsonl", "question": "question", "license": {"column": "owner"}}
    names = ("<script>", "<i>&quot;'")
    *_, page = prepared(**{name: (rows, options) for name in names})
    parsed = Page(page)
    assert not {"script", "i", "b>p"} & set(parsed.tags)
    assert parsed.tags["img"] == 4
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert page.count("<h2>&lt;script&gt;</h2>") == 1
    assert parsed.text.count(HOSTILE) >= 8
    for name in names:
        assert name in parsed.texts


def test_the_page_is_one_file_without_scripts_or_network(prepared):
    *_, page = prepared(a=(patients(1, 2), {}))
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "a"} & set(parsed.tags)
    linked = [value for name, value in parsed.attributes if name in ("src", "href", "srcset")]
    assert len(linked) == 2
    assert all(value.startswith("data:image/jpeg;base64,") for value in linked)
    assert not re.search(r"https?:|url\(|@import", page)
    assert ("name", "viewport") in parsed.attributes


def test_one_row_and_no_reject(prepared):
    summary, _, page = prepared(a=([{"patient": 1, "text": "clear lung"}], {}))
    assert cards(page)["rows rejected"] == (0, "of 1, 0.0 %")
    assert cards(page)["train"] == (1, "100.0 % of pairs, 1 groups")
    assert set(cards(page)) == {"pairs", "groups", "images", "rows rejected", "train"}
    assert bars(page, "Lengths of texts") == [("2", 1)]
    assert "<h2>Rejected rows</h2><p class='note'>None.</p>" in page
    assert summary["pairs"] == 1
    assert "most frequent texts" not in page


def test_without_any_pair_the_page_still_says_so(prepared):
    *_, page = prepared(max_rejects=1.0, a=(lost(2), {}))
    assert cards(page)["pairs"] == (0, "of 2 rows read")
    assert page.count('<p class="note">None.</p>') == 3
    Page(page)


def test_a_text_of_100_000_words_is_counted_and_shown_in_part(prepared):
    rows = [{"patient": 1, "text": words(100_000)}, {"patient": 2, "text": "x" * 400_000}]
    *_, page = prepared(a=(rows, {"kind": "jsonl"}))
    assert bars(page, "Lengths of texts")[-1] == ("over 1,000", 1)
    assert "(a word of 400,000 characters) ..." in page
    assert len(page) < 50_000
    assert tables(page)[2][1][:2] == ["words of text", "1"]
    assert tables(page)[2][1][-1] == "100,000"


def test_equal_texts_are_counted_whole(prepared):
    start = words(60)
    texts = [f"{start} {end}" for end in ("left", "right", "right", "none", "none", "none")]
    *_, page = prepared(a=([{"patient": i, "text": t} for i, t in enumerate(texts)], {}))
    shown = html.escape(shortened(start, 80))
    assert f"most frequent texts: &quot;{shown}&quot; 3, &quot;{shown}&quot; 2</p>" in page


def test_names_of_files_that_are_not_utf8_do_not_stop_the_page(tmp_path):
    sources = {"a\udc80": source_counts(read=1, rejected=1, reasons={"bad_image": 1})}
    line = {"source": "a", "row": 1, "reason": "bad_image", "detail": "b\udcff.dcm is damaged"}
    (tmp_path / "rejects.jsonl").write_text(json.dumps(line))
    page = report(tmp_path, [], sources)
    assert "b\\udcff.dcm is damaged" in page
    assert "<h2>a\\udc80</h2>" in page


def source_counts(**counts):
    empty = dict.fromkeys(("read", "accepted", "rejected", "pairs", "empty_groups"), 0)
    empty |= {"blank_images": 0}
    rest = {"reasons": {}, "identifiers": {}, "grouped_by": "patient", "not_in_group_map": 0}
    return {**empty, **rest, **counts}


def report(folder, rows, sources, **summary):
    """Write the page of rows; gives it."""
    facts = GroupFacts(key_id=None, joined={})
    write_pairs(folder / "pairs.parquet", rows, prompts={}, groups=facts)
    counts = {
        "sources": sources, "pairs": len(rows), "groups": 0, "largest_group": 0,
        "shared_between_splits": {"groups": 0, "pairs": 0}, "kept": None, "group_ids": "clear",
        "shared_group_values": 0, "shared_by_sources": {}, "joins": {}, "splits": {}, **summary,
    }  # fmt: skip
    inputs = folder / "pairs.parquet", folder / "rejects.jsonl"
    write_data_report(*inputs, counts, folder / "report.html", blank={})
    return (folder / "report.html").read_text(encoding="utf-8")


class Rows:
    """Rows that differ in text, id and group, made one at a time."""

    def __init__(self, count, image, width=8, height=8):
        self.count, self.image, self.size = count, image, (width, height)

    def __len__(self):
        return self.count

    def __iter__(self):
        for index in range(self.count):
            yield {
                "id": f"{index}", "images": [{"bytes": self.image, "path": None}],
                "width": self.size[:1], "height": self.size[1:],
                "sha256": [f"{index:064}"], "phash": ["0"], "fields": "{}",
                "text": f"{index} " * 150, "question": None, "source": "a", "split": "train",
                "group_id": f"patient {index}", "license": None,
            }  # fmt: skip


def test_an_image_above_the_standing_limit_of_pixels_is_drawn(tmp_path):
    stream = io.BytesIO()
    Image.new("1", (8100, 8000)).save(stream, "PNG")
    assert MAX_PIXELS < 8100 * 8000
    (tmp_path / "rejects.jsonl").write_text("")
    rows = Rows(1, stream.getvalue(), 8100, 8000)
    page = report(tmp_path, rows, {"a": source_counts(pairs=1)})
    assert bars(page, "Sizes of images") == [("over 4,096", 1)]
    assert Page(page).tags["img"] == 1


def test_the_memory_for_many_rows_is_small(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    (tmp_path / "rejects.jsonl").write_text("")
    peaks = {}
    for count in (1_000, 6_000):
        rows = Rows(count, (tmp_path / "small.png").read_bytes())
        tracemalloc.start()
        page = report(tmp_path, rows, {"a": source_counts(pairs=count)}, splits={"train": count})
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert cards(page)["train"] == (count, f"100.0 % of pairs, {count:,} groups")
        assert bars(page, "Lengths of texts") == [("101 to 200", count)]
    # per row: four numbers of 8 bytes, their growth and the copies that are sorted; a text has 700
    assert (peaks[6_000] - peaks[1_000]) / 5_000 < 150


ALPHABETS = (
    "abcdefghij",
    "\u00e4\u00f6\u00fc\u00df\u00c4e\u0301",
    "\u80ba\u90e8\u672a\u89c1\u5f02\u5e38\u3002\uff0c",
    "\u0645\u0631\u064a\u0636",
    "<>&\"'",
    "-/_.,;:",
)


@pytest.mark.parametrize("blanks", [(" ",), (" ", "\n", "\t ", "\u00a0", "\u3000"), ("",)])
def test_no_text_is_cut_inside_a_word(blanks):
    draw = random.Random(7)
    cut = 0
    for _ in range(2_000):
        alphabet = draw.choice(ALPHABETS) if draw.random() < 0.7 else "".join(ALPHABETS)
        count = draw.randint(0, 60)
        text = "".join(
            "".join(draw.choices(alphabet, k=draw.randint(1, 30))) + draw.choice(blanks)
            for _ in range(count)
        )
        limit = draw.randint(40, 240)
        shown, full = shortened(text, limit), " ".join(text.split())
        assert len(shown) <= limit
        if len(full) <= limit:
            assert shown == full
            continue
        cut += 1
        kept, dots = shown[:-4], shown[-4:]
        assert dots == " ..."
        if kept.startswith("(a word of"):
            first = full.split()[0]
            assert kept == f"(a word of {len(first):,} characters)"
            assert not re.search("[\u4e00-\u9fff]", first[1 : limit - 4])
            continue
        assert kept
        assert full.startswith(kept)
        after = full[len(kept)]
        assert (
            after == " "
            or re.search("[\u4e00-\u9fff\u3000-\u303f]", kept[-1] + after)
            or (kept[-1] in "\u3002\uff0c")
        )
    assert cut > 500


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the lungs are clear, the mediastinum normal", "the lungs are clear, the mediastinum ..."),
        ("the lungs are clear, the mediastinum, normal", "the lungs are clear, the ..."),
        ("the lungs are clear and the heart is" + " " * 30, "the lungs are clear and the heart is"),
        ("w" * 36 + " next one", "w" * 36 + " ..."),
        ("w" * 37 + " next one", "(a word of 37 characters) ..."),
        ("\u80ba" * 50, "\u80ba" * 36 + " ..."),
        ("\u80ba" * 30 + "\u3002" + "\u90e8" * 20, "\u80ba" * 30 + "\u3002 ..."),
        ("CT \u80ba" + "\u90e8" * 50, "CT \u80ba" + "\u90e8" * 32 + " ..."),
        ("\u304b" * 35 + "\u304b\u3099" * 9, "\u304b" * 35 + " ..."),
        ("", ""),
        (" \n ", ""),
    ],
)  # fmt: skip
def test_texts_are_cut_after_the_last_word_that_fits(text, shown):
    assert shortened(text, 40) == shown


def test_shortening_a_text_without_blanks_of_any_length_is_fast():
    start = time.perf_counter()
    assert shortened("x" * 10_000_000, 240).startswith("(a word of 10,000,000")
    assert time.perf_counter() - start < 2


def test_bins_hold_every_number_once_and_end_where_their_labels_say():
    counts = Counter(np.random.default_rng(3).geometric(0.01, 3_000).tolist())
    found = binned(counts, (1, 2, 5, 10, 500))
    assert sum(bar.value for bar in found) == 3_000
    for bar in found:
        if bar.label.startswith("over"):
            ends = (501, float("inf"))
        else:
            low, _, high = bar.label.partition(" to ")
            ends = (int(low), int(high or low))
        assert bar.value == sum(n for number, n in counts.items() if ends[0] <= number <= ends[1])
    assert binned({}, (1, 2)) == []
    assert [tuple(bar)[:2] for bar in binned({1: 3, 6: 2}, (1, 2, 5))] == [
        ("1", 3), ("2", 0), ("3 to 5", 0), ("over 5", 2)
    ]  # fmt: skip
    assert [bar.label for bar in binned({128: 1, 129: 1}, (128, 256))] == ["1 to 128", "129 to 256"]


def test_bars_are_as_long_as_their_numbers_and_a_small_one_is_seen():
    drawn = chart(
        "<t>", "note & more", [Bar("a<b", 1_000_000), Bar("b", 500_000), Bar("c", 1), Bar("d", 0)]
    )
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', drawn)]
    assert widths[0] == 2 * widths[1] > 100
    assert 1 <= widths[2] < 3
    assert widths[3] == 0
    assert "1,000,000" in drawn
    parsed = Page(drawn)
    assert {"<t>", "note & more", "a<b"} <= set(parsed.texts)


def test_the_spread_of_counted_numbers_is_that_of_the_numbers():
    values = np.random.default_rng(5).integers(1, 900, 501)
    low, middle, high = np.percentile(values, [5, 50, 95]).round()
    assert spread(Counter(values.tolist())) == [values.min(), low, middle, high, values.max()]
    assert spread({}) == [0, 0, 0, 0, 0]


def test_frequent_texts_are_named_by_their_first_row():
    statistics = Statistics()
    for index, text in enumerate(["b", "a", "c", "a", "b", "e", "d", "d", "a"]):
        row = {"source": "s", "id": str(index), "text": text, "license": None, "split": "train",
               "group_id": text, "sha256": [text], "width": [3], "height": [1]}  # fmt: skip
        statistics.add(index, row)
    assert list(statistics.repeated("s").items()) == [(1, 3), (0, 2), (6, 2)]
    assert statistics.groups("train") == statistics.images == 5
    assert statistics.groups("test") == 0
    assert statistics.repeated("another") == {}
