"""An adapter folded into its base: a folder that plain transformers loads.

`original` merges into the base's own weights, in the precision they are stored in. After training
on a 4-bit base the merged model differs a little from the trained one, which saw rounded weights.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForImageTextToText

from medft.adapters import load_adapter, read_notes, write_notes
from medft.base import check_local_base, load_processor, load_weights
from medft.errors import BaseModelError, RunError
from medft.files import check_folder_for_output, complete_folder
from medft.provenance import folder_sha256
from medft.recipe import ModelSection
from medft.runs import read_record
from medft.siglip.model import resize_positions, restore_scale_and_bias


def merge(source: Path, out: Path) -> Path:
    """Merge a run's adapter into the original weights of its base, and write model and processor.

    Args:
        source: a run directory (its adapter/ is taken) or an adapter folder such as best_model/.
        out: folder; must be empty or not exist.

    Returns:
        The adapter folder that was merged.

    Raises:
        RunError: the run has no finished adapter, or `out` is not empty.
        BaseModelError: the base is missing or not the one that was trained.
    """
    adapter = find_adapter(source)
    check_folder_for_output(out)
    notes = read_notes(adapter)
    base = ModelSection(base=str(Path(notes["base"]).expanduser()), revision=notes["revision"])
    check_local_base(base)
    check_same_base(base, notes)
    processor = load_processor(ModelSection(base=str(adapter)))
    is_siglip = notes["family"] == "siglip"
    model_class = AutoModel if is_siglip else AutoModelForImageTextToText
    model = load_weights(model_class, base, dtype="auto")
    if is_siglip:
        resize_positions(model, notes["image_size"])
    adapted = load_adapter(model, adapter)
    if is_siglip:
        restore_scale_and_bias(adapted, adapter)
    merged = adapted.merge_and_unload(safe_merge=True)
    with complete_folder(out) as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
        write_notes(draft, {**notes, "merged_onto": "original"})
    return adapter


def find_adapter(source: Path) -> Path:
    """The adapter folder that a path means.

    Raises:
        RunError: the path is neither a finished run nor an adapter.
    """
    if (source / "run.json").is_file():
        status = read_record(source).get("status")
        if status != "completed":
            raise RunError(
                f"expected a completed run in {source}, its status is {status}: resume it, or "
                f"give its best_model/ or a checkpoint"
            )
        source = source / "adapter"
    if not (source / "adapter_config.json").is_file():
        raise RunError(
            f"expected a run or an adapter folder, {source} holds no adapter_config.json: "
            f"give the output_dir of a run with lora"
        )
    return source


def check_same_base(base: ModelSection, notes: dict[str, Any]) -> None:
    """Refuse a base folder whose files are not those that the adapter was trained on.

    Raises:
        BaseModelError: the content hash differs.
    """
    if "sha256" in notes and folder_sha256(Path(base.base)) != notes["sha256"]:
        raise BaseModelError(
            f"expected the base that the adapter was trained on in {base.base}, its files "
            f"have changed: restore them"
        )
