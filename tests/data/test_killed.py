"""A killed run leaves the old output or none; repeated, it ends as an undisturbed one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from medft.demo.exports import write_exports
from medft.files import finish_swap

pytestmark = pytest.mark.slow

FILES = ("pairs.parquet", "rejects.jsonl", "summary.json", "report.html")

PREPARE = """
import os, signal, sys
from medft.cli import main

out, kind, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[1:] = ["data", "prepare", sys.argv[4], "--out", out]
process = os.getpid()
seen = {"any": 0, "move": 0, "worker": 0}
began = False

def count(event, arguments):
    global began
    began = began or out in repr(arguments)
    if event == "os.kill" or not began:
        return
    if os.getpid() != process:
        seen["worker"] += 1
        if kind == "worker" and seen["worker"] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    seen["any"] += 1
    seen["move"] += event in ("os.rename", "os.remove", "os.rmdir")
    if seen[kind] == moment:
        os.kill(process, signal.SIGKILL)

sys.addaudithook(count)
code = main()
print(seen["any"], seen["move"])
sys.exit(code)
"""
"""Prepares, and is killed at an exact moment: before the n-th thing that the interpreter does after
it began to write, before the n-th time that it moves or removes a file, or before the n-th thing
that one of its workers does."""


def prepare(sources, out, kind="any", moment=0):
    """Runs it in a session of its own, of which no process may be left half a minute later."""
    command = [sys.executable, "-c", PREPARE, str(out), kind, str(moment), str(sources)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    out, err = process.communicate(timeout=120)
    wait_for_the_end_of(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_for_the_end_of(group):
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name in FILES}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_exports(tmp_path_factory.mktemp("raw") / "raw", pairs=400, seed=4)


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """The files of a preparation, how many things it did, and how often it moved a file."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = prepare(sources, out)
    assert done.returncode == 0, done.stderr
    things, moves = map(int, done.stdout.splitlines()[-1].split())
    assert contents(out).keys() == set(FILES)
    return contents(out), things, moves


def killed_and_repeated(sources, out, complete, moment, *, over_earlier):
    """How many files were new after the kill; what was there must be old or new, not between."""
    if over_earlier:
        out.mkdir()
        for name in FILES:
            (out / name).write_text("earlier")
    assert prepare(sources, out, *moment).returncode == -9, moment
    assert not (out / ".draft").exists(), moment
    left = contents(out) if out.exists() else {}
    earlier = dict.fromkeys(FILES, b"earlier") if over_earlier else {}
    for name, content in left.items():
        assert content in (complete[name], earlier.get(name)), (moment, name)
    if out.exists():
        finish_swap(out)  # as whatever reads pairs.parquet does
        assert contents(out) in ({}, earlier, complete), moment
    assert prepare(sources, out).returncode == 0
    assert contents(out) == complete
    assert {path.name for path in out.iterdir()} == set(FILES)
    return sum(content == complete[name] for name, content in left.items())


def test_killed_between_two_renames_and_repeated(sources, undisturbed, tmp_path):
    complete, _, moves = undisturbed
    new = killed_and_repeated(
        sources, tmp_path / "out", complete, ("move", moves - 1), over_earlier=True
    )
    assert new > 0


def test_of_two_preparations_at_once_one_wins_and_the_other_says_so(sources, undisturbed, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "medft.cli", "data", "prepare", str(sources), "--out", str(out)]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / ".draft").exists():
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # so that it is still there, however slow the second is
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert second.returncode == 2
    assert second.stderr.count("medft: error: ") == 1
    assert "expected no other process that writes" in second.stderr
    assert contents(out) == undisturbed[0]
    assert {path.name for path in out.iterdir()} == set(FILES)


@pytest.mark.proof
def test_killed_at_any_moment_and_repeated(sources, undisturbed, tmp_path):
    complete, things, moves = undisturbed
    early = [("any", 1 + things * i // 12) for i in range(11)]
    late = [("move", 1 + i) for i in range(moves)]
    assert len(early) + len(late) >= 20
    seen = set()
    for number, moment in enumerate([*early, *late]):
        out = tmp_path / f"out{number}"
        seen.add(killed_and_repeated(sources, out, complete, moment, over_earlier=number % 2 == 1))
        shutil.rmtree(out)
    assert seen == {0, 1, 2, 3, 4}  # killed between the renames too


@pytest.mark.proof
@pytest.mark.parametrize("number", range(20))
def test_a_worker_killed_at_any_moment_ends_the_command_and_leaves_what_was_there(
    sources, tmp_path, number
):
    out = tmp_path / "out"
    earlier = {}
    if number % 2:
        out.mkdir()
        earlier = {name: b"earlier" for name in FILES}
        for name, content in earlier.items():
            (out / name).write_bytes(content)
    done = prepare(sources, out, "worker", 3 + 37 * number)
    assert done.returncode == 2
    [sentence] = [line for line in done.stderr.splitlines() if "medft: error: " in line]
    assert "one was stopped" in sentence
    assert number < 2 or " while it read row" in sentence
    assert not out.exists() or contents(out) == earlier
    assert not (out / ".draft").exists()


def in_its_midst(sources, out, **options):
    """A command whose workers have begun."""
    words = ["data", "prepare", str(sources), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "medft.cli", *words], **options)
    while not list(out.glob(".draft/images-*")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def interrupted(sources, out, *signals, to_group):
    """The exit code and the errors of a command that gets signals in its midst."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = in_its_midst(sources, out, start_new_session=True, **pipes)
    for number in signals:
        (os.killpg if to_group else os.kill)(process.pid, number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=30)
    wait_for_the_end_of(process.pid)
    return process.returncode, errors


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_interrupts_end_the_command_and_its_processes_without_a_word(
    sources, tmp_path, count, to_group
):
    out = tmp_path / "out"
    code, errors = interrupted(sources, out, *[signal.SIGINT] * count, to_group=to_group)
    assert code in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    assert not (out / ".draft").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_a_terminal_that_is_closed_leaves_no_draft(sources, tmp_path, number):
    out = tmp_path / "out"
    code, _ = interrupted(sources, out, number, to_group=True)
    assert code == -number
    assert not (out / ".draft").exists()


def test_the_workers_of_a_killed_run_end_with_it_and_free_the_folder(sources, tmp_path):
    out = tmp_path / "out"
    process = in_its_midst(sources, out, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.kill()
    process.communicate(timeout=30)  # the workers hold its output open
    assert prepare(sources, out).returncode == 0
