"""The HTML page of an evaluation: scores, their intervals and example answers.

One self-contained file; `medft evaluate` writes it, and the demo's page reuses its sections.
"""

import difflib
import hashlib
import html
import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medft.data.images import open_image
from medft.errors import DataError
from medft.evaluation.chart import chart
from medft.evaluation.labels import COLORS, interval, label, read_line
from medft.evaluation.seen import choice_line, overlap_line
from medft.metrics.predictions import AnswerPrediction, Prediction, RetrievalPrediction
from medft.metrics.text import words
from medft.models.run_record import read_log_history
from medft.models.saved import RunLayout
from medft.pages import inline, page, png_of, shortened, table

SHOWN_CASES = 12
"""Number of cases on the page, taken in turn from every source, chosen by hashed ids."""

_SHOWN_CHARACTERS = 4000
"""Of a text, at most."""

_SHOWN_RECORD = 100_000
"""Characters of run.json, at most."""

_CURVE_PIXELS = 16_000_000
"""Of curves.png, at most."""


def write_evaluation_report(
    target: Path,
    predictions: Sequence[Prediction],
    metrics: Mapping[str, Any],
    images: Mapping[str, bytes],
    *,
    run: RunLayout | None,
) -> None:
    """Write the page.

    Args:
        target: path of the page.
        predictions: those of predictions.jsonl.
        metrics: content of metrics.json.
        images: JPEG files of `shown_cases`, by id.
        run: directory whose record and curves are shown; None for a model without one.
    """
    sections = evaluation_sections(predictions, metrics, images)
    if run is not None:
        sections += run_sections(run)
    note = (
        f"{_extent(metrics)}. Scores compare texts; none of them is medical accuracy. For "
        f"research use."
    )
    title = f"Evaluation of {metrics['model']}"
    text = page(title, note, sections, warning=choice_line(metrics))
    target.write_text(text, encoding="utf-8", errors="backslashreplace")


def shown_cases(predictions: Sequence[Prediction]) -> list[str]:
    """The ids of the cases on the page."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for one in sorted(predictions, key=lambda one: hashlib.sha256(one.id.encode()).hexdigest()):
        by_source[one.source].append(one.id)
    turns = max((len(ids) for ids in by_source.values()), default=0)
    order = [ids[turn] for turn in range(turns) for ids in by_source.values() if turn < len(ids)]
    return order[:SHOWN_CASES]


def evaluation_sections(
    predictions: Sequence[Prediction],
    metrics: Mapping[str, Any],
    images: Mapping[str, bytes],
) -> list[str]:
    """HTML sections: the headline, the cases, the chart and the table of scores."""
    is_encoder = metrics["kind"] == "siglip"
    by_id = {one.id: one for one in predictions}
    cases = [_case_of(by_id[name], images.get(name)) for name in shown_cases(predictions)]
    legend = (
        "The caption of each image, and the texts of the pool that lie nearest to it."
        if is_encoder
        else "Words that the reference lacks are marked, words that are missing struck through."
    )
    seen = metrics["overlap"] is None or metrics["overlap"]["rows"]
    return [
        f'<p class="{"warning" if seen else "note"}">{html.escape(overlap_line(metrics))}</p>',
        _headline(metrics),
        f'<p class="note">Cases drawn by their ids. {legend}</p>'
        f'<div class="cases">{"".join(cases)}</div>',
        chart(metrics),
        _figures(metrics),
    ]


def describe(metrics: Mapping[str, Any]) -> str:
    """The scores as lines of text: each metric, n, and every system's value and interval."""
    systems = metrics["systems"]
    lines = [
        *filter(None, [choice_line(metrics)]),
        _extent(metrics),
        overlap_line(metrics),
        *_score_lines(systems),
        *filter(None, [read_line(metrics)]),
    ]
    if metrics["unseen"]:
        lines += ["without the rows that training has seen:"]
        lines += _score_lines(metrics["unseen"]["systems"])
    lines += [f"chance {name}: {value:.3g}" for name, value in metrics.get("chance", {}).items()]
    return "\n".join([*lines, *metrics["notes"]])


