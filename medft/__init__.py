"""Parameter-efficient fine-tuning of medical image-text models, without silent failures."""

import logging
import sys

__version__ = "0.1.0"

# bitsandbytes and transformers would download code from the hub through it, and run it
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for it
