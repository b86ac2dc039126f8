"""Merges an adapter into its base: a folder that plain transformers loads.

`original` merges into the base's own weights, in the precision they are stored in. After training
on a 4-bit base the merged model differs a little from the trained one, which saw quantized weights.
"""

from pathlib import Path

from transformers import AutoModelForImageTextToText

from medft.config.recipe import ModelSection
from medft.files import check_folder_for_output, complete_folder
from medft.models.base import check_local_base, load_processor, load_weights
from medft.models.lora import load_adapter
from medft.models.saved import check_same_base, find_adapter, read_saved_record, write_saved_record
from medft.siglip.model import load_adapted
from medft.siglip.pooling_head import join_pooling_head


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
    record = read_saved_record(adapter)
    base = ModelSection(base=str(Path(record["base"]).expanduser()), revision=record["revision"])
    check_local_base(base)
    check_same_base(base, record)
    processor = load_processor(ModelSection(base=str(adapter)))
    if record["family"] == "siglip":
        adapted = load_adapted(base, adapter)
    else:
        model = load_weights(AutoModelForImageTextToText, base, dtype="auto")
        adapted = load_adapter(model, adapter)
    merged = adapted.merge_and_unload(safe_merge=True)
    if record.get("splits_head"):
        join_pooling_head(merged)
    with complete_folder(out) as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
        write_saved_record(draft, {**record, "merged_onto": "original"})
    return adapter
