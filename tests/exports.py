"""Small exports of hospitals: tables of rows, each with an image of its own."""

import json
from collections import defaultdict

import numpy as np
import yaml
from PIL import Image

from medft.data.pairs import read_pairs


class Exports:
    """Writes exports below a folder; no two rows have the same image unless they name one."""

    def __init__(self, folder):
        self.folder = folder
        self._drawn = 0

    def __call__(self, split=None, /, folder="export", **sources):
        """The SOURCES.yaml of the given (rows, options) by name of source."""
        root = self.folder / folder
        (root / "images").mkdir(parents=True, exist_ok=True)
        entries = [self._source(root, name, *given) for name, given in sources.items()]
        spec = {"sources": entries, "split": split or {"validation": 0.2, "test": 0.2}}
        file = root / "SOURCES.yaml"
        file.write_text(yaml.safe_dump(spec))
        return file

    def _source(self, root, name, rows, options):
        table = [self._row(root, row) for row in rows]
        columns = list(dict.fromkeys(key for row in table for key in row))
        kind = options.get("kind", "csv")
        if kind == "csv":
            lines = [columns, *([str(row.get(c, "")) for c in columns] for row in table)]
            text = "".join(",".join(line) + "\n" for line in lines)
        else:
            text = "".join(json.dumps(row) + "\n" for row in table)
        (root / f"{name}.{kind}").write_text(text)
        base = {"name": name, "kind": kind, "path": f"{name}.{kind}", "images": "images"}
        return {**base, "image": "image", "text": "text", "group": "patient", **options}

    def _row(self, root, row):
        self._drawn += 1
        if "image" not in row:
            values = np.random.default_rng(self._drawn).integers(0, 255, (30, 40), np.uint8)
            Image.fromarray(values).save(root / "images" / f"{self._drawn}.png")
            row = {"image": f"{self._drawn}.png", **row}
        return {"text": f"report {self._drawn}", **row}


def patients(*values):
    """A row for each patient."""
    return [{"patient": value} for value in values]


def places(out):
    """The splits in which each group stands, of prepared data."""
    found = defaultdict(set)
    for row in read_pairs(out / "pairs.parquet", images=False):
        found[row["group_id"]].add(row["split"])
    return found
