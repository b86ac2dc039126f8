"""Scores the demo, on several seeds, on images drawn after its settings were chosen.

    python benchmarks/demo_seeds.py [SEED ...]      (default: 17 23 42)

For each seed the complete demo runs (images, bases and training from that seed), then both models
are evaluated on the validation split (99 %) of 300 new pairs of new patients. Prints finding F1 and
recall@1 of every system with 95 % intervals, and the paired differences; writes
results/demo_seeds.json.
"""

import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from medft.data.chat import write_chat
from medft.data.prepare import prepare
from medft.demo.chain import KINDS, run_demo
from medft.demo.exports import write_exports
from medft.evaluation.evaluate import evaluate
from medft.evaluation.report import interval, label

HELD_OUT = 300
MAIN = {"decoder": "finding_f1", "siglip": "image_to_text_recall@1"}


def fresh(folder: Path, seed: int) -> Path:
    """The chat file of new pairs, 99 % of which are in the validation split."""
    sources = write_exports(folder / "raw", pairs=HELD_OUT, seed=seed)
    spec = sources.read_text().replace("validation: 0.05", "validation: 0.99")
    sources.write_text(spec)
    prepare(sources, folder)
    write_chat(folder / "pairs.parquet", folder / "chat")
    return folder / "chat" / "validation.jsonl"


def one_seed(seed: int, scratch: Path) -> dict:
    run_demo(scratch / "demo", seed=seed)
    record = {"seed": seed}
    rows = fresh(scratch / "fresh", seed=seed + 1000)
    for kind, metric in MAIN.items():
        metrics = evaluate(
            scratch / "demo" / kind,
            scratch / f"evaluation_{kind}",
            data=rows,
            split=None,
            against_base=True,
        )
        record[kind] = {
            "rows": metrics["rows"],
            "groups": metrics["groups"],
            metric: {name: figures[metric] for name, figures in metrics["systems"].items()},
            "tuned_minus": {
                name: figures[metric] for name, figures in metrics["differences"].items()
            },
            **({"chance": metrics["chance"]["recall@1"]} if kind == "siglip" else {}),
        }
    return record


def main(seeds: list[int]) -> None:
    """Print the table and write the results."""
    logging.basicConfig(format="%(message)s")
    records = []
    for seed in seeds:
        scratch = Path(tempfile.mkdtemp())
        try:
            records.append(one_seed(seed, scratch))
        finally:
            shutil.rmtree(scratch)
        for kind in KINDS:
            found = records[-1][kind]
            systems = found[MAIN[kind]]
            values = [f"{label(name)} {interval(value)}" for name, value in systems.items()]
            sys.stdout.write(f"seed {seed}, {label(MAIN[kind])}: {', '.join(values)}\n")
            differences = found["tuned_minus"].items()
            values = [f"{label(name)} {interval(value)}" for name, value in differences]
            sys.stdout.write(f"  tuned minus {', '.join(values)}\n")
        sys.stdout.flush()
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    target = Path(__file__).parent / "results" / "demo_seeds.json"
    target.write_text(json.dumps({"machine": machine, "seeds": records}, indent=2) + "\n")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [17, 23, 42])
