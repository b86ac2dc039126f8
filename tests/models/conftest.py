"""Finished runs as somebody else might give them, and the commands that take one."""

import shutil

import pytest


@pytest.fixture
def given(runs, tmp_path):
    """Copies a finished run."""

    def copy(kind):
        return shutil.copytree(runs / kind, tmp_path / "given")

    return copy


@pytest.fixture
def uses(images, write_recipe, sections, tmp_path):
    """The commands that take a run, or an adapter of it."""

    def words(run, kind):
        out = tmp_path / "out"
        continued = write_recipe(sections(kind), "continued")
        prompt = ["--prompt", "What?"] if kind == "decoder" else []
        return {
            "predict": ["predict", run, images[0], *prompt, "--out", tmp_path / "out.jsonl"],
            "evaluate": ["evaluate", run, "--out", out],
            "merge": ["merge", run, "--out", out],
            "init_from": ["check", continued, f"lora.init_from={run}"],
        }

    return words


@pytest.fixture
def refused(medft, capsys, tmp_path):
    """The one sentence of a command that exits 2 and writes nothing."""

    def run(words):
        capsys.readouterr()
        assert medft(*words) == 2
        marker = "medft: error: "
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith(marker)]
        assert len(lines) == 1, lines
        assert not list(tmp_path.glob("out*"))
        sentence = lines[0].removeprefix(marker)
        assert "expected" in sentence
        assert len(sentence) < 1500
        return sentence

    return run
