"""Every use of a library that its documentation does not promise, and the versions tested with it.

These are names with an underscore, functions below a library's public modules, and attributes,
keywords and classes that any release may rename. Each has a test of its name in
tests/test_compat.py. Names of modules that hold weights are not here: files depend on them.

What only one architecture needs is imported where it is used, so that a release without it stops
that architecture alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedConfig, ProcessorMixin, Trainer, TrainerControl
from transformers.integrations import (
    get_available_reporting_integrations,
    unset_hf_deepspeed_config,
)
from transformers.trainer_pt_utils import safe_globals

from medft.errors import RunError
from medft.provenance import package_versions

TESTED = {
    "accelerate": ["1.15"],
    "bitsandbytes": ["0.50"],
    "datasets": ["5.2"],
    "deepspeed": ["0.19"],
    "peft": ["0.21"],
    "torch": ["2.11", "2.13", "2.15"],
    "transformers": ["5.17", "5.23", "5.24"],
    "trl": ["1.16"],
}
"""Minor versions that the test suite was run with."""


def untested_versions() -> dict[str, str]:
    """The installed versions that lie outside the tested minors, by package."""
    return {
        name: version
        for name, version in package_versions().items()
        if name in TESTED and ".".join(version.split(".")[:2]) not in TESTED[name]
    }


class HookedTrainer(Trainer):
    """A Trainer whose private hooks have public names, to be overridden or called."""

    control: TrainerControl

    def to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Model inputs with their tensors on the trainer's device."""
        return self._prepare_inputs(inputs)

    def train_sampler(self) -> Sampler | None:
        """The order of training rows."""
        return super()._get_train_sampler(self.train_dataset)

    def saved(self, folder: Path) -> None:
        """Called on the process that writes, after weights were written to a folder."""

    def restored(self, folder: Path, model: nn.Module) -> None:
        """Called after weights of a checkpoint were loaded into the model."""

    def write_model(self, folder: Path) -> None:
        """Write weights and processor to a folder; called on every process."""
        self.save_model(str(folder), _internal_call=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _restoring(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _restoring(checkpoint):
            super()._load_rng_state(checkpoint)

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last step, as after one; called on every process."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def make_up_for_evaluation(self) -> None:
        """Evaluate as after a step, which may end the training; called as it begins."""
        self._determine_best_metric(self._evaluate(None, None), None)

    def _run_epoch(self, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # Trainer looks after a step alone
            super()._run_epoch(**kwargs)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint."""
        self._load_from_checkpoint(str(checkpoint))

    def _prepare_input(self, data: Any) -> Any:
        """Move the fields of a dataclass to the device, too, which the library does not do."""
        if not is_dataclass(data) or isinstance(data, type):
            return super()._prepare_input(data)
        moved = {part.name: self._prepare_input(getattr(data, part.name)) for part in fields(data)}
        return replace(data, **moved)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self.train_sampler()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            self.saved(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with _restoring(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.restored(Path(resume_from_checkpoint), self.model if model is None else model)


@contextmanager
def _restoring(checkpoint: str | None) -> Iterator[None]:
    """Convert an exception on the content of a checkpoint to a RunError of one sentence."""
    try:
        yield
    except Exception as error:  # foreign files make the libraries raise any exception
        raise RunError(
            f"expected a checkpoint of this run in {checkpoint}, it cannot be restored: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}: take another one"
        ) from error


class TokenScores(NamedTuple):
    """What a model gives the labels of B rows of S tokens."""

    log_probs: Tensor
    """[B, S] log-probability of each label, 0 where nothing is supervised."""

    is_top1: Tensor
    """[B, S] whether the label is the most probable token."""

    is_supervised: Tensor
    """[B, S] whether there is a label."""


def score_labels(model: nn.Module, inputs: Mapping[str, Any]) -> TokenScores:
    """Scores of the labels in a batch, by the fused head of a model that an SFTTrainer changed."""
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    return TokenScores(outputs.log_probs, outputs.is_top1, outputs.label_mask)


def gather_last_batch_whole(loader: Any) -> None:
    """Stop Accelerate from cutting what processes gather of an epoch's last batch by its rows."""
    loader._drop_last = True


def reporting_integrations() -> list[str]:
    """Names that `report_to` may take on this machine."""
    return get_available_reporting_integrations()


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention that a loaded model of this configuration runs."""
    return config._attn_implementation


def resizes_by_pillow(processor: ProcessorMixin) -> bool:
    """Whether images are resized by Pillow, not by torchvision."""
    return type(processor.image_processor).__name__.endswith("Pil")


def checkpointing_layers(module: nn.Module) -> list[Any]:
    """The layers inside a module that gradient checkpointing is switched on for, one by one."""
    return [layer for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with a LoRA adapter."""
    return isinstance(module, LoraLayer)


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights of a parameter, also if packed (4-bit) or sharded (ZeRO-3)."""
    stored = getattr(parameter, "ds_numel", parameter.numel())
    return stored * (2 if type(parameter).__name__ == "Params4bit" else 1)


def keep_trainable_on_cpu(layer: Any) -> None:
    """Stop a 4-bit layer from being repacked into a format without gradient.

    On CPUs with AVX512-BF16, bitsandbytes does so at its first forward in eval mode.
    """
    layer.support_avx512bf16_for_cpu = False


@contextmanager
def unsharded(plugin: DeepSpeedPlugin | None) -> Iterator[None]:
    """A block in which models are built whole, even under ZeRO-3, whose plugin is given."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()


_DEEPSPEED_STATES = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Classes in DeepSpeed's checkpoints, which it unpickles without a limit."""


def names_in_pickle(path: Path) -> list[str]:
    """What unpickling a file of torch, of which nothing runs here, would import beyond torch's own.

    Raises:
        Exception: it is no file of torch.save, or has instructions that torch never writes.
    """
    with safe_globals():
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return sorted({*found} - _DEEPSPEED_STATES)


def reset_accelerator() -> None:
    """Forget the precision, devices and processes of earlier trainers in this process."""
    AcceleratorState._reset_state(True)


def replace_position_embedding(embeddings: Any, weight: Tensor, *, image_size: int) -> None:
    """Give SigLIP's vision embeddings other positions.

    Args:
        embeddings: of the vision tower.
        weight: [patches, D] of the positions.
        image_size: side of the square input that has as many patches, in pixels.
    """
    positions = torch.arange(len(weight), device=weight.device).expand(1, -1)
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.num_patches = embeddings.num_positions = len(weight)
    embeddings.image_size = image_size
    embeddings.register_buffer("position_ids", positions, persistent=False)


MLLAMA_SEES_IMAGE = "full_text_row_masked_out_mask"
"""Keyword by which a cross-attention layer of Mllama gets, [B, 1, S, 1], whether a token sees any
image; None if all do."""


def mllama_cross_attention_layers(model: nn.Module) -> list[Any]:
    """The layers of an Mllama that attend to images."""
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    return [m for m in model.modules() if isinstance(m, MllamaCrossAttentionDecoderLayer)]


def mllama_cross_attention_mask(
    input_ids: Tensor,
    num_tiles: Sequence[Sequence[int]],
    *,
    image_token_id: int,
    max_image_tiles: int,
) -> Tensor:
    """Which token sees which tile, 1 or 0, as [B, S, I, T].

    Args:
        input_ids: [B, S].
        num_tiles: of each row's images.
        image_token_id: id of the token that stands for an image.
        max_image_tiles: T.
    """
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    spans = [get_cross_attention_token_mask(row, image_token_id) for row in input_ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(
        spans, num_tiles=num_tiles, max_num_tiles=max_image_tiles, length=input_ids.shape[1]
    )
    return torch.from_numpy(mask)


def mllama_canvas(height: int, width: int, *, max_image_tiles: int, tile: int) -> tuple[int, int]:
    """Height and width of the tiles, side by side, that Mllama cuts an image into; in pixels.

    Args:
        height: of the image.
        width: of the image.
        max_image_tiles: maximum.
        tile: side of one.
    """
    from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

    return get_optimal_tiled_canvas(height, width, max_image_tiles, tile)


def mllama_size_on_canvas(
    height: int, width: int, *, canvas: tuple[int, int], tile: int
) -> tuple[int, int]:
    """Height and width of an image once it is resized for a canvas from `mllama_canvas`."""
    from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas

    resized = get_image_size_fit_to_canvas(height, width, *canvas, tile)
    return int(resized[0]), int(resized[1])


def mllama_aspect_ratios(max_image_tiles: int) -> list[tuple[int, int]]:
    """The tile arrangements of an image, in the order of their ids, which begin at 1."""
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_all_supported_aspect_ratios,
    )

    return get_all_supported_aspect_ratios(max_image_tiles)


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for tensors that share memory, and on the meta device, too."""
    return tensor.untyped_storage()._cdata


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if torch.is_tensor(leaf)]


def operator_of(overload: Any) -> Any:
    """The operator of one of its overloads, as a key of torch's FLOP formulas."""
    return overload._overloadpacket


def cpu_attention() -> tuple[Any, Any]:
    """The operators of the CPU's fused attention, forward and backward."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
