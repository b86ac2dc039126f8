"""Recipe files: YAML in, frozen and validated sections out.

Nothing in a recipe is ignored: an unknown key, a value of the wrong type, a key given twice and a
key that medft owns are errors that name the file, the line and what to write instead. All wrong
keys are reported at once; only then are contradictions between keys checked. Loading a recipe reads
the file and nothing else.
"""

import functools
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field
from ruamel.yaml import YAML

from medft.config.advice import KeyPath, right_key
from medft.config.lora_keys import LoraSection, SiglipLoraSection, initial_refusal, lora_refusal
from medft.config.strict_yaml import ErrorDetails, PathText, Section, StrictYaml, errors_of
from medft.config.train_keys import TrainSection, train_refusal
from medft.errors import RecipeError


class ModelSection(Section):
    """The base model and its precision."""

    base: PathText
    """Hub id or local folder."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the base's weights and of the computation; no other key sets precision."""


class DecoderModelSection(ModelSection):
    """The base of a decoder."""

    # recorded in medft.json, since it differs from stock inference
    cross_attention_fix: bool = False
    """Mllama: no cross-attention for tokens that may see no image, so that rows are independent."""

    vision_cache: PathText | None = None
    """Folder that caches the projected outputs of the frozen vision tower for later epochs."""

    vision_cache_gb: float = Field(200, gt=0, le=10**9)
    """10^9 bytes that this folder may reach; what does not fit is recomputed in each epoch."""


class DataSection(Section):
    """The training and validation rows."""

    train: PathText
    """File of training rows: chat JSONL, or pairs.parquet (its split `train`)."""

    validation: PathText | None = None
    """File of validation rows: chat JSONL, or pairs.parquet (its split `validation`)."""

    allow_overlap: bool = False
    """Validation rows may share a group, or images and text, with training; it is recorded."""


class DecoderDataSection(DataSection):
    """The rows of a decoder."""

    max_length: int = Field(512, ge=1, le=2**20)
    """Tokens per row at most; longer answers are truncated."""

    too_long: Literal["error", "drop"] = "error"
    """Row whose prompt leaves no room for an answer; error: raise, drop: leave it out."""

    max_image_tiles: int = Field(4, ge=1, le=4)
    """Tiles per image at most (Mllama); a larger image is shrunk."""


class SiglipDataSection(DataSection):
    """The pairs of an encoder."""

    max_length: int = Field(64, ge=1, le=2**20)
    """Tokens per caption; every caption is padded or truncated to exactly this length."""

    image_size: int = Field(448, ge=1, le=2**13)
    """Pixels per side of the square input; position embeddings are interpolated once, at load."""

    caption: str | None = None
    """Template over the row, such as "{question} {answer}"; null: the first assistant text."""

    random_rotation: float = Field(0, ge=0, le=45)
    """Degrees by which a training image is rotated at most, in either direction."""

    random_crop: float = Field(1, gt=0, le=1)
    """Smallest fraction of each side that a training image keeps."""

    random_brightness: float = Field(0, ge=0, lt=1)
    """Largest fraction by which a training image is made brighter or darker."""

    random_flip: bool = False
    """Mirror a training image with probability 0.5; swaps left and right, which reports name."""


class QuantizationSection(Section):
    """How bitsandbytes stores the frozen base."""

    bits: Literal[4] = 4
    """Bits per weight."""

    type: Literal["nf4", "fp4"] = "nf4"
    """Number format."""

    double_quant: bool = True
    """Quantize the quantization constants too."""

    skip: list[Literal["vision", "projector", "lm_head"]] = Field(
        ["vision", "projector", "lm_head"]
    )
    """Parts of the model that stay in model.dtype."""


class ContrastiveSection(Section):
    """The contrastive loss of the encoder."""

    loss: Literal["sigmoid", "softmax", "row_sigmoid"] = "sigmoid"
    """sigmoid: arXiv:2303.15343; softmax: CLIP; row_sigmoid: a row-normalized variant."""

    exact_batch: bool = True
    """Compare every image with every text of the effective batch, not of a micro-batch only."""

    positives: Literal["diagonal", "caption", "group"] = "caption"
    """Matching texts: own (diagonal), equal (caption), equal with group's rest ignored (group)."""

    scale_lr: float = Field(1.0, ge=0, le=10**9)
    """Learning-rate multiplier of logit_scale and logit_bias; no unit."""


class Recipe(Section):
    """The configuration of a run; every type has `model`, `data`, `lora` and `train`."""

    kind: ClassVar[str]
    script: ClassVar[str]
    default_file: ClassVar[str]

    model: ModelSection
    data: DataSection
    lora: LoraSection | None
    train: TrainSection

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """The recipe of a file, with `section.key=value` overrides applied.

        Raises:
            RecipeError: the file cannot be read, or anything in it is wrong.
        """
        source = StrictYaml.read(path)
        for override in overrides:
            source.override(override)
        errors = errors_of(lambda: cls.model_validate(source.raw))
        problems = source.describe(errors, functools.partial(_explain, kind=cls))
        if not problems:
            recipe = _with_evaluation(cls.model_validate(_expand_home(source.raw)))
            problems = [f"{source.path}: {problem}" for problem in contradictions(recipe)]
        if problems:
            raise RecipeError(*problems)
        return recipe

    def initial_lora(self, *, resumes: bool) -> LoraSection | None:
        """The section `lora`; without `init_from` if the run resumes, from its own weights."""
        return self.lora.resumed() if self.lora and resumes else self.lora

    def dump(self) -> str:
        """The resolved recipe as YAML; loading it gives an equal recipe."""
        return dump_sections(self.model_dump())


