"""`make gpu` says so when it could test nothing on a machine that has a card."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent.parent.parent / "benchmarks" / "on_gpu.py"


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """The script, with one test of the gpu mark and one benchmark that leaves a file."""
    spec = importlib.util.spec_from_file_location("on_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran, test = tmp_path / "ran", "tests/siglip/test_gpu.py::test_dropout_is_replayed[float32]"
    table = tmp_path / "gpu.json"
    monkeypatch.setattr(module, "TABLE", table)
    words = ["-m", "pytest", "-q", "-m", "gpu", "--result-table", str(table), test]
    monkeypatch.setattr(module, "TESTS", words)
    monkeypatch.setattr(module, "BENCHMARKS", [["-c", f"open({str(ran)!r}, 'w').close()"]])
    module.ran = ran
    return module


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is skipped where there is a GPU")
@pytest.mark.parametrize("has_card", [True, False])
def test_skipped_tests_are_a_failure_where_there_is_a_card(
    on_gpu, monkeypatch, tmp_path, capfd, has_card
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{'echo NVIDIA H200' if has_card else 'exit 9'}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert on_gpu.main() == (1 if has_card else 0)
    assert not on_gpu.ran.exists()
    printed = capfd.readouterr().out
    assert ("expected the tests to use NVIDIA H200, all were skipped" in printed) == has_card
    assert ("1 skipped" in printed) == has_card
    assert on_gpu.TABLE.exists() == has_card  # results of a card are not replaced without one


@pytest.mark.parametrize("fails", [True, False])
def test_benchmarks_run_after_tests_that_ran_and_a_failure_is_exit_1(
    on_gpu, monkeypatch, tmp_path, fails
):
    test = tmp_path / "test_one.py"
    test.write_text(f"def test_one():\n    assert {not fails}\n")
    own = ["-c", str(on_gpu.ROOT / "pyproject.toml"), "--rootdir", str(on_gpu.ROOT)]
    table = ["--result-table", str(on_gpu.TABLE)]
    monkeypatch.setattr(on_gpu, "TESTS", ["-m", "pytest", *own, *table, str(test)])
    monkeypatch.setattr(on_gpu, "cards", lambda: ["NVIDIA H200"])
    assert on_gpu.main() == (1 if fails else 0)
    assert on_gpu.ran.exists()  # the benchmarks run all the same
