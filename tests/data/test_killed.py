"""A killed run leaves the old output or none; repeated, it ends as an undisturbed one."""

import shutil
import subprocess
import sys
import time

import pytest

from medft.demo.exports import write_exports

pytestmark = pytest.mark.slow

FILES = ("pairs.parquet", "rejects.jsonl", "summary.json", "report.html")


def start(sources, out):
    command = [
        sys.executable,
        "-m",
        "medft.cli",
        "data",
        "prepare",
        str(sources),
        "--out",
        str(out),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name in FILES}


def test_killed_at_20_moments_and_repeated(tmp_path):
    sources = write_exports(tmp_path / "raw", pairs=400, seed=4)
    durations = []
    for _ in range(2):  # the first one may have had a busy machine
        began = time.monotonic()
        assert start(sources, tmp_path / "whole").wait() == 0
        durations.append(time.monotonic() - began)
    duration = min(durations)
    whole = contents(tmp_path / "whole")
    assert whole.keys() == set(FILES)
    early = [duration * 0.8 * i / 10 for i in range(10)]
    late = [duration * (0.8 + 0.2 * i / 10) for i in range(10)]
    killed = 0
    for number, moment in enumerate([*early, *late]):
        out = tmp_path / f"out{number}"
        if number % 2:  # an earlier output of other data, which must stay whole
            out.mkdir()
            for name in FILES:
                (out / name).write_text("earlier")
        process = start(sources, out)
        time.sleep(moment)
        process.kill()
        killed += process.wait() != 0
        left = contents(out) if out.exists() else {}
        earlier = dict.fromkeys(FILES, b"earlier") if number % 2 else {}
        for name, content in left.items():
            assert content in (whole[name], earlier.get(name)), (number, name)
        assert start(sources, out).wait() == 0
        assert contents(out) == whole
        assert {path.name for path in out.iterdir()} == set(FILES)
        shutil.rmtree(out)
    assert killed >= 15
