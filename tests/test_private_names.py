"""What a library does not promise is used in compat.py and nowhere else."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "huggingface_hub", "peft",
             "torch", "transformers", "trl")  # fmt: skip

PUBLIC_MODULES = {"accelerate.utils", "bitsandbytes.nn", "huggingface_hub.errors",
                  "torch.autograd.graph", "torch.distributed.elastic.multiprocessing.errors",
                  "torch.nn", "torch.nn.utils.rnn",
                  "torch.utils.cpp_extension", "torch.utils.data",
                  "torch.utils.flop_counter", "transformers.modeling_outputs"}  # fmt: skip
"""Modules below a library's top that its documentation names."""

NOT_PRIVATE = {"_replace", "_fields", "_asdict"}
"""Documented methods of named tuples."""


def is_private(name):
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) and name not in NOT_PRIVATE


def own_names(tree):
    """Private names that a file defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used_names(tree):
    """Names of attributes, keywords, imports from elsewhere and getattr's second argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword):
            yield node.arg
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LIBRARIES:
            yield from node.module.split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant))


def private_uses(sources):
    """Private names that files use and none of them defines, by file."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = {
        file: sorted({n for n in used_names(tree) if is_private(n) and n not in own})
        for file, tree in trees.items()
    }
    return {file: names for file, names in found.items() if names}


def deep_imports(source):
    """Modules of libraries that are not documented."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module not in (*LIBRARIES, *PUBLIC_MODULES):
            yield from [node.module] if node.module.split(".")[0] in LIBRARIES else []


def sources(*folders):
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.name != "compat.py"
    }


def overridden_private_methods():
    """Private methods of libraries that a class of medft outside compat.py defines again."""
    from medft.decoder.trainer import DecoderTrainer
    from medft.siglip.trainer import SiglipTrainer

    for top in (DecoderTrainer, SiglipTrainer):
        bases = [b for b in top.__mro__ if b.__module__.split(".")[0] in LIBRARIES]
        for known in top.__mro__:
            if known.__module__.startswith("medft.") and known.__module__ != "medft.compat":
                names = filter(is_private, vars(known))
                yield from (n for n in names if any(hasattr(base, n) for base in bases))


def test_no_private_name_of_a_library_stands_elsewhere():
    found = sources("medft", "recipes", "benchmarks", "tests")
    assert len(found) > 150
    assert not private_uses(found)
    assert not list(overridden_private_methods())


def test_no_module_below_the_documented_ones_is_imported_elsewhere():
    wrong = {file: list(deep_imports(text)) for file, text in sources("medft", "recipes").items()}
    assert not {file: names for file, names in wrong.items() if names}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("config._attn_implementation", "_attn_implementation"),
        ("getattr(config, '_commit_hash', None)", "_commit_hash"),
        ("trainer.save_model(_internal_call=True)", "_internal_call"),
        ("from torch.utils._pytree import tree_leaves", "_pytree"),
    ],
)
def test_a_planted_private_name_is_found(line, name):
    assert private_uses({"a.py": line, "b.py": "def _own(): pass\n_own.x = row._fields"}) == {
        "a.py": [name]
    }


def test_a_planted_deep_import_is_found():
    line = "from transformers.models.mllama.modeling_mllama import MllamaPreTrainedModel"
    assert list(deep_imports(line)) == ["transformers.models.mllama.modeling_mllama"]
    assert not list(deep_imports("from torch.nn import functional"))
