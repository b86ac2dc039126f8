"""An evaluation writes predictions first, and scores them as they stand in the file."""

import json
import re
import shutil

import numpy as np
import pytest

from medft.data.rows import load_rows
from medft.errors import MedftError
from medft.evaluation.evaluate import evaluate, read_predictions
from medft.evaluation.report import SHOWN_CASES
from medft.files import file_sha256
from medft.metrics.scores import score


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations")
    for kind in ("nf4", "siglip"):
        evaluate(runs / kind, out / kind, data=None, split=None, against_base=True)
    return out


def test_a_decoder_run_is_evaluated_on_its_own_validation_rows(evaluated, data):
    out = evaluated / "nf4"
    found = read_predictions(out / "predictions.jsonl")
    rows = load_rows(data / "chat" / "validation.jsonl", split="validation")
    assert [one.id for one in found] == rows["id"]
    assert set(found[0].predictions) == {"tuned", "base", "shuffled", "nearest"}
    assert any(one.predictions["tuned"] != one.predictions["base"] for one in found)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["systems"] == score(found)["systems"]
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg") == min(SHOWN_CASES, len(rows))
    assert "run.json" in page


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_rows_that_training_has_seen_are_counted_and_every_score_is_given_without_them(
    runs, data, tmp_path, medft, capsys, kind
):
    train, validation = (
        (data / "chat" / f"{split}.jsonl").read_text().splitlines()[:5]
        for split in ("train", "validation")
    )
    given = data / "chat" / f"{kind}_both.jsonl"
    given.write_text("".join(line + "\n" for line in [*train[:3], *validation]))
    assert medft("evaluate", runs / kind, "--data", given, "--out", tmp_path / "both") == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert metrics["overlap"]["rows"] == metrics["overlap"]["same"] == 3
    assert metrics["overlap"]["groups"] == len({json.loads(line)["group_id"] for line in train[:3]})
    assert metrics["rows"] == 8
    found = read_predictions(tmp_path / "both" / "predictions.jsonl")
    expected = score(found[3:])
    assert metrics["unseen"]["systems"] == expected["systems"]
    assert metrics["unseen"]["rows"] == 5
    assert metrics["unseen"]["systems"] != metrics["systems"]
    sentence = "Training has seen 3 of these rows"
    page = (tmp_path / "both" / "report.html").read_text()
    assert sentence in printed
    assert page.index(sentence) < page.index('<div class="cards">')
    assert "Without the rows that training has seen" in page


def test_where_training_has_seen_none_it_is_said_and_where_its_rows_are_lost_that(
    evaluated, runs, data, tmp_path, medft, capsys
):
    page = (evaluated / "siglip" / "report.html").read_text()
    assert "Training has seen none of these rows" in page
    metrics = json.loads((evaluated / "siglip" / "metrics.json").read_text())
    assert (metrics["overlap"]["rows"], metrics["unseen"]) == (0, None)
    given = ("--data", data / "chat" / "train.jsonl", "--out", tmp_path / "adapter")
    adapter = shutil.copytree(runs / "siglip" / "adapter", tmp_path / "copied")
    assert medft("evaluate", adapter, *given) == 0
    printed = capsys.readouterr().out
    assert "Whether training has seen these rows is not known" in printed
    assert printed.startswith("Whether these rows chose the checkpoint is not known")
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    assert (metrics["overlap"], metrics["rows_chose_checkpoint"]) == (None, None)


