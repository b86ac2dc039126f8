"""Runs the tests with the `gpu` mark, then each benchmark on the GPU, each in its own process.

    python benchmarks/on_gpu.py      (make gpu)

Each writes its file in results/ as it goes, with the card's name, so that a run that is stopped has
left what was done: gpu.json of the tests, decoder_step.json. Exit code 1: one of them failed, or
every test was skipped although there is a card.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "gpu.json"
TESTS = ["-m", "pytest", "-m", "gpu", "--result-table", str(TABLE)]
BENCHMARKS = [["benchmarks/decoder_step.py", "11b"]]


def cards() -> list[str]:
    """Names of the GPUs of this machine, whatever torch can use."""
    if shutil.which("nvidia-smi") is None:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()


def run(words: list[str]) -> bool:
    """Run Python with these words in the checkout; whether it succeeded."""
    sys.stdout.write(f"\n== {' '.join(words)}\n")
    sys.stdout.flush()
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode == 0


def all_were_skipped() -> bool:
    """Whether the tests began and the table has skipped ones alone."""
    if not TABLE.exists():
        return False
    tests = json.loads(TABLE.read_text(encoding="utf-8"))["tests"].values()
    return all(test["outcome"] == "skipped" for test in tests)


def main() -> int:
    found = cards()
    sys.stdout.write(f"GPUs: {', '.join(found) or 'none, so there is nothing to run'}\n")
    if not found:
        return 0
    TABLE.unlink(missing_ok=True)
    succeeded = run(TESTS)
    if all_were_skipped():
        sys.stdout.write(
            f"expected the tests to use {found[0]}, all were skipped: torch {torch.__version__} "
            f"does not see it, install a build for CUDA\n"
        )
        return 1
    outcomes = [run(words) for words in BENCHMARKS]
    return 0 if succeeded and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
