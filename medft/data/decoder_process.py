"""A process that decodes frames: what a damaged frame does to a decoder ends it alone.

The decoders of medical images are libraries in C and C++, and damaged frames crash some of them.
"""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from medft.data.table_row import Rejected

_running: dict[int, Connection] = {}
"""The end of the pipe to the decoder process of this process, by the id of this one."""


def decode_apart(decode: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in the decoder process, which starts with the first call.

    Args:
        decode: the function, of a module.
        arguments: of the function, which can be pickled.

    Raises:
        RuntimeError: the function raised; with its message.
        Rejected: bad_dicom, the process crashed.
    """
    connection = _running.get(os.getpid()) or _started()
    try:
        connection.send((decode, arguments))
        result, problem = connection.recv()
    except (EOFError, OSError) as error:
        _running.pop(os.getpid()).close()
        raise Rejected("bad_dicom", "its decoder crashed") from error
    if problem is not None:
        raise RuntimeError(problem)
    return result


def _started() -> Connection:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, ours), daemon=True).start()
    theirs.close()
    _running.clear()  # of the process that this one was forked from
    _running[os.getpid()] = ours
    return ours


def _serve(connection: Connection, other_end: Connection) -> None:
    """Answer calls until the other end is closed, be it because its process was killed."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold a patient's image
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # decoders print what they think of a frame
    os.dup2(nowhere, 2)
    while True:
        try:
            decode, arguments = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = (decode(*arguments), None)
        except Exception as error:  # decoders raise many exceptions
            answer = (None, str(error) or type(error).__name__)
        connection.send(answer)
