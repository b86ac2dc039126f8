"""Evaluation of trained models: predictions, controls, scores and an HTML page."""
