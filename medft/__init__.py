"""Parameter-efficient fine-tuning of medical image-text models, without silent failures."""

__version__ = "0.1.0"
