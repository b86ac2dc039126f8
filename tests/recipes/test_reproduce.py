"""`medft reproduce` of whole runs, on one and two processes: what is equal, and what is said."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medft.training.compare_runs import compare_weights

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}
SIGNALLED = Path(__file__).parent / "signalled.py"
NF4 = "quantization={bits: 4}"
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
NEWER_PEFT = """
from peft import LoraConfig
original = LoraConfig.__init__
def changed(self, *words, use_rslora=True, **fields):
    original(self, *words, use_rslora=use_rslora, **fields)
changed.__wrapped__ = original
LoraConfig.__init__ = changed
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def environment(cache):
    """Of the processes that these tests start."""
    return {**os.environ, "MEDFT_CACHE": str(cache), "MEDFT_THREADS": "1"}


@pytest.fixture
def train(sections, tmp_path, environment):
    """Train 6 steps under a launcher, with validation every 3; gives the run."""

    def start(kind, *changes, launcher=(), script=None):
        recipe = sections(kind)
        run = tmp_path / "run"
        recipe["train"] |= {"output_dir": str(run), "max_steps": 6, "save_steps": 2}
        recipe["train"] |= {"eval_strategy": "steps", "eval_steps": 3}
        if kind == "siglip":
            recipe["train"]["gradient_accumulation_steps"] = 2
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        words = ["-m", *launcher] if launcher else []
        command = [sys.executable, *words, *(script or [ROOT / "recipes" / SCRIPTS[kind]])]
        command += [file, *changes]
        done = subprocess.run(
            [*map(str, command)],
            capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or script, done.stdout + done.stderr
        return run

    return start


@pytest.fixture
def again(environment):
    """Run `medft reproduce`; gives its exit code, reproduce.json and output."""

    def start(run, *words, **variables):
        before = contents(run)
        command = [sys.executable, "-m", "medft.cli", "reproduce", str(run), *map(str, words)]
        done = subprocess.run(
            command,
            capture_output=True, text=True, env={**environment, **variables}, check=False,
        )  # fmt: skip
        assert contents(run) == before  # nothing of the run is ever written
        file = run.parent / f"{run.name}-reproduced" / "reproduce.json"
        result = json.loads(file.read_text()) if file.is_file() else None
        return done.returncode, result, done.stdout + done.stderr

    return start


def contents(run):
    """Hash and time of every file of a run."""
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file()
    }


def launcher_of(tmp_path, strategy):
    """What starts two processes on the CPU."""
    if strategy == "ddp":
        return TORCHRUN
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{strategy}.yaml").read_text())
    file = tmp_path / f"{strategy}.yaml"
    file.write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2}))
    return ["accelerate.commands.launch", "--config_file", str(file)]


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "changes", "strategy"),
    [
        pytest.param("decoder", [], "single", marks=pytest.mark.proof),
        ("decoder", [NF4], "single"),
        pytest.param("siglip", [], "single", marks=pytest.mark.proof),
        pytest.param("decoder", [], "ddp", marks=pytest.mark.proof),
        pytest.param("decoder", [NF4], "ddp", marks=pytest.mark.proof),
        ("siglip", [], "ddp"),
        pytest.param("decoder", [], "zero2", marks=pytest.mark.proof),
        pytest.param("decoder", [], "zero3", marks=pytest.mark.proof),
        pytest.param("decoder", ["lora=null", "train.learning_rate=1e-4"], "single",
                     marks=pytest.mark.proof),
    ],
)  # fmt: skip
def test_a_run_is_identical_when_it_is_repeated(train, again, tmp_path, kind, changes, strategy):
    launcher = [] if strategy == "single" else launcher_of(tmp_path, strategy)
    run = train(kind, *changes, launcher=launcher)
    code, result, said = again(run)
    assert (code, result["differs"]) == (0, []), said
    assert result["identical_adapter"]
    assert result["first_different_step"] is None
    assert "identical: " in said
    launches = [
        json.loads((folder / "run.json").read_text())["launch"]
        for folder in (run, tmp_path / "run-reproduced" / "run")
    ]
    for name in ("strategy", "processes", "threads"):
        assert launches[0][name] == launches[1][name]
    assert launches[0]["strategy"] == strategy


def test_a_resumed_run_is_repeated_without_its_stop(train, again, tmp_path):
    script = [SIGNALLED, "SIGTERM", "3", "decoder"]
    # a checkpoint between two log entries: the next mean reaches back to the stop only
    run = train("decoder", "train.logging_steps=2", script=script)
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    code, result, said = again(run)
    assert (code, result) == (2, None)
    assert "its status is interrupted: resume it" in said
    run = train("decoder", "train.logging_steps=2", "train.resume_from_checkpoint=true")
    record = json.loads((run / "run.json").read_text())
    assert [part["from_step"] for part in record["parts"]] == [0, 3]
    code, result, said = again(run)
    assert (code, result["differs"]) == (0, []), said
    # the entry that was left out did differ
    steps = [
        {entry["step"]: entry for entry in json.loads(file.read_text()) if "loss" in entry}
        for file in (run / "log_history.json", tmp_path / "run-reproduced/run/log_history.json")
    ]
    assert steps[0][4]["loss"] != steps[1][4]["loss"]
    assert steps[0][6]["loss"] == steps[1][6]["loss"]


