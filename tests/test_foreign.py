"""Files and data of somebody else: regular, bounded in size, depth and time."""

import json
import os
import re
import threading
import time

import pytest

from medft.foreign import MAX_JSON_DEPTH, bounded_memory, bounded_time, path_problem, read_json

BROKEN = {
    "nothing": b"",
    "half": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "an endless number": b"9" * 5000,
    "nested 100 deep": b"[" * 100 + b"]" * 100,
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_plain_json_is_a_value_error(tmp_path, name):
    (tmp_path / "x.json").write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["5", "null", '"a"', "[]", "{}", '{"a": [1, {"b": 2.5}]}'])
def test_any_value_is_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == json.loads(text)


def test_plain_json_is_read_up_to_its_depth(tmp_path):
    deep = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    (tmp_path / "x.json").write_text(f'{{"a": [1, "\\ud83d\\ude00"], "b": {deep[1:-1]}}}')
    assert read_json(tmp_path / "x.json")["a"] == [1, "\U0001f600"]
    assert json.loads((tmp_path / "x.json").read_text())["b"] is not None


def test_pipes_and_files_of_any_size_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(2**31)
    (tmp_path / "link.json").symlink_to("nowhere")
    for name in ("pipe.json", "sparse.json", "link.json"):
        with pytest.raises(OSError, match=r"pipe|at most|No such file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a/b c/\U0001f600.png", None),
        ("a" * 255 + "/" + "b" * 255, None),
        ("a\0b", "NUL"),
        ("a\udcff", "UTF-8"),
        ("a" * 256, "at most 255"),
        ("a/" * 2048, "at most 4095"),
    ],
)
def test_a_text_that_no_file_system_takes_is_no_path(text, problem):
    found = path_problem(text)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


def test_python_and_patterns_that_never_end_are_interrupted():
    for endless in (
        lambda: [None for _ in iter(int, 1)],
        lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    ):
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="more than 1 s"), bounded_time(0.2):
            endless()
        assert time.monotonic() - started < 5


def test_a_block_in_time_is_not_interrupted_and_a_thread_has_no_limit():
    with bounded_time(0.1):
        pass
    time.sleep(0.2)
    ended = []

    def work():
        with bounded_time(0.05):
            time.sleep(0.2)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


def test_a_block_that_asks_for_more_memory_is_stopped_and_the_limit_is_lifted():
    with bounded_memory(2**26):
        assert len(b"x" * 2**20) == 2**20
    with pytest.raises(MemoryError), bounded_memory(2**26):
        bytearray(2**28)
    assert len(bytearray(2**28)) == 2**28
