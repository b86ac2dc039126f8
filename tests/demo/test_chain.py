"""The demo end to end, by its command."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_ends_with_the_path_of_its_page(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "medft.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 14
    assert "http" not in page
    summary = json.loads((out / "data" / "summary.json").read_text())
    assert summary["sources"]["phantoms"]["reasons"] == {
        "bad_image": 1,
        "empty_text": 1,
        "missing_image": 1,
    }
    for kind in ("decoder", "siglip"):
        history = json.loads((out / kind / "log_history.json").read_text())
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert (out / f"{kind}_merged" / "model.safetensors").is_file()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    command = [sys.executable, "-m", "medft.cli", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (tmp_path / "thesis.tex").read_text() == "years"
