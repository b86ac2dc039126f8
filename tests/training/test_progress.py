"""What a training shows: one line at its start, one a log entry, one at its end."""

import re
import shlex
from types import SimpleNamespace

import datasets
import pytest
from straight_line import Line, Squares
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.utils import logging as hub_logging

from medft.models.saved import RunLayout
from medft.training.arguments import batch_arithmetic
from medft.training.process import process_setup
from medft.training.progress import LinesCallback, last_line, log_line, show_training


def state(step, **fields):
    return TrainerState(global_step=step, max_steps=165, **fields)


def test_a_line_begins_with_what_says_most_and_has_numbers():
    logs = {
        "grad_norm": 1.23456, "learning_rate": 0.000123456, "rows_per_second": 12345.6, "epoch": 1,
        "loss": 2.30711, "num_tokens": 9.0, "perplexity": 10.0454,
    }  # fmt: skip
    assert log_line(logs, state(20), best_by="loss", seconds_left=250.4) == (
        "step 20/165 (12 %), 0:04:10 left: loss 2.307, perplexity 10.05, grad_norm 1.235, "
        "learning_rate 0.0001235, rows_per_second 12346"
    )


def test_the_line_of_an_evaluation_begins_with_the_metric_that_chooses():
    logs = {
        "eval_loss": 6.358, "eval_image_to_text_recall@10": 0.9, "eval_pool": 5,
        "eval_text_to_image_recall@10": 0.8, "eval_runtime": 0.5, "epoch": 1.0,
    }  # fmt: skip
    line = log_line(logs, state(0), best_by="text_to_image_recall@10", seconds_left=None)
    assert line == ("step 0/165 (0 %), evaluation: text_to_image_recall@10 0.8, loss 6.358, pool 5")


def test_what_stands_above_the_floor_is_the_loss_again_where_that_is_zero():
    for floor in (0.0, 0.5):
        logs = {"loss": 2.0, "floor": floor, "excess": 2.0 - floor, "learning_rate": 1e-3}
        line = log_line(logs, state(5), best_by="", seconds_left=None)
        assert ("excess 1.5" in line) == (floor > 0) == ("excess" in line)


def trained(tmp_path, *callbacks, disable_tqdm=True, resume=None):
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, per_device_train_batch_size=1, logging_steps=5,
        num_train_epochs=1, eval_strategy="steps", eval_steps=10, save_steps=10,
        disable_tqdm=disable_tqdm,
    )  # fmt: skip
    model = Line()
    model.config = SimpleNamespace(model_type="line", to_json_string=str, to_dict=dict)
    trainer = Trainer(model, arguments, train_dataset=Squares(20), eval_dataset=Squares(2))
    show_training(trainer, batch_arithmetic(20, arguments), "Ctrl-C ends it")
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_entry_is_said_once_and_nothing_by_trainer(
    tmp_path, caplog, capfd, monkeypatch, is_terminal
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the setup of a command's process has it
    caplog.set_level("INFO", logger="medft")
    trainer = trained(tmp_path, disable_tqdm=not is_terminal)
    first, *lines = caplog.messages
    assert first == (
        "training every weight of a line: 20 steps in 1 epoch, 1 row a step (1 per device x 1 "
        "accumulation x 1 process) on cpu; checkpoints and evaluations: steps 10 and 20, the end; "
        "Ctrl-C ends it"
    )
    starts = [line.partition(" (")[0] for line in lines]
    assert starts == [f"step {step}/20" for step in (5, 10, 10, 15, 20, 20)]
    assert len(lines) == len(trainer.state.log_history) - 1  # the totals have none
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "{'" not in printed.err
    assert ("20/20" in printed.err) == is_terminal


def test_trainer_alone_prints_every_entry(tmp_path, capfd):
    for kind in (PrinterCallback, ProgressCallback):
        kind().on_train_begin(None, state(0, is_world_process_zero=True), None)
        shown = kind()
        if kind is ProgressCallback:
            shown.on_train_begin(None, state(0, is_world_process_zero=True), None)
        shown.on_log(None, state(5, is_local_process_zero=True), None, logs={"loss": 1.0})
        assert "{'loss': '1'}" in "".join(capfd.readouterr())


def test_the_time_left_counts_the_steps_of_this_start_and_the_evaluations_to_come(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    arguments = SimpleNamespace(
        save_strategy="no", eval_strategy="steps", eval_delay=0, eval_on_start=False,
        logging_steps=1, eval_steps=50, save_steps=50, metric_for_best_model=None,
        device=SimpleNamespace(type="cpu"),
    )  # fmt: skip
    batch = dict.fromkeys(("steps_per_epoch", "effective", "per_device", "accumulation"), 1)
    lines = LinesCallback(batch | {"world": 1}, "Ctrl-C ends it")
    model = SimpleNamespace(config=SimpleNamespace(model_type="line"))
    lines.on_train_begin(arguments, state(100), None, model=model)
    assert lines._seconds_left(state(100)) is None
    now[0] += 20  # ten steps of two seconds
    assert lines._seconds_left(state(110)) == 55 * 2
    now[0] += 80 + 7  # and an evaluation of seven
    lines.on_log(arguments, state(150), None, logs={"eval_loss": 1.0, "eval_runtime": 7.0})
    assert lines._seconds_left(state(150)) == 15 * 2 + 7  # of the last step


@pytest.mark.parametrize(
    ("folders", "best", "evaluates", "line"),
    [
        (["adapter"], None, True, "adapter; next: medft evaluate {run} --against base"),
        (["adapter", "best_model"], 165, True, "adapter; next: medft evaluate {run} --against"),
        (
            ["adapter", "best_model"], 34, True,
            "adapter (step 165), {run}/best_model (step 34); next: medft evaluate {run} --against",
        ),
        (["model"], None, False, "model; next: medft evaluate {run} --data FILE --out"),
    ],
)  # fmt: skip
def test_the_last_line_says_where_the_result_is(tmp_path, folders, best, evaluates, line):
    run = tmp_path / "run"
    for name in folders:
        (run / name).mkdir(parents=True)
    said = last_line(RunLayout(run), state(165, best_global_step=best), evaluates=evaluates)
    assert said.startswith(f"done: {run}/{line.format(run=run)}")
    assert said.endswith(f" --out {run}_evaluation")
    assert re.search(r"--against base", said) is None or folders[0] == "adapter"


def test_the_next_command_can_be_run_whatever_the_folder_is_called(tmp_path):
    run = tmp_path / "knee & hip"
    (run / "adapter").mkdir(parents=True)
    said = last_line(RunLayout(run), state(165), evaluates=True)
    words = shlex.split(said.partition("next: ")[2])
    assert words == [
        "medft", "evaluate", str(run), "--against", "base", "--out", f"{run}_evaluation",
    ]  # fmt: skip


@pytest.mark.parametrize(("rank", "is_terminal"), [("0", True), ("1", True), ("0", False)])
def test_bars_of_libraries_come_on_a_terminal_once_for_all_ranks(monkeypatch, rank, is_terminal):
    for enable in (hub_logging.enable_progress_bar, datasets.enable_progress_bars):
        enable()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    with process_setup():
        enabled = [hub_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()]
    for enable in (hub_logging.enable_progress_bar, datasets.enable_progress_bars):
        enable()
    has_bars = rank == "0" and is_terminal
    assert enabled == [has_bars, not has_bars]
