"""Runs a command on hostile input in a child of its own: no traceback, no hang, bounded memory."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass

MEDFT = [sys.executable, "-m", "medft.cli"]

MEASURED = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, file=file)
"""
"""Runs a command and writes its exit code and peak of memory, which a process takes over from the
one that starts it: the tests', which holds torch."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str
    peak: int
    """Bytes of resident memory at the peak, of the largest of its processes."""

    @property
    def sentences(self):
        """The errors that it wrote."""
        marker = "medft: error: "
        return [x.removeprefix(marker) for x in self.err.splitlines() if x.startswith(marker)]


def run_hostile(words, *, command=MEDFT, timeout=120, stdin="", **environment):
    """Run a command to its end; its whole process group is killed after `timeout` seconds.

    A traceback and a hang fail the test that called this.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.NamedTemporaryFile("r") as measured,
    ):
        child = subprocess.Popen(
            [sys.executable, "-c", MEASURED, measured.name, *command, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=env,
            start_new_session=True,
        )
        hung = threading.Event()

        def kill():
            hung.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        child.communicate(stdin.encode())
        timer.cancel()
        out.seek(0)
        err.seek(0)
        code, peak = map(int, measured.read().split() or (-9, 0))
        outcome = Outcome(code, out.read(), err.read(), peak)
    assert not hung.is_set(), f"no end within {timeout} s: {outcome.err}"
    assert "Traceback" not in outcome.err, outcome.err
    return outcome
