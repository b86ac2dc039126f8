"""The rule for every file of a source: inside its root, regular, bounded."""

import os
import socket
import zlib

import pytest

from medft.data.source_file import inflated, inside, open_regular
from medft.data.table_row import Rejected


def test_a_file_is_inside_its_root_once_links_are_resolved(tmp_path):
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    (root / "good.png").symlink_to(root / "a.png")
    (root / "bad.png").symlink_to(tmp_path / "b.png")
    (root / "outside").symlink_to(tmp_path)
    assert inside(root / "good.png", root) == root / "a.png"
    assert inside(root / "deep" / ".." / "a.png", root) == root / "a.png"
    for name in ("bad.png", "../b.png", "outside/b.png", "outside"):
        with pytest.raises(Rejected) as verdict:
            inside(root / name, root)
        assert verdict.value.reason == "outside_root"


def test_pipes_folders_devices_and_sockets_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(Rejected, match="is a folder, a pipe or a device"):
            open_regular(tmp_path / path)
    with pytest.raises(OSError, match="No such device"):
        open_regular(tmp_path / "socket")
    server.close()


def test_a_sparse_file_is_refused_by_its_size_and_left_closed(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Rejected, match=f"has {2**40} bytes, at most 100"):
        open_regular(path, max_bytes=100)
    assert len(os.listdir("/proc/self/fd")) == before
    path.write_bytes(b"x" * 100)
    with open_regular(path, max_bytes=100) as file:
        assert file.read() == b"x" * 100


def test_a_stream_is_inflated_up_to_its_limit_alone():
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(b"7" * 10_000_000) + packer.flush()
    assert len(packed) < 20_000
    assert inflated(packed, max_bytes=10_000_000) == b"7" * 10_000_000
    with pytest.raises(Rejected, match="more than 9999999 bytes"):
        inflated(packed, max_bytes=9_999_999)
    with pytest.raises(zlib.error, match="incomplete"):
        inflated(packed[:-5], max_bytes=10_000_000)
