"""The images of a study's rows, and which of them are taken."""

from collections.abc import Sequence

from medft.data.dicom_image import MIDDLE, frame_count
from medft.data.source_section import SourceSection
from medft.data.table_row import Rejected, TableRow

Images = Sequence[int]
"""Of a row: indices of its image columns, or of DICOM frames."""


def chosen_images(
    rows: Sequence[tuple[int, TableRow | Rejected]], source: SourceSection, max_pixels: int
) -> tuple[list[Images | Rejected], int]:
    """The images of each row that are taken, and the number of those that max_images leaves out.

    Those of all rows are one sequence: rows in the order of the study, of a row its columns or
    frames. It is taken from before any of them is decoded: one that turns out to be damaged is
    not replaced.

    Args:
        rows: of a pair with their numbers, in the order of the study.
        source: their source.
        max_pixels: of an image.

    Returns:
        For each row its images, or why they cannot be counted.
    """
    images = [_images_of(row, source, max_pixels) for _, row in rows]
    if source.max_images is None:
        return images, 0
    all_images = [
        (row, image)
        for row, own in enumerate(images)
        if not isinstance(own, Rejected)
        for image in own
    ]
    taken = evenly(len(all_images), source.max_images)
    chosen: list[list[int]] = [[] for _ in rows]
    for index in taken:
        row, image = all_images[index]
        chosen[row].append(image)
    return [
        own if isinstance(own, Rejected) else some for own, some in zip(images, chosen, strict=True)
    ], len(all_images) - len(taken)


def _images_of(
    row: TableRow | Rejected, source: SourceSection, max_pixels: int
) -> Images | Rejected:
    if isinstance(row, Rejected):
        return row
    if source.kind != "dicom":
        return range(len(source.image_columns))
    if source.frames == "middle":
        return [MIDDLE]
    try:
        return range(frame_count(row["path"], max_pixels=max_pixels))
    except Rejected as verdict:
        return verdict
    except MemoryError:
        return Rejected("too_large", f"{row['path'].name}: its header takes too much memory")


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` things, evenly over their order.

    For m of n things these are the i (n - 1) / (m - 1) for i = 0 .. m - 1, rounded to the nearest,
    halves up: the first and the last are among them, and none twice. For m = 1 it is n // 2, the
    middle.
    """
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [(2 * i * (count - 1) + most - 1) // (2 * (most - 1)) for i in range(most)]
