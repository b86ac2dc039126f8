"""What medft writes is its user's alone, whichever library writes it, unless it is to be shared."""

import os
import stat

import pytest
import yaml
from hostile import run_hostile

from medft.errors import MedftError, run_command
from medft.files import complete_folder


def readable_by_others(folder):
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()
    ]


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_a_command_writes_for_its_user_alone_and_leaves_the_umask_as_it_was(tmp_path, monkeypatch):
    def write(argv):
        (tmp_path / argv[0]).mkdir()
        (tmp_path / argv[0] / "file").write_text("x")
        if argv[1:]:
            raise MedftError(argv[1])

    assert run_command(write, ["a"]) == 0
    assert run_command(write, ["b", "fails"]) == 2
    assert readable_by_others(tmp_path) == []
    monkeypatch.setenv("MEDFT_SHARED", "0")
    run_command(write, ["c"])
    assert readable_by_others(tmp_path) == []
    monkeypatch.setenv("MEDFT_SHARED", "1")
    run_command(write, ["d"])
    assert readable_by_others(tmp_path) == ["d", "d/file"]
    assert os.umask(0o022) == 0o022


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_that_its_owner_has_shared_stays_shared(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o775)
    out.chmod(0o2775)

    def replace(argv):
        with complete_folder(out) as draft:
            (draft / "file").write_text("x")

    assert run_command(replace, []) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o2775
    assert readable_by_others(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["", pytest.param("1", marks=pytest.mark.proof)])
@pytest.mark.usefixtures("usual_umask")
def test_everything_that_a_whole_chain_writes_is_private(data, sections, tmp_path, shared):
    caches = {"HF_HOME": "hf", "MEDFT_CACHE": "cache", "MPLCONFIGDIR": "mpl", "TMPDIR": "tmp"}
    (tmp_path / "tmp").mkdir(mode=0o700)
    given = {name: str(tmp_path / folder) for name, folder in caches.items()}
    given["HF_DATASETS_CACHE"] = str(tmp_path / "hf" / "datasets")

    def run(*words, command=None):
        chosen = {"command": command} if command else {}
        done = run_hostile(words, **chosen, **given, MEDFT_SHARED=shared)
        assert done.code == 0, done.err

    run("data", "prepare", data / "raw" / "SOURCES.yaml", "--out", tmp_path / "data")
    run("data", "chat", tmp_path / "data" / "pairs.parquet", "--out", tmp_path / "chat")
    recipe = sections("decoder")
    recipe["data"]["train"] = str(tmp_path / "data" / "pairs.parquet")
    recipe["data"]["validation"] = str(tmp_path / "chat" / "validation.jsonl")
    recipe["train"] |= {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "save_steps": 1,
        "dataloader_num_workers": 1,
    }
    recipe["model"]["vision_cache"] = str(tmp_path / "vision")
    (tmp_path / "tmp" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "tmp" / "recipe.yaml").chmod(0o600)
    run("train", tmp_path / "tmp" / "recipe.yaml")
    run("predict", tmp_path / "run", data / "raw" / "knee", "--prompt", "What?",
        "--max-new-tokens", "2", "--out", tmp_path / "predicted" / "p.jsonl")  # fmt: skip
    run("evaluate", tmp_path / "run", "--data", tmp_path / "data" / "pairs.parquet",
        "--out", tmp_path / "evaluation")  # fmt: skip
    run("merge", tmp_path / "run", "--out", tmp_path / "merged")
    open_ones = readable_by_others(tmp_path)
    assert (open_ones != []) == bool(shared), open_ones
    if shared:
        folders = {name.partition("/")[0] for name in open_ones}
        assert folders >= {"data", "chat", "run", "predicted", "evaluation", "merged"}
