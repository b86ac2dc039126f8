"""Runs that are killed at every kind of moment, and started again by the same words."""

import json
import signal
import subprocess
import sys
import time
from itertools import cycle, product

import psutil
import pytest
import yaml
from stopped_runs import ROOT, SIGNALLED, STEPS, complete, listen, record_of, results

pytestmark = pytest.mark.proof
MOMENTS = ["first second", "loading", "1", "7", "evaluation:5", "checkpoint:8", "best_model"]
SIGNALS = ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]
KILLS = [
    (kind, processes, name, moment)
    for (kind, processes, name), moment in zip(
        product(["decoder", "siglip"], [1, 2], SIGNALS * 2), cycle(MOMENTS), strict=False
    )
]


@pytest.fixture(scope="module")
def recipe_of(sections, tmp_path_factory):
    """Write a recipe of a kind that starts and goes on by the same words; gives its file."""

    def write(kind):
        folder = tmp_path_factory.mktemp("killed")
        recipe = sections(kind)
        recipe["lora"]["dropout"] = 0.1
        recipe["train"] |= {"output_dir": str(folder / "run"), **STEPS}
        recipe["train"]["resume_from_checkpoint"] = "auto"
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


def start(kind, processes, file, name="SIGTERM", moment="never"):
    """Start a run that gets a signal at a moment, its processes as those of `medft train`."""
    words = [str(SIGNALLED), name, moment, kind, str(file)]
    command = [sys.executable, *words]
    if processes > 1:
        options = ["--standalone", f"--nproc_per_node={processes}", *words]
        code = (
            "import os, sys; from medft.training.launch import supervised; "
            f"sys.exit(supervised('torch.distributed.run', {options!r}, dict(os.environ)))"
        )
        command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=listen,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(recipe_of):
    """Results of runs that nobody disturbs, made once."""
    found = {}

    def run(kind, processes):
        if (kind, processes) not in found:
            file = recipe_of(kind)
            process = start(kind, processes, file)
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            found[kind, processes] = results(file.parent / "run")
        return found[kind, processes]

    return run


@pytest.mark.parametrize(("kind", "processes", "name", "moment"), KILLS)
def test_a_run_that_is_killed_goes_on_bit_for_bit(
    undisturbed, recipe_of, record_property, kind, processes, name, moment
):
    expected = undisturbed(kind, processes)
    file = recipe_of(kind)
    run, number = file.parent / "run", getattr(signal, name)
    process = start(kind, processes, file, name, moment)
    if moment == "first second":
        time.sleep(1)
        process.send_signal(number)
    _, errors = process.communicate()
    kept = complete(run)
    status = record_of(run)["status"] if (run / "run.json").exists() else None
    record_property("exit code", process.returncode)
    record_property("checkpoints kept", kept)
    record_property("status", status)
    assert process.returncode in (-number, 128 + number), errors
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert status in (None, "running")
    elif moment.isdecimal():
        assert (status, kept[-1]) == ("interrupted", int(moment))
    elif moment == "checkpoint:8":
        assert (status, kept) == ("interrupted", [4, 8])
    elif moment != "first second":
        assert status == "interrupted"
        assert kept == {"loading": [], "evaluation:5": [4, 5], "best_model": [4, 5]}[moment]
    while any(str(file) in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        time.sleep(0.2)  # the processes that a killed parent leaves save and end
    process = start(kind, processes, file)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert results(run) == expected
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
