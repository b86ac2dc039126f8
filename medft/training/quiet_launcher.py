"""A launcher that ends with the exit code of the process that failed, without a traceback.

    python -m medft.training.quiet_launcher PARENT MODULE [option ...] SCRIPT [argument ...]

The processes that train say themselves why they end. If the parent, a process id, is killed, they
get SIGTERM, so that they save and nobody is left who trains unseen.
"""

import logging
import os
import runpy
import subprocess
import sys
import threading
import time

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from medft.errors import EXIT_SIGNAL


def main() -> int:
    """Run a launcher's module as a script; returns 128 + N where signal N ended a process."""
    parent, module = int(sys.argv.pop(1)), sys.argv.pop(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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


def _end_with(parent: int) -> None:
    """Let the processes that train save and end once the parent is gone."""
    ended: set[int] = set()
    while True:
        if os.getppid() != parent:
            for child in psutil.Process().children():
                if child.pid not in ended:
                    child.terminate()
                    ended.add(child.pid)
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
