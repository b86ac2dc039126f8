"""On a full disk a command ends with one sentence, and what was there before is still there."""

import pytest
from exports import Exports, patients
from small_disk import kilobytes_in, on_small_disk, only_sentence

from medft.data.chat import write_chat
from medft.data.prepare import prepare

pytestmark = pytest.mark.slow
CLI = ("-m", "medft.cli")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    rows = patients(*range(120))
    return Exports(tmp_path_factory.mktemp("raw"))(a=(rows, {}), b=(rows, {}))


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(sources, out)
    return out


@pytest.mark.parametrize("has_earlier", [True, False])
def test_prepare_on_a_disk_that_fills_at_six_moments(sources, prepared, tmp_path, has_earlier):
    whole, earlier = kilobytes_in(prepared), tmp_path / "disk.earlier"
    if has_earlier:
        earlier.mkdir()
        for name in ("pairs.parquet", "summary.json", "rejects.jsonl", "report.html"):
            (earlier / name).write_text(f"earlier {name}")
    disk, failed = tmp_path / "disk", 0
    command = (*CLI, "data", "prepare", sources, "--out", disk / "out")
    for share in (0.02, 0.15, 0.3, 0.6, 0.8, 1.0):
        ended = on_small_disk(disk, int(share * whole), *command)
        if ended.code == 0:
            continue
        failed += 1
        only_sentence(ended)
        assert len(ended.files) == (4 if has_earlier else 0)
        for file in ended.files:
            assert (ended.left / file).read_text().startswith("earlier ")
    assert failed >= 5
    ended = on_small_disk(disk, 6 * whole + 500, *command)
    assert ended.code == 0, ended.error
    assert len(ended.files) == 4


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(share, marks=[pytest.mark.proof] * (share not in (0.1, 0.9)))
        for share in (0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.97)
    ],
)
def test_chat_on_a_disk_that_fills(prepared, tmp_path, share):
    write_chat(prepared / "pairs.parquet", tmp_path / "chat")
    disk, room = tmp_path / "disk", int(share * kilobytes_in(tmp_path / "chat"))
    command = (*CLI, "data", "chat", prepared / "pairs.parquet", "--out", disk / "out")
    ended = on_small_disk(disk, room, *command, again="--format=trl")
    assert f"expected room to write {disk / 'out'}, " in only_sentence(ended)
    assert ended.files == []
    assert ended.code_after == 0, ended.error_after
    assert kilobytes_in(ended.after) == kilobytes_in(tmp_path / "chat")
