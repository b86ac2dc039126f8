"""Inference with trained models on new images."""

from medft.inference.predictor import Predictor

__all__ = ["Predictor"]
