"""Trained models on new pictures."""

from medft.inference.predictor import Predictor

__all__ = ["Predictor"]
