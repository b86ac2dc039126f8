"""Signals end a training with a complete checkpoint, from which it goes on as if undisturbed."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from stopped_runs import ROOT, SIGNALLED, STEPS, complete, listen, record_of, results

TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(scope="module")
def recipe_of(sections, tmp_path_factory):
    """Write a recipe with dropout, checkpoints and evaluations; gives its file."""

    def write(kind, **train):
        folder = tmp_path_factory.mktemp("signalled")
        recipe = sections(kind)
        recipe["lora"]["dropout"] = 0.1
        recipe["train"] |= {"output_dir": str(folder / "run"), **STEPS, **train}
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


@pytest.fixture(scope="module")
def undisturbed(recipe_of, run_script):
    """Finished runs of one process, made once."""
    found = {}

    def run(kind):
        if kind not in found:
            file = recipe_of(kind)
            run_script(kind, file)
            found[kind] = file.parent / "run"
        return found[kind]

    return run


def finished(*command, launcher=()):
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=listen,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment", "kind", "kept"),
    [
        ("SIGINT", "9", "siglip", [4, 8, 9]),
        ("SIGHUP", "evaluation:5", "decoder", [4, 5]),
        ("SIGUSR1", "checkpoint:8", "siglip", [4, 8]),
        ("SIGTERM", "best_model", "decoder", [4, 5]),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_undisturbed(
    undisturbed, recipe_of, run_script, name, moment, kind, kept
):
    file = recipe_of(kind)
    run = file.parent / "run"
    stopped = finished(SIGNALLED, name, moment, kind, file)
    assert stopped.returncode == 128 + getattr(signal, name), stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stderr.count(f"stopped by {name} after step {kept[-1]} of 12: ") == 1
    assert f"{run}/checkpoint-{kept[-1]} is saved " in stopped.stderr
    assert record_of(run)["status"] == "interrupted"
    assert record_of(run)["steps_done"] == kept[-1]
    assert complete(run) == kept
    assert not (run / "adapter").exists()
    run_script(kind, file, "train.resume_from_checkpoint=true")
    assert results(run) == results(undisturbed(kind))
    assert complete(run) == sorted({4, 8, 12, *kept})


@pytest.mark.slow
def test_a_signal_while_the_model_is_loaded_ends_the_run_and_is_recorded(recipe_of):
    file = recipe_of("siglip")
    stopped = finished(SIGNALLED, "SIGTERM", "loading", "siglip", file)
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped by SIGTERM before the first step: start again with" in stopped.stderr
    assert record_of(file.parent / "run")["status"] == "interrupted"
    assert complete(file.parent / "run") == []


@pytest.mark.slow
def test_a_signal_while_the_result_is_written_waits_for_it(recipe_of):
    file = recipe_of("siglip")
    done = finished(SIGNALLED, "SIGTERM", "adapter", "siglip", file)
    run = file.parent / "run"
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("medft: SIGTERM: ") == 1
    assert done.stderr.splitlines()[-1].startswith(f"done: {run}/adapter")
    assert "stopped by" not in done.stderr
    assert (record_of(run)["status"], complete(run)) == ("completed", [4, 8, 12])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_unsaved(recipe_of):
    file = recipe_of("siglip")
    code = f"""
import os, runpy, signal, sys
from transformers import TrainerCallback, trainer
class Twice(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
trainer.DEFAULT_CALLBACKS.append(Twice)
names = runpy.run_path({str(ROOT / "recipes" / "siglip_lora.py")!r})
sys.exit(names["run_command"](names["main"], [{str(file)!r}]))
"""
    stopped = finished("-c", code)
    run = file.parent / "run"
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "stopped by SIGINT after step 6 of 12: at once, go on with" in stopped.stderr
    assert (record_of(run)["status"], complete(run)) == ("interrupted", [4])


@pytest.mark.slow
def test_one_process_that_is_stopped_stops_all_after_the_same_step(recipe_of):
    whole, file = recipe_of("decoder"), recipe_of("decoder")
    script = ROOT / "recipes" / "decoder_qlora.py"
    assert finished(script, whole, launcher=TWO).returncode == 0
    run = file.parent / "run"
    stopped = finished(SIGNALLED, "SIGUSR1@1", "7", "decoder", file, launcher=TWO)
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped by SIGUSR1 after step 7 of 12: ") == 1, stopped.stderr
    assert complete(run) == [4, 7]
    assert {p.name for p in (run / "checkpoint-7").glob("rng*")} == {
        f"rng_state_{r}.pth" for r in (0, 1)
    }
    again = finished(script, file, "train.resume_from_checkpoint=true", launcher=TWO)
    assert again.returncode == 0, again.stderr
    assert results(run) == results(whole.parent / "run")


@pytest.mark.slow
def test_medft_train_passes_signals_on_and_waits_for_the_save(recipe_of):
    file = recipe_of("siglip", max_steps=2000)
    run = file.parent / "run"
    words = ["-m", "medft.cli", "train", file, "--num-processes", "2"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, preexec_fn=listen,
    )  # fmt: skip
    while process.poll() is None and not complete(run):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # by which torch's agent would die
    output, _ = process.communicate()
    assert process.returncode == 138, output
    assert "Traceback" not in output
    assert output.count("stopped by SIGUSR1 after step ") == 1
    assert record_of(run)["steps_done"] == complete(run)[-1]


@pytest.mark.slow
def test_an_error_of_the_training_is_the_exit_code_of_medft_train(recipe_of):
    file = recipe_of("siglip")
    words = ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup_steps=0"]
    failed = finished("-m", "medft.cli", "train", file, *words)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("medft: error: expected every ") == 1


@pytest.fixture
def training(recipe_of):
    """`medft train` of a long run that has saved once; gives its process and run."""
    file = recipe_of("siglip", max_steps=2000)
    run = file.parent / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "medft.cli", "train", str(file)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    while process.poll() is None and not complete(run):
        time.sleep(0.05)
    return process, run


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_medft_train(training):
    process, _ = training
    [launcher] = psutil.Process(process.pid).children()
    for trains in launcher.children():
        trains.kill()
    _, errors = process.communicate()
    assert process.returncode == 137
    assert "Traceback" not in errors
    assert errors.count("medft: error: expected every process to train to the end, one was ") == 1


@pytest.mark.slow
def test_nobody_trains_on_unseen_where_medft_train_is_killed(training):
    process, run = training
    [launcher] = psutil.Process(process.pid).children()
    trains = launcher.children()
    process.kill()
    process.communicate()
    psutil.wait_procs([launcher, *trains])
    assert record_of(run)["status"] == "interrupted"
    assert record_of(run)["steps_done"] == complete(run)[-1]