class DecoderRecipe(Recipe):
    """A recipe for decoder_qlora.py."""

    kind = "decoder"
    script = "decoder_qlora.py"
    default_file = "decoder/llama32_11b_24gb.yaml"

    model: DecoderModelSection
    data: DecoderDataSection
    quantization: QuantizationSection | None = QuantizationSection()
    lora: LoraSection | None = LoraSection()


class SiglipRecipe(Recipe):
    """A recipe for siglip_lora.py."""

    kind = "siglip"
    script = "siglip_lora.py"
    default_file = "siglip/siglip_base_448.yaml"

    data: SiglipDataSection
    lora: SiglipLoraSection | None = SiglipLoraSection()
    contrastive: ContrastiveSection = ContrastiveSection()


def dump_sections(sections: dict[str, Any]) -> str:
    """The sections of a recipe as YAML, in the order of the shipped recipes."""
    order = ["model", "data", "quantization", "lora", "contrastive", "train"]
    stream = StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump({name: sections[name] for name in order if name in sections}, stream)
    return stream.getvalue()


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

RECIPE_KINDS: dict[str, type[Recipe]] = {kind.kind: kind for kind in (DecoderRecipe, SiglipRecipe)}
"""Recipe classes by their `kind`."""


def _with_evaluation(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe; with validation rows, what decides when and by what is judged gets defaults."""
    if recipe.data.validation is None:
        return recipe
    train = recipe.train
    defaults: dict[str, Any] = {
        "eval_strategy": "steps",
        "metric_for_best_model": "eval_loss",
    }
    if train.eval_strategy in (None, "steps"):
        defaults["eval_steps"] = 0.1
    missing = {key: value for key, value in defaults.items() if getattr(train, key) is None}
    return recipe.model_copy(update={"train": train.model_copy(update=missing)})


def _expand_home(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _expand_home(value) for key, value in content.items()}
    is_path = isinstance(content, str) and content.startswith("~/")
    return str(Path(content).expanduser()) if is_path else content


def contradictions(recipe: Recipe) -> list[str]:
    """The first error that checks of single keys do not find, in a list; else an empty list."""
    if isinstance(recipe, DecoderRecipe):
        if recipe.quantization and "lm_head" not in recipe.quantization.skip:
            return ["quantization.skip lacks lm_head, whose weight the loss reads directly: add it"]
        if recipe.quantization and recipe.lora is None:
            return [
                "lora: null trains every weight, which a 4-bit base does not allow: "
                "write quantization: null, or give lora"
            ]
        if recipe.quantization and recipe.lora and recipe.lora.init_lora_weights == "orthogonal":
            return [
                "lora.init_lora_weights: orthogonal takes the precision of the base's weights, and "
                "quantization stores integers: write gaussian, or quantization: null"
            ]
    if (
        isinstance(recipe, SiglipRecipe)
        and "train_sampling_strategy" in recipe.train.model_fields_set
    ):
        return [
            "train.train_sampling_strategy groups rows by length, and all captions are padded to "
            "the same: remove it"
        ]
    if recipe.lora and (problem := recipe.lora.contradiction()):
        return [problem]
    patience = recipe.train.early_stopping_patience
    if patience is None and recipe.train.early_stopping_threshold is not None:
        return ["train.early_stopping_threshold needs train.early_stopping_patience: add it"]
    if patience is not None and recipe.data.validation is None:
        return [
            "train.early_stopping_patience counts evaluations and data.validation is missing: "
            "give a validation file or remove it"
        ]
    evaluates = recipe.train.eval_strategy not in (None, "no")
    if evaluates and recipe.data.validation is None:
        return [
            "train.eval_strategy asks for evaluations and data.validation is missing: "
            "give a validation file or remove train.eval_strategy"
        ]
    if recipe.train.eval_strategy == "epoch" and recipe.train.eval_steps is not None:
        return [
            "train.eval_steps counts steps and train.eval_strategy is epoch: write "
            "train.eval_strategy: steps, or remove train.eval_steps"
        ]
    if recipe.data.validation is not None and not evaluates:
        return [
            'data.validation is given and train.eval_strategy is "no", so it would never be read: '
            'write "epoch" or "steps", or data.validation: null'
        ]
    return []


def _explain(error: ErrorDetails, *, kind: type[Recipe]) -> str | None:
    """The sentence for a recipe-specific error, else None."""
    keys = tuple(str(key) for key in error["loc"][:2])
    name = ".".join(keys)
    if error["type"] == "missing":
        required = {"model": "model.base", "data": "data.train", "train": "train.output_dir"}
        return f"{required.get(name, name)} is required and missing: add it"
    if name == "lora.init_lora_weights" and (reason := initial_refusal(error["input"])):
        value = str(error["input"]).lower()
        return f"{name}: {value} is refused: {reason}: write true, gaussian or orthogonal"
    if error["type"] != "extra_forbidden":
        return None
    refusals = {"train": train_refusal, "lora": lora_refusal}
    if len(keys) == 2 and keys[0] in refusals and (reason := refusals[keys[0]](keys[1])):
        return f"{name} is refused: {reason}"
    others = {other.kind: key_paths(other) for other in RECIPE_KINDS.values() if other is not kind}
    return f"unknown key {name}: {right_key(keys, key_paths(kind), others)}"


def key_paths(kind: type[Recipe]) -> list[KeyPath]:
    """Paths of every section and key of a recipe class."""
    paths: list[KeyPath] = [(section,) for section in kind.model_fields]
    for section, field in kind.model_fields.items():
        hints = getattr(field.annotation, "__args__", (field.annotation,))
        for hint in hints:
            if isinstance(hint, type) and issubclass(hint, Section):
                paths += [(section, key) for key in hint.model_fields]
    return paths
