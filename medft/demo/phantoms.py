"""Drawn pictures with captions that are true of them; no patient, no data set.

A grey field with one or two discs: what the caption says of their number, brightness and place is
visible in the picture. A few rows are broken on purpose, as rows of real exports are.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 112
"""Pixels of a picture's side."""

_SHADES = {"bright": 235, "dark": 25}
_COLUMNS = {"left": 0.25, "right": 0.75}
_ROWS = {"upper": 0.28, "lower": 0.72}

SOURCES_YAML = """\
sources:
  - name: phantoms
    kind: csv
    path: phantoms.csv
    images: images
    image: filename
    text: report
    keep: [level]
    group: patient_id
    license: Apache-2.0
prompts: ["Describe this medical image.", "What does the scan show?"]
split: {validation: 0.1, test: 0.0, seed: 17}
"""


def draw_phantoms(folder: Path, *, patients: int, seed: int) -> Path:
    """Write images/, phantoms.csv and SOURCES.yaml; returns the path of SOURCES.yaml.

    Args:
        folder: created.
        patients: each with one to three pictures.
        seed: equal seeds draw equal files.
    """
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for patient in range(patients):
        for study in range(int(random.integers(1, 4))):
            name = f"p{patient:04d}_{study}.png"
            report, level, image = _draw(random)
            image.save(folder / "images" / name)
            rows.append([name, report, level, f"p{patient:04d}"])
    (folder / "images" / "torn.png").write_bytes(
        (folder / "images" / rows[0][0]).read_bytes()[:900]
    )
    rows.append(["lost.png", "One bright disc, upper left.", "upper", "p-lost"])
    rows.append(["torn.png", "One bright disc, upper left.", "upper", "p-torn"])
    rows.append([rows[0][0], "", rows[0][2], rows[0][3]])
    with (folder / "phantoms.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["filename", "report", "level", "patient_id"], *rows])
    sources = folder / "SOURCES.yaml"
    sources.write_text(SOURCES_YAML, encoding="utf-8")
    return sources


def _draw(random: np.random.Generator) -> tuple[str, str, Image.Image]:
    shade, column, level = (str(random.choice(list(names))) for names in (_SHADES, _COLUMNS, _ROWS))
    count = int(random.integers(1, 3))
    field = random.normal(128, 9, (SIDE, SIDE)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(field).filter(ImageFilter.GaussianBlur(1))
    pen = ImageDraw.Draw(image)
    radius = int(random.integers(8, 13))
    for index in range(count):
        x = _COLUMNS[column] * SIDE + random.normal(0, 2) + (index - (count - 1) / 2) * 2.2 * radius
        y = _ROWS[level] * SIDE + random.normal(0, 2)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_SHADES[shade])
    noun = "disc" if count == 1 else "discs"
    number = "One" if count == 1 else "Two"
    return f"{number} {shade} {noun}, {level} {column}.", level, image
