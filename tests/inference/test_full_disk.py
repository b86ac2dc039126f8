"""On a full disk predictions end with one sentence, and go on once there is room."""

import json

import pytest
from small_disk import on_small_disk, only_sentence


@pytest.mark.slow
def test_predict_on_a_disk_that_fills(runs, images, tmp_path):
    disk = tmp_path / "disk"
    chosen = images[:40]
    given = ("-m", "medft.cli", "predict", runs / "siglip", *chosen, "--out", disk / "out.jsonl")
    ended = on_small_disk(disk, 24, *given, again="--out=" + str(disk / "out.jsonl"))
    assert f"expected room to write {disk / 'out.jsonl'}, " in only_sentence(ended)
    assert ended.code_after == 0, ended.error_after
    rows = [json.loads(x) for x in (ended.after / "out.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == len(rows) == len(chosen)
    assert 0 < len((ended.left / "out.jsonl").read_text().splitlines()) < len(rows)
