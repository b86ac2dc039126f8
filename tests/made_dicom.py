"""DICOM files made by hand."""

import io
import json

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medft.data.pairs import read_pairs
from medft.data.prepare import prepare

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def write(path, pixels, *, syntax=ExplicitVRLittleEndian, frame=None, **tags):
    """A small CT file with the given pixels and tags, or with a compressed frame of 8 bits."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID = CTImageStorage
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.PatientName = "Doe^Jane"
    frames = pixels.shape[0] if pixels.ndim == 3 else None
    if frames:
        data.NumberOfFrames = frames
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = 0
    data.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    if frame is not None:
        data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def prepare_folder(folder, keys="", *, text="text", **options):
    """Counts of the source, pairs and rejected rows of `folder / "files"`.

    Args:
        folder: of SOURCES.yaml and of the output.
        keys: further ones of the source, each with a comma before.
        text: column.
        options: further keys of SOURCES.yaml.
    """
    lines = [f"  - {{name: pacs, kind: dicom, path: files, text: {text}{keys}}}"]
    lines += [f"{key}: {value}" for key, value in {"split": "{validation: 0.0}", **options}.items()]
    (folder / "SOURCES.yaml").write_text("\n".join(["sources:", *lines, ""]))
    out = folder / "out"
    summary = prepare(folder / "SOURCES.yaml", out, max_rejects=1.0)["sources"]["pacs"]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return summary, list(read_pairs(out / "pairs.parquet")), rejects


def images_of(pair):
    """The stored images of a pair, as arrays."""
    return [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in pair["images"]]
