"""Base models, the adapters on them, and models that were trained."""
