"""Merges an adapter into its base: a folder that plain transformers loads.

`original` merges into the base's own weights, in the precision they are stored in. After training
on a 4-bit base the merged model differs a little from the trained one, which saw quantized weights.
"""

from pathlib import Path

from medft.config.recipe import ModelSection
from medft.decoder.model import load_saved as load_saved_decoder
from medft.files import check_folder_for_output, complete_folder
from medft.models.base import load_processor
from medft.models.saved import find_saved_adapter
from medft.siglip.model import load_saved as load_saved_siglip
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
    saved = find_saved_adapter(source)
    check_folder_for_output(out)
    processor = load_processor(ModelSection(base=str(saved.folder)))
    if saved.is_encoder:
        adapted = load_saved_siglip(saved)
    else:
        adapted = load_saved_decoder(saved, as_stored=True)
    merged = adapted.merge_and_unload(safe_merge=True)
    if saved.record.splits_head:
        join_pooling_head(merged)
    with complete_folder(out) as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
        saved.record.model_copy(update={"merged_onto": "original"}).write(draft)
    return saved.folder
