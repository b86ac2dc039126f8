"""Predictions made by hand."""

from medft.metrics.predictions import AnswerPrediction


def predictions(answers):
    """Hand-made predictions: 8 patients, two rows each."""
    made = []
    for i in range(16):
        reference = (
            "Small left pleural effusion is seen." if i % 4 else "No pleural effusion is seen."
        )
        made.append(
            AnswerPrediction(
                id=f"r{i}",
                group_id=f"p{i // 2}",
                source="s",
                question="What?",
                shuffled_with="another",
                reference=reference,
                predictions={name: answer(i, reference) for name, answer in answers.items()},
            )
        )
    return made
