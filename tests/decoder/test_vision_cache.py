"""Features read from disk train what features computed anew train, and damage is never read."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from families import BASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medft.check import check, describe_check
from medft.decoder import vision_cache
from medft.decoder.families import FAMILIES
from medft.decoder.vision_cache import VisionCache
from medft.errors import MedftError


@pytest.fixture
def trainer(sections, write_recipe, bases, build_trainer):
    """A trainer of two epochs; the calls of its tower are counted."""

    def make(family="mllama", changes=(), **train):
        recipe = sections("decoder")
        recipe["model"]["base"] = str(bases / BASES[family])
        recipe["data"]["validation"] = None
        recipe["train"] |= {"num_train_epochs": 2, "save_strategy": "no", **train}
        made = build_trainer(write_recipe(recipe), changes)
        tower = made.model.get_base_model().get_submodule(FAMILIES[family].parts["vision"])
        made.towers_called = []
        tower.register_forward_hook(lambda *_: made.towers_called.append(1))
        return made

    return make


def outcome(made):
    made.train()
    log = [(e["loss"], e["grad_norm"]) for e in made.state.log_history if "loss" in e]
    weights = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    return log, weights, len(made.towers_called)


def same(left, right):
    return left[0] == right[0] and all(torch.equal(left[1][n], right[1][n]) for n in left[1])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("mllama", [], marks=pytest.mark.slow),
        pytest.param("mllama", ["model.cross_attention_fix=true"], marks=pytest.mark.proof),
        pytest.param("paligemma", [], marks=pytest.mark.proof),
        pytest.param("gemma3", [], marks=pytest.mark.proof),
    ],
)
def test_two_epochs_with_the_cache_are_two_without_bit_for_bit(trainer, tmp_path, family, changes):
    cached = [*changes, f"model.vision_cache={tmp_path / 'cache'}"]
    without = outcome(trainer(family, changes))
    first = outcome(trainer(family, cached))
    entries = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(entries) == 31
    assert (without[2], first[2]) == (62, 31)  # the second epoch computes nothing
    again = outcome(trainer(family, cached, dataloader_num_workers=2))
    assert again[2] == 0
    assert same(without, first)
    assert same(without, again)
    assert not same(without, outcome(trainer(family, [*cached, "train.seed=18"])))


@pytest.mark.slow
def test_what_is_lost_truncated_or_changed_is_computed_again(trainer, tmp_path):
    cached = [f"model.vision_cache={tmp_path / 'cache'}"]
    first = outcome(trainer(changes=cached))
    lost, truncated, flipped, empty = sorted((tmp_path / "cache").rglob("*.safetensors"))[:4]
    whole, kept = flipped.read_bytes(), load_file(flipped)["features"].clone()
    lost.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-7])
    flipped.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    empty.write_bytes(b"")
    again = outcome(trainer(changes=cached))
    assert same(first, again)
    assert again[2] == 4
    assert torch.equal(load_file(flipped)["features"], kept)
    assert not list((tmp_path / "cache").rglob("*.draft"))


def test_other_weights_settings_or_flags_take_other_entries(trainer, bases, tmp_path):
    cache = f"model.vision_cache={tmp_path / 'cache'}"
    base = trainer(changes=[cache])
    folders = {base.data_collator.cache.folder}
    for change in ("data.max_image_tiles=2", "model.cross_attention_fix=true"):
        folders.add(trainer(changes=[cache, change]).data_collator.cache.folder)
    with torch.no_grad():
        made = trainer(changes=[cache])
        inner = made.model.get_base_model()
        inner.model.multi_modal_projector.weight[0, 0] += 1e-3
        key = vision_cache.tower_sha256(inner, base.data_collator.conversation.family)
    assert key != vision_cache.tower_sha256(
        base.model.get_base_model(), base.data_collator.conversation.family
    )
    assert len(folders) == 3


def test_processes_and_runs_may_write_at_once(tmp_path):
    features = torch.randn(4, 17, 64, generator=torch.Generator().manual_seed(1))
    caches = [VisionCache(tmp_path, {"k": 1}, limit=10**9) for _ in range(4)]
    broken = []

    def work(cache):
        for _ in range(20):
            cache.write("x", features, 3)
            found = cache.read("x")
            if found is None or not torch.equal(found.features, features):
                broken.append(found)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert caches[0].read("x").num_tiles == 3
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and the one entry


@pytest.mark.parametrize(
    "metadata",
    [{"num_tiles": "2"}, {"num_tiles": "x"}, {"crc32": "1"}, {"crc32": None}],
)
def test_an_entry_whose_numbers_are_damaged_is_removed(tmp_path, metadata):
    features = torch.randn(4, 17, 64)
    cache = VisionCache(tmp_path, {}, limit=10**9)
    cache.write("x", features, 3)
    [file] = tmp_path.rglob("*.safetensors")
    with safe_open(file, "pt") as content:
        known = {k: v for k, v in {**content.metadata(), **metadata}.items() if v is not None}
    save_file({"features": features}, file, metadata=known)
    assert cache.read("x") is None
    assert not file.exists()
    save_file({"features": features.view(4, 64, 17)}, file, metadata=known | {"num_tiles": "3"})
    assert cache.read("x") is None


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, caplog, trainer):
    (tmp_path / "file").write_text("")
    cache = VisionCache(tmp_path / "file", {}, limit=10**9)
    cache.write("x", torch.zeros(1), 1)
    assert "it cannot be written" in caplog.text
    assert cache.read("x") is None
    with pytest.raises(MedftError, match="is a file: choose another"):
        trainer(changes=[f"model.vision_cache={tmp_path / 'file'}"])


def test_the_tower_of_another_configuration_takes_other_entries(trainer, tmp_path, bases):
    base = tmp_path / "base"
    shutil.copytree(bases / "decoder", base)
    cache = f"model.vision_cache={tmp_path / 'cache'}"
    folders = set()
    for heads in (4, 2):
        config = json.loads((base / "config.json").read_text())
        config["vision_config"]["attention_heads"] = heads
        (base / "config.json").write_text(json.dumps(config))
        made = trainer(changes=[cache, f"model.base={base}"])
        folders.add(made.data_collator.cache.folder)
    assert len(folders) == 2
    config["vision_config"]["attention_dropout"] = 0.5
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MedftError, match=r"without dropout .* vision_config\.attention_dropout: 0.5"
    ):
        trainer(changes=[cache, f"model.base={base}"])


def test_a_lost_image_is_the_same_sentence_with_the_cache(trainer, tmp_path):
    made = trainer(changes=[f"model.vision_cache={tmp_path / 'cache'}"])
    row = {**made.train_dataset[0], "images": [{"bytes": None, "path": str(tmp_path / "gone.png")}]}
    with pytest.raises(MedftError, match=rf"row {row['id']}: expected an image at"):
        made.data_collator([row])


def test_the_limit_and_a_full_disk_stop_writing_and_say_so(tmp_path, caplog, monkeypatch):
    features = torch.zeros(1, 16, 64)
    cache = VisionCache(tmp_path, {}, limit=2 * features.nbytes + 1)
    for name in "abc":
        cache.write(name, features, 1)
    assert [cache.read(name) is not None for name in "abc"] == [True, True, False]
    assert "takes no further images: model.vision_cache_gb is reached" in caplog.text
    other = VisionCache(tmp_path, {}, limit=10 * features.nbytes)
    usage = vision_cache.shutil.disk_usage(tmp_path)
    full = usage._replace(free=vision_cache.KEPT_FREE + features.nbytes - 1)
    monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda path: full)
    other.write("d", features, 1)
    assert other.read("d") is None
    assert "its disk would fill" in caplog.text


def test_a_cache_of_what_is_trained_is_refused(trainer):
    for targets in ("projector", "vision", "all"):
        with pytest.raises(
            MedftError, match=r"outside tower and projector for model\.vision_cache"
        ):
            trainer(changes=["model.vision_cache=x", f"lora.targets={targets}"])
    with pytest.raises(MedftError, match="outside tower and projector"):
        trainer(changes=["model.vision_cache=x", "lora=null"])


def test_check_tells_the_size_beforehand(sections, write_recipe, tmp_path):
    recipe = sections("decoder")
    recipe["model"] |= {"vision_cache": str(tmp_path / "cache"), "vision_cache_gb": 3}
    text = describe_check(check(write_recipe(recipe), []))
    rows = [
        json.loads(line)
        for file in ("train", "validation")
        for line in Path(recipe["data"][file]).read_text().splitlines()
    ]
    images = len({name for row in rows for name in row["images"]})
    # 17 tokens of a 56-pixel tile x 64 wide x 4 bytes
    assert f"vision cache: at most {images} images x 4 tiles x 0.00435 MB = " in text
    assert "may take 3; it is for thousands of images, not for millions" in text
    assert not (tmp_path / "cache").exists()
