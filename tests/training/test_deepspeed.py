"""DeepSpeed compiles when it starts on a CPU, once, and that is known beforehand."""

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from medft.training.deepspeed import compiles_first


def test_it_is_known_whether_deepspeed_will_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not compiles_first()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert compiles_first()
    name = ShareMemCommBuilder().name
    (tmp_path / name).mkdir()
    assert compiles_first()
    (tmp_path / name / f"{name}.so").touch()
    assert not compiles_first()
