"""On a full disk a command ends with one sentence, and what was there before is still there."""

import subprocess
import sys

import pytest
from exports import Exports, patients

from medft.data.chat import write_chat
from medft.data.prepare import prepare

pytestmark = pytest.mark.slow

MOUNTED = """
set -e
mount -t tmpfs -o size=$1k tmpfs $2
shift; folder=$1; shift
[ -d "$folder.earlier" ] && cp -r "$folder.earlier" $folder/out
set +e
"$@" 2> $folder.stderr
code=$?
(cd $folder && find . -type f | sort | xargs -r sha256sum) > $folder.left
exit $code
"""
"""Runs a command with a folder on a small disk of its own."""


def on_small_disk(folder, kilobytes, *words):
    """The exit code, the error and what is left, with hashes."""
    folder.mkdir(exist_ok=True)
    command = ["unshare", "-Urm", "sh", "-c", MOUNTED, "sh", str(kilobytes), str(folder)]
    command += [sys.executable, "-m", "medft.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    left = folder.with_name(f"{folder.name}.left")
    if not left.exists():
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    stderr = folder.with_name(f"{folder.name}.stderr").read_text()
    return done.returncode, stderr, left.read_text()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    rows = patients(*range(120))
    return Exports(tmp_path_factory.mktemp("raw"))(a=(rows, {}), b=(rows, {}))


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(sources, out)
    return out


def needed(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1024


@pytest.mark.parametrize("has_earlier", [True, False])
def test_prepare_on_a_disk_that_fills_at_six_moments(sources, prepared, tmp_path, has_earlier):
    whole, earlier = needed(prepared), tmp_path / "disk.earlier"
    base = 0
    if has_earlier:
        earlier.mkdir()
        for name in ("pairs.parquet", "summary.json", "rejects.jsonl", "report.html"):
            (earlier / name).write_text(f"earlier {name}")
        base = 24
    disk, failed = tmp_path / "disk", 0
    for share in (0.02, 0.15, 0.3, 0.6, 0.8, 1.0):
        size = base + int(share * whole)
        code, error, left = on_small_disk(disk, size, "data", "prepare", sources, "--out",
                                          disk / "out")  # fmt: skip
        if code == 0:
            continue
        failed += 1
        assert code == 2, error
        assert error.count("medft: error: ") == 1
        assert "disk is full" in error
        assert "Traceback" not in error
        assert len(left.splitlines()) == (4 if has_earlier else 0), left
    assert failed >= 5
    code, error, left = on_small_disk(disk, base + 6 * whole + 500, "data", "prepare", sources,
                                      "--out", disk / "out")  # fmt: skip
    assert code == 0, error
    assert len(left.splitlines()) == 4


def test_chat_on_a_disk_that_fills(prepared, tmp_path):
    write_chat(prepared / "pairs.parquet", tmp_path / "chat")
    disk, whole = tmp_path / "disk", needed(tmp_path / "chat")
    for share in (0.1, 0.5, 0.9):
        code, error, left = on_small_disk(disk, int(share * whole), "data", "chat",
                                          prepared / "pairs.parquet", "--out",
                                          disk / "out")  # fmt: skip
        assert code == 2, error
        assert error.count("medft: error: ") == 1
        assert "disk is full" in error
        assert left == ""


def test_evaluate_on_a_disk_that_fills(runs, data, tmp_path):
    given = ("evaluate", runs / "siglip", "--data", data / "pairs.parquet")
    for size in (8, 40):
        code, error, left = on_small_disk(tmp_path / "disk", size, *given, "--out",
                                          tmp_path / "disk" / "out")  # fmt: skip
        assert code == 2, error
        assert error.count("medft: error: ") == 1
        assert "disk is full" in error
        assert left == ""
