"""Lines of libraries that are not true for the user of medft, and would hide those that are.

A line is left out by its logger and its text, so that everything else of the library still comes.
"""

import logging
import os
import re

UNTRUE = {
    # Numbers that SiglipTextConfig has where a base names none, of CLIP's tokenizer; a text tower
    # generates nothing and reads neither.
    "transformers.configuration_utils": (
        r"Model config: (bos_token_id must be .* got 49406|eos_token_id must be .* got 49407)\."
    ),
    # Said by DeepSpeed, which transformers and TRL import on every machine, to standard output. The
    # first line of a training names the device.
    "DeepSpeed": r"Setting accelerator to CPU\. If you have GPU or other accelerator",
}
"""Regular expressions of such lines by the name of their logger."""


def leave_out_untrue_lines() -> None:
    """Keep the lines of UNTRUE, and the warnings of torch's C++ parts, from the terminal.

    Call it before libraries are imported: they say the first lines at import. `TORCH_CPP_LOG_LEVEL`
    of the environment is respected; its only warning in a training is DDP's, that it searches for
    parameters without gradient and found none in the first step. Later ones may have some: where
    rows without image come, no layer of the image has a gradient.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, text in UNTRUE.items():
        library = logging.getLogger(name)
        if not any(isinstance(known, _LeftOut) for known in library.filters):
            library.addFilter(_LeftOut(text))


class _LeftOut(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = re.compile(text)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text.match(record.getMessage()) is None
