"""Imports point in one direction: a part may use what stands before it, never what stands after."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "medft"

# Parts in the order in which they may be used; parts on one line do not use each other.
ORDER = [
    ["errors"],
    ["files", "pages"],
    ["provenance"],
    ["config"],
    ["metrics"],
    ["data"],
    ["models"],
    ["training"],
    ["decoder", "siglip"],
    ["trained", "check"],
    ["evaluation", "inference", "export"],
    ["demo"],
    ["cli"],
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found.append(node.module)
    return [name for name in found if name and name.startswith("medft.")]


def wrong_imports(part: str, source: str) -> list[str]:
    return [
        name
        for name in imported_modules(source)
        if part_of(name) != part and RANK[part_of(name)] >= RANK[part]
    ]


def sources() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE).with_suffix("").parts
        if inner != ("__init__",):
            found.append((inner[0], path))
    return found


def test_every_part_has_its_place_and_imports_only_what_comes_before():
    found = sources()
    assert len(found) > 20
    assert {part for part, _ in found} == set(RANK)
    wrong = {
        str(path): bad for part, path in found if (bad := wrong_imports(part, path.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("decoder", "from medft.siglip.loss import sigmoid_loss"),
        ("errors", "import medft.config.recipe"),
        ("data", "def f():\n    from medft.decoder import model"),
    ],
)
def test_a_planted_import_in_the_wrong_direction_is_found(part, line):
    assert wrong_imports(part, line)
    assert not wrong_imports("cli", line)


def test_recipe_scripts_are_short_and_never_imported():
    for script in (PACKAGE.parent / "recipes").glob("*.py"):
        assert len(script.read_text().splitlines()) < 120
    assert not any("recipes." in name for _, path in sources() for name in [path.read_text()])
