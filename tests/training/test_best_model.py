"""best_model/ says which evaluation it is of, and a run that goes on compares with it."""

import json

import pytest
from transformers import TrainerState, TrainingArguments

from medft.training.best_model import BestEvaluation, KnownBestCallback


@pytest.mark.parametrize(
    ("content", "known"),
    [
        ({"step": 5}, True),
        ({"step": 4}, True),
        ({"step": 3}, False),
        ({"step": "5"}, False),
        ({"metric": "eval_perplexity"}, False),
        ({"value": float("inf")}, False),
        (None, False),
    ],
    ids=str,
)
def test_a_best_model_that_a_checkpoint_does_not_know_is_compared_with(tmp_path, content, known):
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model="loss", use_cpu=True)
    state = TrainerState(global_step=4, best_metric=2.0, best_global_step=2)
    if content is not None:
        evaluation = {"step": 5, "metric": "eval_loss", "value": 1.0} | content
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    KnownBestCallback(tmp_path).on_train_begin(arguments, state, None)
    assert state.best_metric == (1.0 if known else 2.0)
    assert BestEvaluation.read(tmp_path / "nowhere") is None
