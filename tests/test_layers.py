"""Imports point up: a file uses what stands above it in HOUSE, never what stands below."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "medft"

# A new file is added where everything that it imports stands above it.
HOUSE = """
    foreign masking full_disk library_lines errors
    files pages provenance compat
    config/ strict_yaml advice lora_keys train_keys recipe command_line
    metrics/ bootstrap text retrieval lexicon pieces sides assertions findings predictions scores
    data/ template draft_guard table_row source_file bit_depth images plain_content stored_image
    data/ encoding csv_rows json_rows parquet_parts tables
    data/ dicom_files decoder_process dicom_codecs dicom_image dicom_reports dicom
    data/ splits source_section study_order chosen_images sources identifiers group_key clearing
    data/ groups pair_columns pairs
    data/ kept_split assign row_images pairing accounting wide_images workers
    data/ charts statistics sentences image_sentences report prepare
    data/ messages chat_rows rows decoded overlap prompts chat tokens
    models/ model_folder base patterns effects run_record resolved saved adapter lora frozen
    training/ signals random_states process run_lock deepspeed launched arguments checkpoints
    training/ schedule broken_data mixed_precision trainer best_model results progress doubts
    training/ callbacks overflow curves parts same_run memory failures resume run
    training/ compare_runs quiet_launcher launch
    decoder/families/ base mllama gemma_names paligemma gemma3 __init__
    decoder/ vision_cache frozen_tower conversation sampler checks collator
    decoder/ measured_rows prepared model generator trainer build
    siglip/ pooling_head model locked_towers loss floor distributed exact_batch
    siglip/ augmentation collator checks prepared embedder trainer build
    check
    evaluation/ rows items controls predictions limits seen labels chart report evaluate
    inference/ cases prompts predictor __init__ inputs records files
    export/ unfixed merge
    demo/ bases phantoms exports pretrain report chain
    since_then reproducible reproduce
    command_parser cli
"""
STRANGERS = ("medft.decoder", "medft.siglip")
"""Parts that never import each other."""


def house() -> list[str]:
    """Names of modules, from the ground up."""
    modules = []
    for line in HOUSE.split("\n"):
        folder, _, names = line.strip().rpartition("/ ")
        prefix = ".".join(["medft", *filter(None, folder.split("/"))])
        modules += [f"{prefix}.{name}".removesuffix(".__init__") for name in names.split()]
    return modules


RANK = {module: rank for rank, module in enumerate(house())}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in inner if name in RANK] or [node.module]
    return [name for name in found if name.startswith("medft.")]


def wrong_imports(module: str, source: str) -> list[str]:
    own = next((part for part in STRANGERS if module.startswith(part)), None)
    other = tuple(part for part in STRANGERS if own and part != own)
    return [
        name
        for name in imported_modules(source)
        if RANK[name] >= RANK[module] or name.startswith(other)
    ]


def sources() -> dict[str, str]:
    found = {module_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    return {m: text for m, text in found.items() if m in RANK or imported_modules(text)}


def test_every_file_has_its_place_and_imports_only_what_stands_above_it():
    found = sources()
    assert len(found) > 60
    assert found.keys() == RANK.keys()
    assert len(RANK) == len(house())
    wrong = {module: bad for module, text in found.items() if (bad := wrong_imports(module, text))}
    assert not wrong


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("medft.siglip.trainer", "from medft.decoder.model import load_model"),
        ("medft.errors", "import medft.config.recipe"),
        ("medft.data.rows", "def f():\n    from medft.decoder import model"),
        ("medft.data.rows", "from medft.data.chat import write_chat"),
    ],
)
def test_a_planted_import_in_the_wrong_direction_is_found(module, line):
    assert wrong_imports(module, line)
    assert not wrong_imports("medft.cli", line)


def test_no_file_is_too_long_to_have_one_reason():
    lengths = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_recipe_scripts_are_short_and_never_imported():
    for script in (PACKAGE.parent / "recipes").glob("*.py"):
        assert len(script.read_text().splitlines()) < 120
    texts = "\n".join(sources().values())
    assert not re.search(r"^\s*(from|import) recipes\b", texts, flags=re.MULTILINE)
