"""The record of a run: complete, and without secrets, home paths or host names."""

import json
import math
import socket

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from medft.errors import RecipeError, RunError
from medft.provenance import folder_sha256, hardware, masked, masked_words
from medft.training.arguments import training_arguments
from medft.training.run import batch_arithmetic, check_output_dir, draw_curves, final_metrics


def test_secrets_are_masked_at_any_depth_and_the_home_folder_is_hidden(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    content = {
        "hub_token": "hf_abc",
        "HF_TOKEN": "hf_abc",
        "nested": [{"api_key": "k", "deep": {"client_secret": {"value": "s"}}}],
        "Password": "p",
        "path": "/home/ada/models/x and /home/adam/y",
        "caption": "key = {answer}",
        "num_tokens": 12,
        "packages": {"tokenizers": "0.23"},
        "nothing_secret": None,
    }
    got = masked(content)
    assert "hf_abc" not in json.dumps(got)
    assert got == {
        "hub_token": "***",
        "HF_TOKEN": "***",
        "nested": [{"api_key": "***", "deep": {"client_secret": {"value": "***"}}}],
        "Password": "***",
        "path": "~/models/x and /home/adam/y",
        "caption": "key = {answer}",
        "num_tokens": 12,
        "packages": {"tokenizers": "0.23"},
        "nothing_secret": None,
    }


def test_a_command_line_shows_of_a_secret_its_key_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    words = [
        "x.yaml",
        "train.hub_token=hf_abc",
        "train={hub_token: hf_abc}",
        "model.base=/home/ada",
    ]
    assert masked_words(words) == ["x.yaml", "train.hub_token=***", "train=***", "model.base=~"]


class Squares(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)])}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (17, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        (17, {"per_device_train_batch_size": 3, "num_train_epochs": 2.5}),
        (3, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}),
        (17, {"per_device_train_batch_size": 2, "max_steps": 5, "warmup_steps": 2}),
    ],
)
def test_the_arithmetic_is_trainers(tmp_path, rows, options):
    options = {"warmup_steps": 0.1, **options}
    arguments = TrainingArguments(
        tmp_path, save_strategy="no", report_to="none", use_cpu=True, **options
    )
    trainer = Trainer(Line(), arguments, train_dataset=Squares(rows))
    trainer.train()
    batch = batch_arithmetic(rows, arguments)
    assert batch["steps"] == trainer.state.max_steps == trainer.state.global_step
    assert batch["effective"] == (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    )
    assert batch["warmup_steps"] == arguments.get_warmup_steps(trainer.state.max_steps)


def test_a_process_that_sees_several_gpus_is_refused(monkeypatch, tmp_path):
    train = {"output_dir": str(tmp_path), "use_cpu": True}

    def arguments():
        return training_arguments(TrainingArguments, train, dtype="float32", metrics={})

    assert arguments().train_batch_size == 8
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    assert TrainingArguments(**train).train_batch_size == 32  # the trap
    with pytest.raises(RecipeError, match="one GPU in a process, this one sees 4"):
        arguments()


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    assert check_output_dir({"output_dir": str(tmp_path / "new")}) is None
    assert check_output_dir({"output_dir": str(tmp_path)}) is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="or resume with"):
        check_output_dir({"output_dir": str(tmp_path)})
    with pytest.raises(RunError, match="is a file"):
        check_output_dir({"output_dir": str(tmp_path / "file")})
    with pytest.raises(RunError, match="found none"):
        check_output_dir({"output_dir": str(tmp_path), "resume_from_checkpoint": True})


def test_a_folder_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = folder_sha256(tmp_path)
    (tmp_path / "a").write_text("2")
    second = folder_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_sha256(tmp_path)}) == 3


def test_curves_are_a_picture(tmp_path):
    history = [
        {"step": step, "loss": math.exp(-step), "learning_rate": 1.0, "grad_norm": None}
        for step in range(5)
    ] + [{"step": 4, "eval_loss": 0.3}]
    draw_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 360)
        colours = len(image.convert("RGB").getcolors(1 << 20))
    draw_curves([], tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) < colours


def test_final_metrics_are_the_last_ones():
    history = [
        {"loss": 3.0, "step": 1},
        {"eval_loss": 2.0, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_loss": 1.5, "eval_pairs": 4, "step": 2},
        {"train_runtime": 9},
    ]
    assert final_metrics(history) == {"loss": 1.0, "eval_loss": 1.5, "eval_pairs": 4}


def test_no_host_name_is_read():
    assert socket.gethostname() not in json.dumps(hardware())
