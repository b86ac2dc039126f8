"""One run at a time has a run directory, and a run that has ended keeps nobody out."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from medft.errors import RunError
from medft.training import run_lock
from medft.training.run_lock import LOCK_FILE, Holder, RunLock, refuse_visible_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory that is not there yet; what is watched is watched for a moment."""
    for name, seconds in (("HEARTBEAT", 0.05), ("WATCH", 0.4), ("LOOK", 0.02), ("MOMENT", 0.1)):
        monkeypatch.setattr(run_lock, name, seconds)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path / "runs" / "mine"


@pytest.fixture
def dead():
    """A process of this machine that has ended, as a holder."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return Holder.this_process().model_copy(update={"pid": ended.pid, "begun": "1"})


def write(run, holder, **changes):
    """Put a lock into a run directory."""
    run.mkdir(parents=True, exist_ok=True)
    content = holder.model_copy(update=changes).model_dump_json()
    (run / LOCK_FILE).write_text(content)
    return content


def test_a_lock_is_held_until_it_is_closed_and_leaves_nothing(run, tmp_path):
    first, second = RunLock(run), RunLock(run)
    first.take()
    holder = json.loads((run / LOCK_FILE).read_text())
    assert holder["pid"] == os.getpid()
    with pytest.raises(RunError) as refused:
        second.take()
    assert str(refused.value) == (
        f"expected no other run in {run}, process {os.getpid()} on {holder['host']} has trained "
        f"there since {holder['started']}: wait for it or stop it, or choose another "
        f"train.output_dir"
    )
    assert (run / LOCK_FILE).exists()
    second.close()
    assert not first.lost
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        refuse_visible_run(run)
    first.close()
    assert list(tmp_path.iterdir()) == []
    refuse_visible_run(run)
    RunLock(run).close()  # of one that was never held
    assert list(tmp_path.iterdir()) == []


def test_folders_stay_that_hold_something_or_were_there(run, tmp_path):
    (tmp_path / "runs").mkdir()
    lock = RunLock(run)
    lock.take()
    lock.close()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    lock = RunLock(run)
    lock.take()
    (run / "run.json").write_text("{}")
    lock.close()
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_the_lock_of_a_process_that_ended_is_taken_over(run, dead):
    write(run, dead)
    inode = (run / LOCK_FILE).stat().st_ino
    refuse_visible_run(run)
    lock = RunLock(run)
    lock.take()
    assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (run / LOCK_FILE).stat().st_ino == inode
    lock.close()
    assert not (run / LOCK_FILE).exists()


def test_a_number_that_another_process_has_now_holds_nothing(run):
    write(run, Holder.this_process(), begun="1", pid=os.getpid())
    refuse_visible_run(run)
    lock = RunLock(run)
    lock.take()
    lock.close()


def test_a_process_that_ended_and_whose_parent_took_no_note_holds_nothing(run):
    code = "import os; print(open('/proc/self/stat').read().rpartition(')')[2].split()[19])"
    ended = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    begun = ended.stdout.read().strip()
    deadline = time.monotonic() + 5
    while run_lock._begun(ended.pid) != "" and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ended.pid, 0)  # it has its number still
    write(run, Holder.this_process(), pid=ended.pid, begun=begun)
    lock = RunLock(run)
    lock.take()
    lock.close()
    ended.wait()


ELSEWHERE = [{"host": "node7"}, {"boot": "x"}, {"namespace": "pid:[1]"}]


@pytest.mark.parametrize("place", ELSEWHERE, ids=str)
def test_a_lock_from_elsewhere_is_watched_until_it_is_renewed_or_not(run, place, caplog):
    content = write(run, Holder.this_process(), job="5", **place)
    lock = RunLock(run)
    renewing, renewed = threading.Event(), threading.Event()

    def renew():
        while not renewing.wait(0.05):
            os.utime(run / LOCK_FILE)
            renewed.set()

    thread = threading.Thread(target=renew)
    thread.start()
    renewed.wait()
    began = time.monotonic()
    with pytest.raises(RunError, match=r"on \S+ \(Slurm job 5\) has trained there since"):
        lock.take()
    assert time.monotonic() - began < run_lock.WATCH  # at the first renewal
    renewing.set()
    thread.join()
    assert (run / LOCK_FILE).read_text() == content
    refuse_visible_run(run)  # which cannot know
    with caplog.at_level(logging.INFO, logger="medft"):
        lock.take()
    assert "watching for up to 0.4 s whether it still runs" in caplog.text
    assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.close()


def test_no_clock_is_asked_how_old_a_lock_is(run):
    """A host whose clock is a day ahead, and one whose clock is a year behind."""
    for shift in (86_400, -31_536_000):
        write(run, Holder.this_process(), host="node7")
        stopped, renewed = threading.Event(), threading.Event()

        def renew(shift=shift, stopped=stopped, renewed=renewed):
            beat = 0
            while not stopped.wait(0.05):
                beat += 1
                os.utime(run / LOCK_FILE, (0, time.time() + shift + beat))
                renewed.set()

        thread = threading.Thread(target=renew)
        thread.start()
        renewed.wait()
        with pytest.raises(RunError, match="on node7 has trained"):
            RunLock(run).take()
        stopped.set()
        thread.join()


def test_a_requeued_job_takes_its_own_lock_at_once(run, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(run, Holder.this_process(), host="node7", job="77")
    lock = RunLock(run)
    with caplog.at_level(logging.INFO, logger="medft"):
        lock.take()
    lock.close()
    assert not caplog.text
    write(run, Holder.this_process(), host="node7", job="78")
    lock = RunLock(run)
    with caplog.at_level(logging.INFO, logger="medft"):
        lock.take()
    assert "watching" in caplog.text
    lock.close()
    # two starts of one job on one host see each other
    first = RunLock(run)
    first.take()
    with pytest.raises(RunError, match=r"\(Slurm job 77\) has trained"):
        RunLock(run).take()
    first.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": -1, "host": "a"}'])
def test_a_lock_that_names_nobody_is_watched(run, content):
    run.mkdir(parents=True)
    (run / LOCK_FILE).write_text(content)
    refuse_visible_run(run)
    lock = RunLock(run)
    lock.take()
    assert not lock.lost
    lock.close()


def test_a_lock_that_is_being_written_is_read_again(run):
    run.mkdir(parents=True)
    (run / LOCK_FILE).write_text("")
    content = Holder.this_process().model_dump_json()
    timer = threading.Timer(0.03, (run / LOCK_FILE).write_text, [content])
    timer.start()
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        RunLock(run).take()
    timer.join()


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "pipe"])
def test_nothing_is_written_through_what_is_no_lock(run, tmp_path, kind):
    run.mkdir(parents=True)
    (tmp_path / "thesis").write_text("years")
    lock = run / LOCK_FILE
    {
        "link": lambda: lock.symlink_to(tmp_path / "thesis"),
        "dangling": lambda: lock.symlink_to("nowhere"),
        "hard link": lambda: os.link(tmp_path / "thesis", lock),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(RunError, match=rf"expected to write {lock}, by which other runs know"):
        RunLock(run).take()
    assert (tmp_path / "thesis").read_text() == "years"
    assert os.path.lexists(lock)


def test_a_lock_that_was_taken_over_is_lost_and_left_alone(run, dead, caplog):
    lock = RunLock(run)
    lock.take()
    thread = lock._thread
    other = write(run, dead, host="node7")
    assert lock.lost
    thread.join(5)
    assert not thread.is_alive()
    assert "is not this run's any more" in caplog.text
    lock.close()
    assert (run / LOCK_FILE).read_text() == other
    (run / LOCK_FILE).unlink()
    lock = RunLock(run)
    lock.take()
    (run / LOCK_FILE).unlink()
    assert lock.lost
    lock.close()


def test_a_held_lock_is_renewed(run):
    lock = RunLock(run)
    lock.take()
    before = (run / LOCK_FILE).stat().st_mtime_ns
    while (run / LOCK_FILE).stat().st_mtime_ns == before:
        time.sleep(0.01)
    lock.close()


def test_a_forked_worker_neither_renews_nor_gives_up_its_parents_lock(run, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 60)
    with contextlib.closing(RunLock(run)) as lock:
        lock.take()
        before = (run / LOCK_FILE).stat()
        child = multiprocessing.get_context("fork").Process(target=lock.close)
        child.start()
        child.join()
        assert child.exitcode == 0
        after = (run / LOCK_FILE).stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert not lock.lost
    assert not run.exists()


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*words, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(RunError, match=r"it cannot be \(No space left on device\): make room"):
        RunLock(run).take()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_start_took_while_it_was_judged_is_not_taken(run, dead, monkeypatch):
    write(run, dead)
    judge, other = run_lock._check_stale, Holder.this_process()

    def slow(path, seen):
        judge(path, seen)
        write(run, other)

    monkeypatch.setattr(run_lock, "_check_stale", slow)
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        RunLock(run).take()
    assert Holder.named_in((run / LOCK_FILE).read_bytes()) == other


def test_of_two_that_wrote_a_lock_where_files_cannot_be_locked_the_last_has_it(
    run, dead, monkeypatch
):
    write(run, dead)
    other, pause = Holder.this_process(), time.sleep

    def written_over(seconds):
        write(run, other)
        pause(seconds)

    monkeypatch.setattr(time, "sleep", written_over)
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        RunLock(run).take()
    assert Holder.named_in((run / LOCK_FILE).read_bytes()) == other


def start(run, barrier, results, enough):
    lock = RunLock(run)
    barrier.wait()
    try:
        lock.take()
    except RunError as error:
        results.put(str(error))
        return
    results.put("won")
    enough.wait()
    lock.close()


@pytest.mark.parametrize("before", ["nothing", "dead", "elsewhere"])
def test_of_starts_at_one_time_exactly_one_wins(run, dead, before):
    context, own = multiprocessing.get_context("fork"), Holder.this_process().host
    for _ in range(4):
        if before != "nothing":
            write(run, dead, **({"host": "node7"} if before == "elsewhere" else {}))
        barrier, results, enough = context.Barrier(5), context.Queue(), context.Event()
        words = (run, barrier, results, enough)
        starts = [context.Process(target=start, args=words) for _ in range(5)]
        for process in starts:
            process.start()
        outcomes = [results.get(timeout=30) for _ in starts]
        enough.set()
        for process in starts:
            process.join()
        assert outcomes.count("won") == 1, outcomes
        here = rf"expected no other run in .*, process \d+ on {re.escape(own)} has trained"
        assert sum(bool(re.match(here, text)) for text in outcomes) == 4, outcomes
        assert not (run / LOCK_FILE).exists()