def _extent(metrics: Mapping[str, Any]) -> str:
    """How many answers of how many rows, groups and which file are scored."""
    several = "images" if metrics["kind"] == "siglip" else "answers"
    each = f"{metrics['rows']:,} {several} of " if metrics["rows"] != metrics["data_rows"] else ""
    split = f", split {metrics['split']}" if metrics["split"] else ""
    return (
        f"{each}{metrics['data_rows']:,} rows of {metrics['groups']:,} groups, "
        f"{metrics['data']}{split}"
    )


def _score_lines(systems: Mapping[str, Any]) -> list[str]:
    return [
        f"{label(metric)} (n {tuned['n']}): "
        + ", ".join(f"{label(name)} {interval(f[metric])}" for name, f in systems.items())
        for metric, tuned in systems["tuned"].items()
    ]


def _headline(metrics: Mapping[str, Any]) -> str:
    main = _main_metric(metrics)
    cards = []
    for name, figures in metrics["systems"].items():
        value = figures[main]
        shown = "none" if value["value"] is None else f"{value['value']:.2f}"
        span = ""
        if value["low"] is not None:
            span = f", 95 % interval {value['low']:.2f} to {value['high']:.2f}"
        color = COLORS[name]
        cards.append(
            f'<div class="card"><b style="color:{color}">{shown}</b>{html.escape(label(name))}'
            f"<br><span>{html.escape(label(main))}{span}</span></div>"
        )
    if "chance" in metrics:
        chance = metrics["chance"]["recall@1"]
        cards.append(
            f'<div class="card"><b style="color:#5a6b7b">{chance:.3f}</b>chance<br><span>'
            f"recall@1, pool of {metrics['pool']:,} with {metrics['texts']:,} texts</span></div>"
        )
    note = f'<p class="note">{html.escape(read_line(metrics))}</p>'
    return f'<div class="cards">{"".join(cards)}</div>{note}'


def _main_metric(metrics: Mapping[str, Any]) -> str:
    """The headline's metric: finding F1, or token F1 where it has no value.

    Yes/no accuracy if a third of the rows are closed.
    """
    if metrics["kind"] == "siglip":
        return "image_to_text_recall@1"
    tuned = metrics["systems"]["tuned"]
    if 3 * tuned["closed_accuracy"]["n"] >= metrics["rows"]:
        return "closed_accuracy"
    return "token_f1" if tuned["finding_f1"]["value"] is None else "finding_f1"


def _figures(metrics: Mapping[str, Any]) -> str:
    unseen = metrics["unseen"]
    tables = _tables(metrics, "All figures")
    if unseen:
        tables += _tables(unseen, "Without the rows that training has seen")
    notes = [
        "Intervals: 95 %, bootstrap over groups (patients), which keeps a group's rows together. "
        "Empty and failed answers count as wrong."
    ]
    if "bleu_signature" in metrics:
        notes.append(f"BLEU: {metrics['bleu_signature']}.")
    notes += metrics.get("notes", [])
    shown = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f"{tables}{shown}"


def _tables(metrics: Mapping[str, Any], title: str) -> str:
    """Every system's figures, and their differences from the tuned model."""
    systems, differences = metrics["systems"], metrics["differences"]
    head = ["", "n", *map(label, systems)]
    rows = [
        [label(metric), systems["tuned"][metric]["n"]]
        + [interval(figures[metric]) for figures in systems.values()]
        for metric in systems["tuned"]
    ]
    paired = [
        [label(metric)] + [interval(figures[metric]) for figures in differences.values()]
        for metric in systems["tuned"]
    ]
    return (
        f"<h3>{title}</h3>{table(head, rows)}<h3>Tuned minus the others, row by row</h3>"
        f"{table(['', *(f'minus {label(name)}' for name in differences)], paired)}"
    )


def _case_of(prediction: Prediction, image: bytes | None) -> str:
    if isinstance(prediction, RetrievalPrediction):
        return _case(prediction, image, "", _retrieved_entries(prediction))
    question = f"<p>{html.escape(prediction.question[:300])}</p>"
    return _case(prediction, image, question, _answer_entries(prediction))


def _answer_entries(prediction: AnswerPrediction) -> list[tuple[str, str, str]]:
    reference = shortened(prediction.reference, _SHOWN_CHARACTERS)
    entries = [("reference", html.escape(reference), "")]
    for name, answer in prediction.predictions.items():
        if name == "shuffled":
            continue
        text = None if answer is None else shortened(answer, _SHOWN_CHARACTERS)
        if text is not None and words(text) == words(reference):
            entries.append((label(name), html.escape(text), ' class="right"'))
        else:
            marked = _marked(text, reference) if text else "<i>no answer</i>"
            entries.append((label(name), marked, ""))
    return entries