def test_what_was_changed_afterwards_is_found_at_its_step(train, again, tmp_path):
    run = train("decoder")
    out = tmp_path / "run-reproduced"
    # the log of the run itself
    file = run / "log_history.json"
    untouched = file.read_text()
    edit(file, lambda log: log[4].update(grad_norm=log[4]["grad_norm"] + 1e-9))
    step = json.loads(file.read_text())[4]["step"]
    code, result, said = again(run)
    assert (code, result["first_different_step"], result["identical_adapter"]) == (1, step, True)
    assert [entry["what"] for entry in result["differs"]] == ["log_history.grad_norm"]
    assert f"different: step {step} of the log first" in said
    file.write_text(untouched)
    # a library of another default would train this: the record says otherwise and is used
    shutil.rmtree(out)
    record = (run / "run.json").read_text()
    edit(run / "run.json", lambda r: r["resolved"]["arguments"].update(learning_rate=9e-3))
    code, result, said = again(run)
    assert code == 1
    assert result["applied"] == [
        "SFTConfig.learning_rate would be 0.01 now and was 0.009, which is used"
    ]
    # the first step of the warm-up has a rate of 0
    assert (result["first_different_step"], result["identical_adapter"]) == (2, False)
    (adapter,) = (entry for entry in result["differs"] if entry["what"] == "adapter")
    assert adapter["max_difference"] > 0
    (run / "run.json").write_text(record)
    # other threads: said, and run with
    shutil.rmtree(out)
    code, result, said = again(run, MEDFT_THREADS="2")
    assert "differs: threads was 1 and is 2" in said
    assert "expected: numerically close" in said
    assert json.loads((out / "run" / "run.json").read_text())["launch"]["threads"] == 2
    assert code == (0 if result["identical_adapter"] and not result["differs"] else 1)


@pytest.mark.proof
def test_a_library_of_another_default_trains_what_was_recorded(train, again, tmp_path, environment):
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "sitecustomize.py").write_text(NEWER_PEFT)
    run = train("decoder")
    path = os.pathsep.join([str(tmp_path / "newer"), str(ROOT)])
    code, result, said = again(run, PYTHONPATH=path)
    assert (code, result["differs"]) == (0, []), said
    sentence = "LoraConfig.use_rslora would be True now and was False, which is used"
    assert result["applied"] == [sentence]
    assert f"applied: {sentence}" in said
    # the same library without the record
    words = [ROOT / "recipes" / "decoder_qlora.py", run / "recipe.yaml"]
    subprocess.run(
        [*map(str, [sys.executable, *words, f"train.output_dir={tmp_path / 'other'}"])],
        env={**environment, "PYTHONPATH": path}, capture_output=True, check=True,
    )  # fmt: skip
    (found,) = compare_weights("adapter", run / "adapter", tmp_path / "other" / "adapter")
    assert found["max_difference"] > 1e-3


def test_changed_data_and_base_are_refused_before_training(
    sections, train, again, tmp_path, data, bases
):
    chat, base = tmp_path / "chat", tmp_path / "base"
    shutil.copytree(data / "chat", chat)
    shutil.copytree(bases / "decoder", base)
    changes = [f"data.train={chat / 'train.jsonl'}", f"model.base={base}"]
    run = train("decoder", *changes)
    rows = (chat / "train.jsonl").read_text()
    (chat / "train.jsonl").write_text(rows.replace("erosion", "Erosion"))
    assert rows != (chat / "train.jsonl").read_text()
    code, result, said = again(run)
    assert (code, result) == (2, None)
    assert said.count("medft: error: expected the 31 rows of data.train") == 1
    (chat / "train.jsonl").write_text(rows)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**config, "top_k": 3}))
    code, result, said = again(run)
    assert (code, result) == (2, None)
    assert f"expected model.base {base} as the run was trained on it, sha256 was" in said
    assert not (tmp_path / "run-reproduced").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_repetition_that_is_stopped_is_left_as_it_is(train, environment, tmp_path, name, code):
    run = train("decoder", "train.max_steps=200", script=[SIGNALLED, "SIGTERM", "1", "decoder"])
    edit(run / "run.json", lambda record: record.update(status="completed"))
    (run / "adapter").mkdir()
    before = contents(run)
    out = tmp_path / "other"
    process = subprocess.Popen(
        [sys.executable, "-m", "medft.cli", "reproduce", str(run), "--out", str(out)],
        env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (out / "run" / "log_history.json").is_file() and process.poll() is None:
        time.sleep(0.2)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == code, said
    assert f"{out} is left as it is, remove it before the next try" in said
    assert not (out / "reproduce.json").exists()
    assert json.loads((out / "run" / "run.json").read_text())["status"] == "interrupted"
    assert contents(run) == before
