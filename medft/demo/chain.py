"""The demo: every step of the pipeline, one after the other, with the commands a user types."""

import logging
import shutil
import time
from pathlib import Path

from medft.data.chat import write_chat
from medft.data.prepare import prepare
from medft.demo.bases import build_decoder, build_siglip
from medft.demo.phantoms import draw_phantoms
from medft.demo.report import write_report
from medft.errors import RunError
from medft.export.merge import merge
from medft.files import check_folder_for_output
from medft.launch import shipped, train

SEED = 17

MARKER = ".medft-demo"
"""Tells a demo's folder, which the next demo deletes, from any other."""

logger = logging.getLogger(__name__)


def run_demo(out: Path) -> Path:
    """Draw data, prepare it, train both models, merge them; returns the path of report.html.

    Args:
        out: folder of the demo; an earlier demo in it is replaced.

    Raises:
        RunError: the folder is not the demo's, or a training failed.
    """
    check_folder_for_output(out, allow_content=(out / MARKER).is_file())
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    started = time.monotonic()
    data, models = out / "data", out / "models"

    logger.info("drawing pictures into %s", data / "raw")
    sources = draw_phantoms(data / "raw", patients=160, seed=SEED)
    summary = prepare(sources, data)
    write_chat(data / "pairs.parquet", data / "chat")
    logger.info("%s pairs, %s", summary["pairs"], summary["splits"])

    logger.info("building tiny base models in %s", models)
    build_siglip(models / "siglip", seed=SEED)
    build_decoder(models / "decoder", seed=SEED)

    for kind in ("siglip", "decoder"):
        logger.info("training %s", kind)
        recipe = shipped(f"recipes/{kind}/tiny.yaml")
        overrides = [
            f"model.base={models / kind}",
            f"data.train={data / 'chat' / 'train.jsonl'}",
            f"data.validation={data / 'chat' / 'validation.jsonl'}",
            f"train.output_dir={out / kind}",
        ]
        code = train(recipe, overrides, None)
        if code:
            raise RunError(f"expected the training of {kind} to end well, it ended with {code}")
        merge(out / kind, out / f"{kind}_merged")
    return write_report(out, summary, seconds=time.monotonic() - started)
