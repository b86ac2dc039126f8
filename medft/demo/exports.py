"""Phantoms in the export formats of four hospitals, broken rows included.

Knee radiographs are a CSV beside PNG files, skin photographs JSON Lines beside JPEG files, chest
films a Parquet file with the images inside and two views of some studies, CT slices DICOM files
with a table of reports.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medft.demo.phantoms import Phantom, draw_phantom, image_of, render, report

SOURCES_YAML = """\
sources:
  - name: knee
    kind: csv
    path: knee/metadata.csv
    images: knee/images
    image: filename
    text: report
    keep: [age]
    group: patient_id
    license: Apache-2.0
  - name: skin
    kind: jsonl
    path: skin/cases.jsonl
    images: skin/photos
    image: photo
    text: "{findings}"
    group: patient
    license: Apache-2.0
  - name: chest
    kind: parquet
    path: chest/studies.parquet
    image: image
    study: study_id
    text: report
    group: patient_id
    license: Apache-2.0
  - name: ct
    kind: dicom
    path: ct/files
    table: ct/reports.csv
    join: {tag: AccessionNumber, column: accession}
    where: {Modality: CT}
    text: report
    group: patient
    license: Apache-2.0
prompts: ["Describe this medical image.", "What does the image show?"]
split: {validation: 0.05, test: 0.0, seed: 17}
"""

TWO_VIEWS = 0.3
"""Fraction of chest studies with a lateral view."""

Case = tuple[str, Phantom, np.ndarray, str]


def write_exports(folder: Path, *, pairs: int, seed: int) -> Path:
    """Write the four exports and SOURCES.yaml; returns its path.

    Args:
        folder: created.
        pairs: rows and studies that will be accepted, over all sources; a few more are broken.
        seed: equal seeds write equal images and tables.

    Raises:
        ImportError: pydicom is not installed.
    """
    writers = {"knee": _write_knee, "skin": _write_skin, "chest": _write_chest, "ct": _write_ct}
    for index, (modality, write) in enumerate(writers.items()):
        random = np.random.default_rng([seed, index])
        number = pairs // len(writers) + (index < pairs % len(writers))
        (folder / modality).mkdir(parents=True)
        write(folder / modality, list(_cases(modality, number, random)), random)
    sources = folder / "SOURCES.yaml"
    sources.write_text(SOURCES_YAML, encoding="utf-8")
    return sources


def _cases(modality: str, number: int, random: np.random.Generator) -> Iterator[Case]:
    """Patient, phantom, pixels and report of each image; patients have one to three images."""
    patient, left = 0, 0
    for _ in range(number):
        if left == 0:
            patient, left = patient + 1, int(random.integers(1, 4))
        left -= 1
        phantom = draw_phantom(modality, random)
        pixels, text = render(phantom, random), report(phantom, random)
        yield f"{modality[0]}{patient:04d}", phantom, pixels, text


def _write_knee(folder: Path, cases: list[Case], random: np.random.Generator) -> None:
    """Write the CSV export, with a missing file, a truncated one, an empty report, a double row."""
    images = folder / "images"
    images.mkdir()
    rows: list[list[Any]] = []
    for index, (patient, _, pixels, text) in enumerate(cases):
        name = f"{index:04d}.png"
        image_of(pixels, gray=True).save(images / name)
        rows.append([name, text, patient, int(random.integers(20, 90))])
    (images / "truncated.png").write_bytes((images / rows[0][0]).read_bytes()[:900])
    rows.append(["lost.png", "Normal knee radiograph.", "k-lost", 50])
    rows.append(["truncated.png", "Normal knee radiograph.", "k-truncated", 50])
    rows.append([rows[0][0], " ", *rows[0][2:]])
    rows.append(rows[1])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["filename", "report", "patient_id", "age"], *rows])


def _write_skin(folder: Path, cases: list[Case], random: np.random.Generator) -> None:
    """Write the JSONL export, with a text file named .jpg and a path that leaves the folder."""
    photos = folder / "photos"
    photos.mkdir()
    rows = []
    for index, (patient, _, pixels, text) in enumerate(cases):
        name = f"{index:04d}.jpg"
        image_of(pixels, gray=False).save(photos / name, quality=95)
        rows.append({"photo": name, "findings": text, "patient": patient})
    (photos / "note.jpg").write_text("the photograph was not stored", encoding="utf-8")
    rows.append({"photo": "note.jpg", "findings": "Clear skin.", "patient": "s-note"})
    rows.append({"photo": "../cases.jsonl", "findings": "Clear skin.", "patient": "s-out"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "cases.jsonl").write_text(lines, encoding="utf-8")


def _write_chest(folder: Path, cases: list[Case], random: np.random.Generator) -> None:
    """Write the Parquet export, with a study whose image is a path on somebody's computer."""
    rows: list[dict[str, Any]] = []
    for index, (patient, phantom, pixels, text) in enumerate(cases):
        views = [image_of(pixels, gray=True)]
        if random.random() < TWO_VIEWS:
            views.append(image_of(render(phantom, random, lateral=True), gray=True))
        rows += [
            {
                "image": {"bytes": _png(view), "path": None},
                "study_id": f"c{index:04d}",
                "patient_id": patient,
                "report": text,
            }
            for view in views
        ]
    path = {"bytes": None, "path": "/home/someone/film.png"}
    lost = {"study_id": "c-lost", "patient_id": "c-lost", "report": "Normal chest film."}
    rows.append({"image": path, **lost})
    pq.write_table(pa.Table.from_pylist(rows), folder / "studies.parquet")


def _write_ct(folder: Path, cases: list[Case], random: np.random.Generator) -> None:
    """Write the DICOM export, with a slice flagged as burned-in and a report without a file."""
    files = folder / "files"
    files.mkdir()
    rows = []
    for index, (patient, _, pixels, text) in enumerate(cases):
        accession = f"A{index:05d}"
        _write_dicom(files / f"{accession}.dcm", pixels[..., 0], accession)
        rows.append([accession, patient, text])
    _write_dicom(files / "A90000.dcm", cases[0][2][..., 0], "A90000", burned_in=True)
    rows.append(["A90000", "t-burned", "Normal CT slice."])
    rows.append(["A90001", "t-lost", "Normal CT slice."])
    with (folder / "reports.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["accession", "patient", "report"], *rows])


def _write_dicom(path: Path, gray: np.ndarray, accession: str, *, burned_in: bool = False) -> None:
    """Write a CT slice in Hounsfield units with a soft-tissue window."""
    from pydicom import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
    uid = f"1.2.826.0.1.3680043.8.498.{accession[1:].lstrip('0') or 0}"
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = uid
    slice_.Modality, slice_.AccessionNumber = "CT", accession
    slice_.BurnedInAnnotation = "YES" if burned_in else "NO"
    slice_.Rows, slice_.Columns = gray.shape
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
    slice_.PixelRepresentation = 0
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, -1024
    slice_.WindowCenter, slice_.WindowWidth = 40, 400
    hounsfield = gray / 255 * 400 - 160
    slice_.PixelData = np.rint(hounsfield + 1024).astype("<u2").tobytes()
    slice_.save_as(path, enforce_file_format=True)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
