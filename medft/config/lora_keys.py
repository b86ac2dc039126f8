"""The section `lora`: fields of peft.LoraConfig that a recipe may set, and why others are refused.

Allowed fields are listed: a field that a newer PEFT adds is refused until it is listed here. With
all of them, a model whose adapter is switched off computes what its base does.
"""

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from medft.config.strict_yaml import PathText, Section

_Rank = Annotated[int, Field(ge=1, le=2**14)]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1)]
_Layer = Annotated[int, Field(ge=0, le=10**4)]
_Layers = Annotated[list[_Layer], Field(min_length=1)]


class LoraSection(Section):
    """Targets and width of the adapter; a key that is null has PEFT's default."""

    r: _Rank = 16
    """Inner width of the update; r in arXiv:2106.09685, section 4.1."""

    alpha: int = Field(32, ge=1, le=2**20)
    """The update is scaled by alpha / r; no unit."""

    dropout: float = Field(0.05, ge=0, lt=1)
    """Fraction of the adapter's inputs set to zero in training."""

    targets: str | list[str] = "language"
    """A preset's name, a regular expression over full module names, or a list of name endings."""

    init_from: PathText | None = None
    """Run or adapter folder whose weights are the initial weights; null: a new adapter."""

    exclude_modules: _Text | _Texts | None = None
    """Targets that get no adapter: a regular expression over full names, or name endings."""

    rank_pattern: dict[_Text, _Rank] | None = None
    """Other values of r, by regular expression over the ends of module names; the first counts."""

    alpha_pattern: dict[_Text, Annotated[float, Field(gt=0, le=2**20)]] | None = None
    """Other values of alpha, by regular expression as in rank_pattern."""

    layers_to_transform: _Layer | _Layers | None = None
    """Numbers of the layers that get an adapter, counted from 0; needs targets as name endings."""

    layers_pattern: _Text | _Texts | None = None
    """Name of the list of layers that layers_to_transform counts; null: any."""

    use_rslora: bool | None = None
    """Scale the update by alpha / sqrt(r); arXiv:2312.03732."""

    use_dora: bool | None = None
    """Train the norm of each weight row apart from its direction; arXiv:2402.09353."""

    init_lora_weights: Literal[True, "gaussian", "orthogonal"] | None = None
    """Distribution of the initial weights; each leaves the base's weights as they are."""

    modules_to_save: _Texts | None = None
    """Name endings of modules of which a copy is trained and saved whole."""

    def resumed(self) -> Self:
        """The section of a run that resumes from a checkpoint, which has the weights."""
        return self.model_copy(update={"init_from": None})

    def library_fields(self) -> dict[str, Any]:
        """The fields of peft.LoraConfig that are given, but for width, scale and targets."""
        further = type(self).model_fields.keys() - OWN_NAMES.keys() - {"r", "init_from"}
        given = {name: getattr(self, name) for name in sorted(further)}
        return {name: value for name, value in given.items() if value is not None}

    def contradiction(self) -> str | None:
        """What is wrong between keys of the section that are right by themselves."""
        if self.init_from and self.init_lora_weights is not None:
            return (
                "lora.init_from and lora.init_lora_weights both give the adapter's initial "
                "weights: remove one"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            return "lora.layers_pattern needs lora.layers_to_transform: add it or remove the key"
        if self.layers_to_transform is not None and isinstance(self.targets, str):
            return (
                "lora.layers_to_transform needs lora.targets as a list of name endings, such as "
                "[q_proj, v_proj]: write one, or a regular expression that names the layers"
            )
        ranks = (self.r, *(self.rank_pattern or {}).values())
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            return (
                "lora.init_lora_weights: orthogonal needs even ranks: change lora.r or its patterns"
            )
        return None


class SiglipLoraSection(LoraSection):
    """Targets and width of an encoder's adapter."""

    targets: str | list[str] = "both_no_head"
    """A preset's name, a regular expression over full module names, or a list of name endings."""


OWN_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
"""Keys that have another name in peft.LoraConfig."""


def lora_refusal(key: str) -> str | None:
    """Why a key of `lora` is refused; None if PEFT is not known to have it."""
    if key in REFUSED_LORA_KEYS:
        return REFUSED_LORA_KEYS[key]
    return "medft does not pass it on: remove the key" if key in _library_fields() else None


def initial_refusal(value: object) -> str | None:
    """Why a value of `lora.init_lora_weights` is refused; None if it is no value of PEFT's."""
    name = str(value).lower().partition("_niter_")[0]
    return REFUSED_INITIAL_WEIGHTS.get(name)


def _library_fields() -> set[str]:
    from peft import LoraConfig

    return {field.name for field in dataclasses.fields(LoraConfig)} - set(OWN_NAMES.values())


_BOOKKEEPING = "PEFT writes it into what it saves: remove the key"
_DATA_PASS = "it belongs to initial weights that need a pass over the data: remove the key"
_MEGATRON = "it names code for layers of Megatron, which no base of medft has: remove the key"
_QALORA = (
    "it acts on GPTQ bases only, and without a word on no other: write the section quantization"
)
_OTHER_LOSS = "it needs a term of the loss that medft does not add: remove the key"

REFUSED_LORA_KEYS = {
    "alora_invocation_tokens": "the adapter would act only behind these tokens, and stay untrained "
    "where a row lacks them: remove the key",
    "arrow_config": "it chooses among several trained adapters, and medft trains one: remove it",
    "auto_mapping": _BOOKKEEPING,
    "base_model_name_or_path": "the base stands in model.base: remove the key",
    "bias": "trained biases stay when the adapter is switched off, which then is not the base: "
    "name the modules in lora.modules_to_save",
    "corda_config": _DATA_PASS,
    "ensure_weight_tying": "medft refuses to train one of two tied modules by itself: remove it",
    "eva_config": _DATA_PASS,
    "fan_in_fan_out": "it is for transposed weights, which no base of medft has: remove the key",
    "inference_mode": "a recipe trains: remove the key",
    "kasa_config": f"it changes the base beneath the adapter, and {_OTHER_LOSS}",
    "layer_replication": "it makes a base of more layers beneath the adapter: make that model "
    "first and give its folder as model.base",
    "loftq_config": "it acts with init_lora_weights: loftq only, which is refused: write the "
    "section quantization",
    "lora_bias": "an adapter that has it cannot be merged: remove the key",
    "lora_ga_config": _DATA_PASS,
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": _OTHER_LOSS,
    "peft_type": _BOOKKEEPING,
    "peft_version": _BOOKKEEPING,
    "qalora_group_size": _QALORA,
    "revision": "it stands in model.revision: remove the key",
    "runtime_config": "it is not saved with the adapter: remove the key",
    "target_parameters": "it is for weights outside linear layers, which no base of medft has: "
    "write lora.targets",
    "task_type": "it follows from the recipe's type: remove the key",
    "trainable_token_indices": "the loss reads the head's weight directly, which PEFT's layer for "
    "single tokens lacks where embeddings are tied: remove the key",
    "use_bdlora": "it shapes adapters for one way of serving them: remove the key",
    "use_qalora": _QALORA,
    "velora_config": "it makes gradients approximate to save memory: write "
    "train.gradient_checkpointing: true",
}
"""Reasons for refusing fields of peft.LoraConfig."""

_CHANGES_BASE = "it changes the base beneath the adapter, which switched off is then not the base"

REFUSED_INITIAL_WEIGHTS = {
    "corda": f"{_CHANGES_BASE}, and needs a pass over the data",
    "eva": "it needs a pass over the data, without which PEFT draws the default",
    "false": "it draws lora_B at random, so that the model of step 0 is not the base",
    "loftq": "it quantizes the base by itself: write the section quantization",
    "lora_ga": f"{_CHANGES_BASE}, and needs a pass over the data",
    "mica": "it trains lora_A alone, and medft trains both matrices",
    "olora": _CHANGES_BASE,
    "pissa": _CHANGES_BASE,
}
"""Reasons for refusing values of lora.init_lora_weights."""
