"""Pages show what others wrote as text, and images only as medft has encoded them."""

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser

import pytest
from hand_made import predictions
from PIL import Image, PngImagePlugin

from medft.evaluation.report import write_evaluation_report
from medft.metrics.predictions import RetrievalPrediction, RetrievedText
from medft.metrics.scores import score
from medft.models.saved import RunLayout
from medft.pages import STYLE

NASTY = "</style></title></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;"
HARMLESS = {"html", "head", "body", "main", "meta", "title", "style", "h1", "h2", "h3", "p", "div"}
HARMLESS |= {"table", "tr", "th", "td", "b", "br", "span", "svg", "line", "text", "circle", "img"}
HARMLESS |= {"dl", "dt", "dd", "ins", "del", "i", "details", "summary", "pre"}


RECORD = {
    "status": "completed", "started": NASTY, "base": {"base": NASTY}, "trainable_parameters": 1,
    "batch": {"steps": 1, "effective": 1}, "total_parameters": 1, "recipe": {NASTY: NASTY},
    "data": {"train": {"path": NASTY, "sha256": NASTY}}, "metrics": {NASTY: 1.0}, "argv": [NASTY],
}  # fmt: skip


class Tags(HTMLParser):
    """The tags of a page, the sources of its images, its styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.sources, self.texts = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.sources += [value for name, value in attributes if name == "src"]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def run(tmp_path):
    """A run directory whose every text is nasty, and whose curves are a PNG."""
    layout = RunLayout(tmp_path / NASTY.replace("/", ""))
    layout.directory.mkdir()
    layout.record.write_text(json.dumps(RECORD))
    layout.history.write_text(json.dumps([{"loss": 1.0}, {"loss": None}]))
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Doe^Jane")
    Image.new("RGBA", (8, 8)).save(layout.curves, pnginfo=info)
    return layout


def written(tmp_path, made, run=None, **metrics):
    figures = {
        **(metrics or score(made)),
        "overlap": None,
        "unseen": None,
        "model": f"\udcff{NASTY}",
        "data": NASTY,
        "split": NASTY,
        "data_rows": 1,
        "rows_chose_checkpoint": True,
        "validation_rows": 1,
        "without_test": NASTY,
    }
    figures |= {"notes": [NASTY]}
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, format="JPEG")
    images = {one.id: jpeg.getvalue() for one in made}
    write_evaluation_report(tmp_path / "report.html", made, figures, images, run=run)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def nasty_answers(**more):
    made = predictions(
        {"tuned": lambda i, reference: NASTY + reference, "base": lambda i, r: NASTY}
    )
    changes = {"source": NASTY, "question": NASTY, "reference": NASTY} | more
    return [dataclasses.replace(one, **changes, id=f"{NASTY}{n}") for n, one in enumerate(made)]


def nasty_ranks():
    texts = [RetrievedText(text=NASTY, similarity=0.5)] * 3
    ranks = {"image_to_text": 1.0, "text_to_image": 1.0}
    return [
        RetrievalPrediction(
            id=f"{NASTY}{n}", group_id=f"g{n}", source=NASTY, reference=NASTY,
            ranks={"tuned": ranks, "shuffled": ranks}, retrieved={"tuned": texts},
            shuffled_with=NASTY,
        )
        for n in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize("make", [nasty_answers, nasty_ranks])
def test_every_text_of_a_page_is_text(tmp_path, run, make):
    page = written(tmp_path, make(), run)
    tags = Tags(page)
    assert tags.found <= HARMLESS
    assert page.count("</style>") == 1
    assert STYLE in "".join(tags.texts)
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert "".join(tags.texts).count("<script>alert(1)</script>") > 10


def test_curves_are_encoded_anew(tmp_path, run):
    page = written(tmp_path, nasty_answers(), run)
    curves = [source for source in Tags(page).sources if "png" in source]
    assert len(curves) == 1
    assert "Doe" not in page
    content = base64.b64decode(curves[0].partition(",")[2])
    assert b"Doe" not in content
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize(
    "content", [b"<script>alert(1)</script>", b"\x89PNG\r\n\x1a\n<script>", b"P6 9000 9000 255\n"]
)
def test_what_is_no_image_is_not_shown(tmp_path, run, content):
    run.curves.write_bytes(content)
    page = written(tmp_path, nasty_answers(), run)
    assert "curves.png is no image" in page
    assert not [source for source in Tags(page).sources if "png" in source]


def test_a_page_stays_small_whatever_its_texts(tmp_path, run):
    run.record.write_text(json.dumps(RECORD | {"argv": ["<" * 10_000_000]}))
    long = " ".join(f"w{n}" for n in range(100_000))
    texts = {"predictions": {"tuned": long + " x", "base": long}, "reference": long}
    names = {"question": long, "source": "s" * 100_000}
    made = nasty_answers()[:2]
    figures = score(made)
    made = [dataclasses.replace(one, **texts, **names) for one in made]
    page = written(tmp_path, made, run, **figures)
    assert len(page) < 1_000_000
    assert "w0 w1 w2" in page
