"""On a full disk a merge ends with one sentence, and nothing of it is left."""

import pytest
from small_disk import kilobytes_in, on_small_disk, only_sentence

from medft.export.merge import merge

SOME = {"siglip": 0.97, "decoder": 0.5}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=pytest.mark.slow if share == one else pytest.mark.proof)
        for name, one in SOME.items()
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97)
    ],
)
def test_merge_on_a_disk_that_fills(runs, tmp_path, name, share):
    merge(runs / name, tmp_path / "whole")
    disk, room = tmp_path / "disk", int(share * kilobytes_in(tmp_path / "whole"))
    given = ("-m", "medft.cli", "merge", runs / name, "--out", disk / "out")
    ended = on_small_disk(disk, room, *given, again="--onto=original")
    assert f"expected room to write {disk / 'out'}, " in only_sentence(ended)
    assert ended.files == []
    assert ended.code_after == 0, ended.error_after
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (ended.after / "out" / path.name).read_bytes() == path.read_bytes()
