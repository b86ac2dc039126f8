"""The process of its own in which compressed frames are decoded."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from medft.data.decoder_process import decode_apart
from medft.data.tables import Rejected


def alive(process):
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_crash_of_a_decoder_is_a_rejection_and_the_next_frame_is_decoded():
    own = decode_apart(os.getpid)
    assert own not in (os.getpid(), None)
    with pytest.raises(Rejected, match="its decoder crashed"):
        decode_apart(signal.raise_signal, signal.SIGKILL)
    after = decode_apart(os.getpid)
    assert after != own
    assert decode_apart(os.getpid) == after
    assert not alive(own)


def test_an_exception_comes_back_with_its_message():
    with pytest.raises(RuntimeError, match="invalid literal"):
        decode_apart(int, "seven")
    with pytest.raises(RuntimeError, match="MemoryError"):
        decode_apart(bytearray, 2**62)
    assert decode_apart(int, "7") == 7


def test_what_a_decoder_prints_does_not_reach_the_terminal(capfd):
    decode_apart(os.write, 2, b"Unsupported JPEG data precision 12\n")
    decode_apart(os.write, 1, b"Marker handler function failed\n")
    assert capfd.readouterr() == ("", "")


def test_a_forked_process_has_a_decoder_of_its_own():
    own = decode_apart(os.getpid)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=lambda: found.put(decode_apart(os.getpid)))
    child.start()
    assert found.get(timeout=20) != own
    child.join()
    assert decode_apart(os.getpid) == own


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_the_decoder_ends_with_its_process_however_that_ends(stop):
    code = (
        "import os, time; from medft.data.decoder_process import decode_apart;"
        "print(decode_apart(os.getpid), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        decoder = int(process.stdout.readline())
        assert alive(decoder)
        process.send_signal(stop)
    end = time.monotonic() + 10
    while alive(decoder) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(decoder)


def test_a_process_that_ends_by_itself_is_not_held_up():
    code = "import os; from medft.data.decoder_process import decode_apart; decode_apart(os.getpid)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
