"""The recipe of a command line."""

from pathlib import Path

from medft.config.recipe import AnyRecipe, DecoderRecipe, Recipe, SiglipRecipe
from medft.config.strict_yaml import StrictYaml
from medft.errors import RecipeError
from medft.files import packaged_file
from medft.foreign import read_json


def split_arguments(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe file, if one is named, and the overrides of a command line.

    Raises:
        RecipeError: a word is neither the one recipe file nor an override.
    """
    file = Path(argv[0]) if argv and "=" not in argv[0] else None
    overrides = argv[1:] if file else argv
    for word in overrides:
        if "=" not in word or word.startswith("-"):
            raise RecipeError(
                f"expected RECIPE.yaml [section.key=value ...], got {word!r}: "
                f"write an override such as train.learning_rate=1e-4"
            )
    return file, overrides


def read_recipe(kind: type[AnyRecipe], argv: list[str]) -> AnyRecipe:
    """The recipe of a script's command line; without a file, the packaged default of its class.

    Raises:
        RecipeError: the words or the recipe are wrong.
    """
    file, overrides = split_arguments(argv)
    return kind.load(file or packaged_file(f"recipes/{kind.default_file}"), overrides)


def recipe_class(file: Path, overrides: list[str]) -> type[Recipe]:
    """The recipe class of a file, from its sections, else from the config or name of its base.

    The hub is not queried; the checks of the base find a wrong guess.

    Raises:
        RecipeError: the file cannot be read.
    """
    source = StrictYaml.read(file)
    for override in overrides:
        source.override(override)
    if "contrastive" in source.raw:
        return SiglipRecipe
    if source.raw.get("quantization"):
        return DecoderRecipe
    model = source.raw.get("model")
    base = model.get("base") if isinstance(model, dict) else None
    if not isinstance(base, str):
        return DecoderRecipe
    return SiglipRecipe if _model_type(base) == "siglip" else DecoderRecipe


def _model_type(base: str) -> str | None:
    """The model_type of a base on this machine; where it is not, siglip if its name says so."""
    from transformers import PreTrainedConfig

    try:
        if Path(base).is_dir():
            content = read_json(Path(base) / "config.json", strict=False)
        else:
            content, _ = PreTrainedConfig.get_config_dict(base, local_files_only=True)
        return content.get("model_type")
    except (OSError, ValueError, AttributeError):  # the checks of the base say what is wrong
        return "siglip" if "siglip" in base.lower() else None
