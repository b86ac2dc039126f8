"""What libraries raise on a disk that is full, and whether it is called so.

python filling.py FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from medft.full_disk import is_disk_full

FOLDER = Path(sys.argv[1])
NUMBERS = np.random.default_rng(1).random(400_000)
TENSOR = torch.from_numpy(NUMBERS)


def draw(path):
    """A PNG of noise."""
    figure = Figure(figsize=(8, 8))
    figure.subplots().imshow(NUMBERS.reshape(800, 500))
    figure.savefig(path, format="png", dpi=300)


def save_words(path):
    """A tokenizer of many words."""
    words = {f"word{i}": i for i in range(100_000)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(path))


WRITERS = {
    "torch": lambda path: torch.save({"a": TENSOR}, path),
    "torch, many": lambda path: torch.save({str(i): TENSOR[i:][:9000].clone() for i in range(60)},
                                           path),
    "safetensors": lambda path: save_file({"a": TENSOR}, path),
    "tokenizers": save_words,
    "parquet": lambda path: pq.write_table(pa.table({"a": NUMBERS}), path),
    "numpy": lambda path: np.savez(path, a=NUMBERS),
    "matplotlib": draw,
    "text": lambda path: path.write_text("a" * 2_000_000),
    "copied tree": lambda path: shutil.copytree(sys.argv[2], path),
}  # fmt: skip

if __name__ == "__main__":
    found = {}
    for name, write in WRITERS.items():
        path = FOLDER / "out"
        try:
            write(path)
            found[name] = "no error"
        except Exception as error:
            found[name] = is_disk_full(error, FOLDER)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    sys.exit(json.dumps(found))
