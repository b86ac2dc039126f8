"""On a full disk an evaluation ends with one sentence, and nothing of it is left."""

import pytest
from small_disk import kilobytes_in, on_small_disk, only_sentence

from medft.evaluation.evaluate import evaluate

SOME = {"siglip": 0.5, "decoder": 0.9}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=pytest.mark.slow if share == one else pytest.mark.proof)
        for name, one in SOME.items()
        for share in (0.03, 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.97)
    ],
)
def test_evaluate_on_a_disk_that_fills(runs, data, tmp_path, name, share):
    rows = data / "pairs.parquet"
    evaluate(runs / name, tmp_path / "whole", data=rows, split=None, against_base=False)
    disk, room = tmp_path / "disk", int(share * kilobytes_in(tmp_path / "whole"))
    given = ("-m", "medft.cli", "evaluate", runs / name, "--data", rows, "--out", disk / "out")
    ended = on_small_disk(disk, room, *given, again="--split=validation")
    assert f"expected room to write {disk / 'out'}, " in only_sentence(ended)
    assert ended.files == []
    assert ended.code_after == 0, ended.error_after
    assert len(list((ended.after / "out").iterdir())) == 3
