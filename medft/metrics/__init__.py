"""Metrics of predictions and embeddings with confidence intervals, from texts and arrays alone."""
