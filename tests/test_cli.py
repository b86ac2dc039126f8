"""The command answers at once and says what went wrong by its exit code."""

import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from medft import cli
from medft.command_parser import parse
from medft.errors import DataError, MedftError, Stopped, run_command


def test_help_imports_nothing_heavy():
    code = (
        "import sys, medft.cli; medft.command_parser.parser().format_help();"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pydantic', 'numpy', 'PIL'};"
        "sys.stdout.write(' '.join(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["train", "--help"]])
def test_help_exits_with_0(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 0
    assert "usage: medft" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["tarin"], ["merge", "x"], ["train"]])
def test_wrong_words_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert "usage: medft" in capsys.readouterr().err


def test_overrides_may_stand_behind_options(medft, capsys, tmp_path):
    for words in (["--images", "lora.r=0"], ["lora.r=0", "--images"]):
        assert medft("check", tmp_path / "none.yaml", *words) == 2
        assert "could not read it" in capsys.readouterr().err
    for words in (["check", "x.yaml", "--image"], ["merge", "x", "--out", "y", "lora.r=0"]):
        with pytest.raises(SystemExit) as caught:
            medft(*words, "--nonsense")
        assert caught.value.code == 2
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_exit_codes_and_sentences(capsys, monkeypatch):
    def fail(argv):
        raise MedftError("expected a, got b", "expected c, got d")

    def stop(argv):
        raise Stopped(signal.SIGTERM)

    def interrupt(argv):
        raise KeyboardInterrupt

    assert run_command(list, []) == 0
    assert run_command(fail, ["x"]) == 2
    assert capsys.readouterr().err == (
        "medft: error: expected a, got b\nmedft: error: expected c, got d\n"
    )
    with pytest.raises(MedftError):
        run_command(fail, ["--debug"])
    monkeypatch.setenv("RANK", "1")
    assert run_command(fail, []) == 2
    assert "expected a, got b" in capsys.readouterr().err  # of no launcher: nobody else says it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == ""
    assert run_command(stop, []) == 143
    assert run_command(interrupt, []) == 130


def test_a_worker_process_shows_its_sentence_only(capsys):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise DataError(f"row {index}\n: expected a whole image, found Error: none")

    def load(argv):
        list(torch.utils.data.DataLoader(Rows(), num_workers=1))

    assert run_command(load, []) == 2
    assert capsys.readouterr().err == (
        "medft: error: row 0\\n: expected a whole image, found Error: none\n"
    )


def test_a_name_with_line_ends_or_other_bytes_stays_within_its_line(capsys):
    def fail(argv):
        raise MedftError("row a\nmedft: error: b\x1b[2J: expected c")

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err == (
        "medft: error: row a\\nmedft: error: b\\x1b[2J: expected c\n"
    )
    cli._say("a \udcff \u00e9")
    assert capsys.readouterr().out == "a \\udcff \u00e9\n"


def test_a_bug_of_ours_is_not_hidden():
    def broken(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken, [])


@pytest.mark.parametrize("words", [">&-", "2>&-", ">/dev/full", "| true"])
def test_streams_that_nobody_reads_stop_no_command(tmp_path, words):
    """Closed, full, or a reader that is gone: what was to be done is done."""
    Image.new("L", (9, 9), 90).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("file,text\na.png,text\n")
    (tmp_path / "SOURCES.yaml").write_text(
        "sources: [{name: s, kind: csv, path: t.csv, image: file, text: text}]\n"
        "split: {validation: 0.0, test: 0.0}\n"
    )
    command = (
        f"{sys.executable} -m medft.cli data prepare {tmp_path}/SOURCES.yaml --out {tmp_path}/o"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {words}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    assert done.returncode == 0
    assert (tmp_path / "o" / "pairs.parquet").exists()
