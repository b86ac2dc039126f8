"""Which signals stop a training, when, and which do not."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch

from medft.errors import Stopped
from medft.training.signals import PASSED_ON, STOPPING, StopSignals

CPU = torch.device("cpu")


@pytest.fixture
def signals(monkeypatch):
    """Signals that are listened to, whatever the process that runs the tests ignores."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    for name in ("TORCHELASTIC_RUN_ID", PASSED_ON):
        monkeypatch.delenv(name, raising=False)
    found = StopSignals()
    with found.listening():
        yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_at_once_where_nothing_is_trained(signals, number):
    with pytest.raises(Stopped) as stopped:
        send(number)
    assert (stopped.value.number, stopped.value.at_once) == (number, False)
    for again in (signal.SIGTERM, signal.SIGINT):
        send(again)  # what follows leaves the process the time to end
    with pytest.raises(Stopped), signals.deferred():
        pytest.fail("a library caught the first one, and training began")


@pytest.mark.parametrize("number", STOPPING)
def test_a_deferred_signal_stops_where_all_agree(signals, number, capfd):
    with signals.deferred():
        signals.raise_agreed(CPU)
        send(number)
        send(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            signals.raise_agreed(CPU)
    assert (stopped.value.number, stopped.value.at_once) == (number, False)
    assert capfd.readouterr().err.count(f"medft: {number.name}: saving after this step") == 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_stops_at_once(signals, first):
    with signals.deferred():
        send(first)
        with pytest.raises(Stopped) as stopped:
            send(signal.SIGINT)
        send(signal.SIGINT)  # impatience must not keep it from recording how it ended
    assert stopped.value.at_once


def test_a_ctrl_c_that_a_launcher_repeats_is_one(signals, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with signals.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)
        monkeypatch.setattr("medft.training.signals._SECONDS_OF_ONE", 0.0)
        with pytest.raises(Stopped) as stopped:
            send(signal.SIGINT)
    assert stopped.value.at_once


def test_a_second_ctrl_c_that_medft_train_passes_on_counts_at_once(signals, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv(PASSED_ON, "1")
    with signals.deferred():
        send(signal.SIGINT)
        with pytest.raises(Stopped) as stopped:
            send(signal.SIGINT)
    assert stopped.value.at_once


def test_what_was_ignored_before_stays_ignored_and_handlers_come_back(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopSignals().listening():
        send(signal.SIGHUP)
        with pytest.raises(Stopped):
            send(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_worker_is_left_to_its_process(signals):
    """A signal to all processes of a job must not end the workers before the last step is done."""

    def work():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        sys.exit(7)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 7
    with signals.deferred():
        signals.raise_agreed(CPU)


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving():
    code = (
        "import os, signal, torch; from medft.training.signals import StopSignals\n"
        "found = StopSignals()\n"
        "with found.listening(), found.deferred():\n"
        "    os.close(2); os.kill(os.getpid(), signal.SIGHUP)\n"
        "    try: found.raise_agreed(torch.device('cpu'))\n"
        "    except BaseException as stop: os._exit(100 + stop.number)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 101
