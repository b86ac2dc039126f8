"""Runs a command on hostile input in a child of its own: no traceback, no hang, bounded memory."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass

MEDFT = [sys.executable, "-m", "medft.cli"]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str
    peak: int
    """Bytes of resident memory at the peak, of the command alone (not of its workers)."""

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
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [*command, *map(str, words)],
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
        child.stdin.write(stdin.encode())
        child.stdin.close()
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        outcome = Outcome(child.returncode, out.read(), err.read(), usage.ru_maxrss * 1024)
    assert not hung.is_set(), f"no end within {timeout} s: {outcome.err}"
    assert "Traceback" not in outcome.err, outcome.err
    return outcome