def test_ranks_of_a_siglip_run_are_those_of_its_embeddings(evaluated, runs, data):
    from medft.data.images import open_image
    from medft.siglip.embedder import Embedder

    found = read_predictions(evaluated / "siglip" / "predictions.jsonl")
    rows = load_rows(data / "chat" / "validation.jsonl", split="validation")
    texts = [one.reference for one in found]
    embedder = Embedder.load(runs / "siglip")
    images = embedder.embed_images([open_image(row["images"][0]["path"]) for row in rows])
    similarity = images.astype(float) @ embedder.embed_texts(texts).astype(float).T
    for place, one in enumerate(found):
        own = [i for i, text in enumerate(texts) if text == one.reference]
        best = max(similarity[place, i] for i in own)
        above = sum(similarity[place, i] > best + 1e-6 for i in range(len(texts)) if i not in own)
        assert one.ranks["tuned"]["image_to_text"] == above + 1
        assert one.retrieved["tuned"][0].text in texts
    assert any(one.ranks["tuned"] != one.ranks["shuffled"] for one in found)
    metrics = json.loads((evaluated / "siglip" / "metrics.json").read_text())
    hits = np.mean([one.ranks["tuned"]["image_to_text"] <= 1 for one in found])
    assert metrics["systems"]["tuned"]["image_to_text_recall@1"]["value"] == pytest.approx(hits)
    assert metrics["pool"] == len(found)
    assert 0 < metrics["chance"]["recall@1"] < 1


def test_the_command_prints_figures_and_refuses_what_cannot_be_evaluated(
    medft, capsys, runs, data, tmp_path
):
    given = ("--data", data / "pairs.parquet", "--out", tmp_path / "a")
    assert medft("evaluate", runs / "siglip", *given) == 0
    printed = capsys.readouterr().out
    assert re.search(r"image to text recall@1 \(n \d+\): tuned [\d.]+ \[", printed)
    assert printed.splitlines()[-1] == str(tmp_path / "a" / "report.html")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text('{"model_type": "siglip"}')
    for source, out, split, message in (
        (runs / "siglip", "a", None, "to be empty"),
        (data, "b", None, "expected a run or an adapter folder"),
        (tmp_path / "whole", "b", None, "expected an adapter for --against base"),
        (runs / "siglip", "b", "test", "is empty"),
    ):
        with pytest.raises(MedftError, match=message):
            evaluate(source, tmp_path / out, data=None, split=split, against_base=True)
        assert not (tmp_path / "b").exists()


@pytest.fixture
def with_test_rows(runs, data, tmp_path):
    """Copies a run with its data, some of whose validation rows are test rows instead."""

    def make(kind):
        chat = shutil.copytree(data / "chat", tmp_path / "chat")
        lines = (chat / "validation.jsonl").read_text().splitlines(keepends=True)
        for split, own in (("test", lines[::2]), ("validation", lines[1::2])):
            (chat / f"{split}.jsonl").write_text("".join(own))
        run = shutil.copytree(runs / kind, tmp_path / "run")
        record = json.loads((run / "run.json").read_text())
        for split in ("train", "validation"):
            path = chat / f"{split}.jsonl"
            record["data"][split] |= {"path": str(path), "sha256": file_sha256(path)}
        (run / "run.json").write_text(json.dumps(record))
        return run, chat

    return make


@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_test_rows_are_scored_and_rows_that_chose_the_checkpoint_are_called_so(
    with_test_rows, tmp_path, medft, capsys, caplog, kind
):
    run, chat = with_test_rows(kind)
    validation = ("--data", chat / "validation.jsonl")
    cases = {
        "own": ([run], "test", False, None),
        "by_hand": ([run / "best_model", *validation], None, True, "These rows are"),
        "no_test": ([run], "validation", True, "No test rows: there is no"),
    }
    for name, (words, split, chose, line) in cases.items():
        if name == "no_test":
            (chat / "test.jsonl").unlink()
        caplog.clear()
        assert medft("evaluate", *words, "--out", tmp_path / name) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        found = read_predictions(tmp_path / name / "predictions.jsonl")
        own = load_rows(chat / f"{split or 'validation'}.jsonl", split="test")["id"]
        assert [one.id for one in found] == own
        assert (metrics["split"], metrics["rows_chose_checkpoint"]) == (split, chose)
        assert metrics["overlap"]["rows"] == 0
        page = (tmp_path / name / "report.html").read_text()
        printed = capsys.readouterr().out
        first = '<body><main><p class="warning">'
        if line is None:
            assert first not in page
            assert "chose" not in printed
        else:
            sentence = page.partition(first)[2].partition("</p>")[0]
            assert line in sentence
            assert "validation rows of the run" in sentence
            assert printed.splitlines()[0] == sentence
            assert sentence in caplog.text
