"""Compares `medft data prepare` with bare decoding and hashing of the same files.

    python benchmarks/prepare.py [--before CHECKOUT] [NUMBER_OF_IMAGES ...]
                                                             (default: 1000 10000 50000)

Draws images, then in turn decodes and hashes them with as many worker processes as medft takes,
and prepares them with the command. Prints images per second of wall time, CPU seconds, the ratios
of both, and the peak of anonymous memory summed over the process tree; writes results/prepare.json.
With the checkout of another version of medft, both prepare the same images in turn, three times
each, and the ratio of their CPU seconds is printed: below 1, this one takes less.
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512
REPEATS = 3
WORKERS = len(os.sched_getaffinity(0))


def draw(task: tuple[Path, int]) -> None:
    """Write a gray image that compresses like a radiograph: JPEG, every fourth a PNG."""
    folder, index = task
    random = np.random.default_rng(index)
    coarse = Image.fromarray(random.normal(128, 50, (6, 6)).clip(0, 255).astype(np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
    pixels = (smooth + random.normal(0, 3, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
    if index % 4:
        Image.fromarray(pixels).save(folder / name_of(index), quality=90)
    else:
        Image.fromarray(pixels).save(folder / name_of(index), compress_level=1)


def name_of(index: int) -> str:
    return f"{index:06d}.jpg" if index % 4 else f"{index:06d}.png"


def bare(path: Path) -> str:
    """Decode and hash, nothing else."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
    return hashlib.sha256(content).hexdigest()


def measured(command: list[str], checkout: Path = ROOT) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak anonymous bytes of a command and all its children."""
    peak = 0
    started = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = psutil.Popen(command, env=env, cwd=tempfile.gettempdir(), **pipes)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, anonymous_bytes(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = os.times()
    _, errors = process.communicate()
    after = os.times()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(errors.decode())
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {"wall": time.perf_counter() - started, "cpu": cpu, "peak_anonymous": peak}


def anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous resident memory of a process and its descendants, shared pages counted in each."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            status = Path(f"/proc/{member.pid}/status").read_text()
        except OSError:
            continue
        lines = dict(line.split(":", 1) for line in status.splitlines())
        total += int(lines.get("RssAnon", "0 kB").split()[0]) * 1024
    return total


def bare_run(folder: str) -> None:
    """Decode and hash every file of a folder in a worker pool."""
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        for _ in pool.imap(bare, sorted(Path(folder).iterdir()), chunksize=8):
            pass


def compare(count: int, scratch: Path, before: Path | None) -> dict[str, float]:
    """One row of the table."""
    images = scratch / "images"
    images.mkdir()
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        pool.map(draw, [(images, index) for index in range(count)], chunksize=64)
    with (scratch / "table.csv").open("w", newline="") as file:
        rows = ([name_of(i), f"Report {i}.", f"p{i // 3}"] for i in range(count))
        csv.writer(file).writerows([["file", "text", "patient"], *rows])
    sources = scratch / "SOURCES.yaml"
    sources.write_text(
        "sources:\n  - {name: a, kind: csv, path: table.csv, images: images, image: file, "
        "text: text, group: patient}\n"
    )
    python = sys.executable
    floor = measured([python, str(Path(__file__).resolve()), "--bare", str(images)])
    out = str(scratch / "out")
    command = [python, "-m", "medft.cli", "data", "prepare", str(sources), "--out", out]
    ours = measured(command)
    versions = {} if before is None else against(before, command)
    return versions | {
        "images": count,
        "ratio_wall": floor["wall"] / ours["wall"],
        "ratio_cpu": floor["cpu"] / ours["cpu"],
        "images_per_second": count / ours["wall"],
        "bare_images_per_second": count / floor["wall"],
        "cpu_seconds": ours["cpu"],
        "bare_cpu_seconds": floor["cpu"],
        "peak_anonymous_mb": ours["peak_anonymous"] / 1e6,
        "pairs_mb": (scratch / "out" / "pairs.parquet").stat().st_size / 1e6,
    }


def against(before: Path, command: list[str]) -> dict[str, float]:
    """CPU seconds of this version over those of another, in turn."""
    cpu = {ROOT: 0.0, before: 0.0}
    for _ in range(REPEATS):
        for checkout in cpu:
            cpu[checkout] += measured(command, checkout)["cpu"]
    return {"ratio_cpu_to_before": cpu[ROOT] / cpu[before]}


def main(counts: list[int], before: Path | None = None) -> None:
    """Print the table and write the results."""
    results = []
    for count in counts:
        scratch = Path(tempfile.mkdtemp())
        try:
            results.append(compare(count, scratch, before))
        finally:
            shutil.rmtree(scratch)
        sys.stdout.write(
            "".join(f"{name} {value:,.2f}  " for name, value in results[-1].items()) + "\n"
        )
    record = {"machine": f"{platform.machine()}, {WORKERS} cores", "side": SIDE, "rows": results}
    target = Path(__file__).parent / "results" / "prepare.json"
    target.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare_run(sys.argv[2])
    else:
        words = sys.argv[1:]
        other = Path(words[1]).resolve() if words[:1] == ["--before"] else None
        numbers = words[2:] if other else words
        main([int(word) for word in numbers] or [1000, 10_000, 50_000], other)