def _retrieved_entries(prediction: RetrievalPrediction) -> list[tuple[str, str, str]]:
    caption = shortened(prediction.reference, _SHOWN_CHARACTERS)
    entries = [("caption", html.escape(caption), "")]
    for name, best in prediction.retrieved.items():
        rank = prediction.ranks[name]["image_to_text"]
        right = ' class="right"' if best[0].text == prediction.reference else ""
        shown = [shortened(one.text, _SHOWN_CHARACTERS) for one in best]
        texts = "<br>".join(
            f"{one.similarity:.2f} {html.escape(text)}"
            for one, text in zip(best, shown, strict=True)
        )
        entries.append((f"{label(name)}, caption at rank {rank:g}", texts, right))
    return entries


def _case(
    prediction: Prediction,
    image: bytes | None,
    head: str,
    entries: Sequence[tuple[str, str, str]],
) -> str:
    shown = f'<img src="{inline(image, "jpeg")}" alt="">' if image else ""
    listed = "".join(
        f"<dt>{html.escape(name)}</dt><dd{kind}>{text}</dd>" for name, text, kind in entries
    )
    origin = html.escape(shortened(f"{prediction.source} {prediction.id}", 300))
    return (
        f'<div class="case">{shown}<div>{head}<dl>{listed}</dl>'
        f'<p class="note">{origin}</p></div></div>'
    )


def _marked(text: str, reference: str) -> str:
    """The text with its word differences from the reference: added marked, missing struck.

    A text that has little in common with the reference is shortened and marked entirely.
    """
    own, wanted = text.split(), reference.split()
    parts = []
    matcher = difflib.SequenceMatcher(
        a=[word.casefold() for word in wanted], b=[word.casefold() for word in own], autojunk=False
    )
    if matcher.ratio() < 0.5:
        return f"<ins>{html.escape(textwrap.shorten(text, 300, placeholder=' ...'))}</ins>"
    for kind, a_start, a_stop, b_start, b_stop in matcher.get_opcodes():
        added = html.escape(" ".join(own[b_start:b_stop]))
        missing = html.escape(" ".join(wanted[a_start:a_stop]))
        if kind == "equal":
            parts.append(added)
            continue
        parts += [f"<del>{missing}</del>"] if missing else []
        parts += [f"<ins>{added}</ins>"] if added else []
    return " ".join(parts)


def run_sections(run: RunLayout) -> list[str]:
    """The curves and the record of a run, as far as its files are those of a run."""
    record = run.read_record()
    whole = json.dumps(record, indent=2)
    cut = " ..." if len(whole) > _SHOWN_RECORD else ""
    return [
        f"<h2>Training of {html.escape(run.directory.name)}</h2>{_curves(run)}"
        f"{_figures_of_run(run, record)}<details><summary>run.json</summary>"
        f"<pre>{html.escape(whole[:_SHOWN_RECORD])}{cut}</pre></details>"
    ]


def _curves(run: RunLayout) -> str:
    """The curves as an image that was decoded and is encoded anew; what is none is not shown."""
    try:
        image = open_image(run.curves, max_pixels=_CURVE_PIXELS)
    except DataError:
        return '<p class="note">curves.png is no image.</p>'
    return (
        f'<img class="curves" src="{inline(png_of(image))}" '
        f'alt="loss, learning rate and gradient norm">'
    )


def _figures_of_run(run: RunLayout, record: Mapping[str, Any]) -> str:
    history = read_log_history(run.history)
    losses = [entry["loss"] for entry in history if entry.get("loss") is not None]
    batch = record["batch"]
    rows = [
        ["status", record["status"]],
        ["started, ended", f"{record['started']}, {record.get('ended', 'not yet')}"],
        ["base", record["base"]["base"]],
        ["steps", f"{batch['steps']:,} of {batch['effective']} rows"],
        ["trained parameters", f"{record['trainable_parameters']:,}"],
        ["of", f"{record['total_parameters']:,}"],
        *([["first and last loss", f"{losses[0]:.3f}, {losses[-1]:.3f}"]] if losses else []),
        *([label(name), _shown(value)] for name, value in record.get("metrics", {}).items()),
    ]
    return table(["", "value"], rows)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
