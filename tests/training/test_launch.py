"""What medft train does with its launcher's processes, wherever torch's agent has put them."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest

from medft.training import launch


@pytest.fixture
def supervised(tmp_path):
    """A launcher of two processes that handle no signal, supervised; gives both."""
    ranks = tmp_path / "ranks.py"
    ranks.write_text(
        "import os, signal, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        f"open(os.path.join({str(tmp_path)!r}, f'rank{{os.environ[\"RANK\"]}}'), 'w').close()\n"
        "time.sleep(300)\n"
    )
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from medft.training.launch import supervised; "
        f"words = ['--standalone', '--nproc_per_node=2', {str(ranks)!r}]; "
        "sys.exit(supervised('torch.distributed.run', words, dict(os.environ)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len([*tmp_path.glob("rank?")]) < 2:
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    yield process, below
    for each in below:
        if each.is_running():
            each.kill()
    process.kill()
    process.wait()


def wait_until(is_true):
    """Whether it becomes true within some seconds."""
    deadline = time.monotonic() + 20
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_true()


@pytest.mark.slow
def test_ctrl_z_stops_every_process_until_it_goes_on_and_ctrl_backslash_ends_them(supervised):
    process, below = supervised
    ranks = [each for each in below if os.getsid(each.pid) == each.pid]
    assert len(ranks) == 2  # no signal to the launcher's group reaches them
    process.send_signal(signal.SIGTSTP)
    every = [psutil.Process(process.pid), *below]
    assert wait_until(lambda: {each.status() for each in every} == {psutil.STATUS_STOPPED})
    process.send_signal(signal.SIGCONT)
    assert wait_until(lambda: psutil.STATUS_STOPPED not in {each.status() for each in every})
    process.send_signal(signal.SIGQUIT)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGQUIT
    assert errors.count("one was ended by SIGKILL: go on with") == 1
    assert "Traceback" not in errors
    assert not psutil.wait_procs(below, timeout=20)[1]


@pytest.mark.slow
def test_processes_that_do_not_end_by_a_second_ctrl_c_are_killed(supervised):
    process, below = supervised
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.count("one was ended by SIGKILL: go on with") == 1  # not for want of memory
    assert not psutil.wait_procs(below, timeout=20)[1]


@pytest.mark.parametrize(
    ("processes", "machine", "port"),
    [(1, {}, None), (2, {}, "0"), (2, {"main-process-port": 29501}, "29501")],
)
def test_trainings_of_one_machine_have_ports_of_their_own_and_debug_reaches_them(
    sections, write_recipe, monkeypatch, processes, machine, port
):
    started = []
    monkeypatch.setattr(launch, "supervised", lambda module, words, _: started.append(words) or 0)
    recipe = write_recipe(sections("siglip"))
    launch.train(recipe, [], None, num_processes=processes, machine=machine, debug=True)
    launch.train(recipe, [], None, num_processes=processes, machine=machine)
    with_debug, without = started
    assert with_debug == [*without, "--debug"]
    ports = [b for a, b in pairwise(without) if a == "--main-process-port"]
    assert ports == ([port] if port else [])


@pytest.mark.slow
@pytest.mark.parametrize(("code", "is_signal"), [(0, False), (3, False), (255, False), (137, True)])
def test_an_exit_code_of_a_script_is_its_own_and_no_signals(tmp_path, capsys, code, is_signal):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.exit({code})")
    words = ["--standalone", "--nproc_per_node=1", str(script)]
    assert launch.supervised("torch.distributed.run", words, os.environ) == code
    assert ("one was ended by SIGKILL" in capsys.readouterr().err) == is_signal
