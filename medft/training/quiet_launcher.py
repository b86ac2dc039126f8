"""A launcher that ends with the exit code of the process that failed, without a traceback.

    python -m medft.training.quiet_launcher MODULE [option ...] SCRIPT [argument ...]

The processes that train say themselves why they end.
"""

import logging
import runpy
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from medft.errors import EXIT_SIGNAL


def main() -> int:
    """Run a launcher's module as a script; returns 128 + N where signal N ended a process."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    module = sys.argv.pop(1)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    else:
        code = 0
    return code if code >= 0 else EXIT_SIGNAL - code


if __name__ == "__main__":
    sys.exit(main())
