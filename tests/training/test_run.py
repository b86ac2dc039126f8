"""What a finished run says of itself."""

from medft.training.run import final_metrics


def test_final_metrics_are_the_last_ones():
    history = [
        {"loss": 3.0, "step": 1},
        {"eval_loss": 2.0, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_loss": 1.5, "eval_pairs": 4, "step": 2},
        {"train_runtime": 9},
    ]
    assert final_metrics(history) == {"loss": 1.0, "eval_loss": 1.5, "eval_pairs": 4}
