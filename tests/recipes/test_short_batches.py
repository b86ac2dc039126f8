"""Rows of several modalities in one process: short batches in mid-epoch, and a resumed run."""

import json
from collections import Counter
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from medft.training.trainer import RowTrackingTrainer


@pytest.fixture
def steps(monkeypatch):
    """Row ids of each micro-batch's step, as training takes them."""
    taken = []
    fetch = RowTrackingTrainer.get_batch_samples

    def recorded(trainer, *args):
        found = fetch(trainer, *args)
        taken.append(trainer.row_ids)
        return found

    monkeypatch.setattr(RowTrackingTrainer, "get_batch_samples", recorded)
    return taken


@pytest.mark.slow
def test_rows_of_a_rare_kind_come_once_an_epoch_and_a_run_resumes_within_it(
    sections, write_recipe, run_script, mixed_rows, steps
):
    rows = [json.loads(line) for line in mixed_rows.read_text().splitlines()]
    images = {row["id"]: len(row["images"]) for row in rows}
    recipe = sections("decoder")
    recipe["data"]["train"] = str(mixed_rows)
    recipe["train"] |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 1}
    recipe["data"]["validation"] = None
    recipe["train"]["dataloader_num_workers"] = 1
    file = write_recipe(recipe)
    run = file.parent / "run"
    run_script("decoder", file)

    record = json.loads((run / "run.json").read_text())
    an_epoch = 2 + 4 + 2  # batches of at most 4: of 5 rows without, 15 with one, 7 with two images
    assert record["batch"]["steps_per_epoch"] == an_epoch
    assert record["steps_done"] == record["batch"]["steps"] == len(steps) == 2 * an_epoch
    for epoch in (steps[:an_epoch], steps[an_epoch:]):
        assert Counter(chain(*epoch)) == Counter(list(images))
        assert all(len({images[row] for row in batch}) == 1 for batch in epoch)
        assert any(len(batch) < 4 for batch in epoch[:-1])
    assert steps[:an_epoch] != steps[an_epoch:]

    whole, adapter = list(steps), load_file(run / "adapter" / "adapter_model.safetensors")
    middle = an_epoch + next(i for i, batch in enumerate(steps[an_epoch:], 1) if len(batch) < 4)
    for step in range(middle + 1, 2 * an_epoch + 1):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    steps.clear()
    run_script("decoder", file, "train.resume_from_checkpoint=true")
    resumed = json.loads((run / "run.json").read_text())["resumed_from"]
    assert resumed == f"checkpoint-{middle}"
    assert steps == whole[middle:]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
