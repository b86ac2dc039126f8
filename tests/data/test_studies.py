"""The images of a study: their order, how many of them, and what becomes of the others."""

import numpy as np
import pytest
from made_dicom import RAMP, images_of, prepare_folder, write
from PIL import Image

from medft.data.chosen_images import evenly
from medft.data.pairs import read_pairs
from medft.data.prepare import prepare
from medft.data.study_order import in_order
from medft.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("count", "most", "taken"),
    [
        (0, 3, []), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (1, 1, [0]), (9, 1, [4]), (8, 1, [4]),
        (10, 2, [0, 9]), (5, 3, [0, 2, 4]), (10, 4, [0, 3, 6, 9]), (6, 3, [0, 3, 5]),
        (300, 4, [0, 100, 199, 299]),
    ],
)  # fmt: skip
def test_images_are_taken_evenly_with_the_first_and_the_last(count, most, taken):
    assert evenly(count, most) == taken


def test_no_image_is_taken_twice_and_gaps_differ_by_one_at_most():
    for count in range(1, 60):
        for most in range(2, 60):
            taken = evenly(count, most)
            assert len(set(taken)) == len(taken) == min(count, most)
            assert taken[0] == 0
            assert taken[-1] == count - 1 or count == 1
            gaps = np.diff(taken)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_numbers_stand_as_numbers_then_texts_then_empty_cells_and_ties_stay():
    cells = ["10", "", "2", "b", "a", "-1.5", None, "2.0", 3, "1e1", " 2", "1_0", "nan"]
    rows = [(number, {"n": cell}) for number, cell in enumerate(cells)]
    found = [cells[number] for number, _ in in_order(rows, ["n"])]
    assert found == ["-1.5", "2", "2.0", " 2", 3, "10", "1e1", "1_0", "a", "b", "nan", "", None]
    assert in_order(rows, []) == rows
    long = [(0, {"n": "100000000000000000002"}), (1, {"n": "100000000000000000001"})]
    assert [number for number, _ in in_order(long, ["n"])] == [1, 0]


def test_the_second_column_decides_where_the_first_is_equal():
    rows = [(0, {"s": "2", "n": "1"}), (1, {"s": "1", "n": "9"}), (2, {"s": "1", "n": "10"})]
    assert [number for number, _ in in_order(rows, ["s", "n"])] == [1, 2, 0]


def table(tmp_path, rows, **keys):
    """Prepare a table of slices, the gray value of each being its number."""
    for value in {cell for row in rows for cell in row[1:3] if cell.isdigit()}:
        Image.new("L", (8, 8), int(value)).save(tmp_path / f"{value}.png")
    lines = ["study,file,side,slice,text"]
    lines += [f"{s},{f}.png,{side}.png,{n},Text {s}." for s, f, side, n in rows]
    (tmp_path / "t.csv").write_text("\n".join([*lines, ""]))
    given = {"name": "t", "kind": "csv", "path": "t.csv", "image": "file", "text": "text", **keys}
    shown = "\n    ".join(f"{key}: {value}" for key, value in given.items())
    (tmp_path / "SOURCES.yaml").write_text(f"sources:\n  - {shown}\nsplit: {{validation: 0.0}}\n")
    summary = prepare(tmp_path / "SOURCES.yaml", tmp_path / "out", max_rejects=1.0)
    pairs = list(read_pairs(tmp_path / "out" / "pairs.parquet"))
    values = [[int(image.flat[0]) for image in images_of(pair)] for pair in pairs]
    return summary["sources"]["t"], values


SLICES = [("a", str(20 + n), "0", str(n)) for n in (10, 2, 1, 7, 4)]


def test_order_by_orders_the_images_of_a_table_and_without_it_the_table_does(tmp_path):
    assert table(tmp_path, SLICES, study="study")[1] == [[30, 22, 21, 27, 24]]
    counts, values = table(tmp_path, SLICES, study="study", order_by="slice")
    assert values == [[21, 22, 24, 27, 30]]
    assert "images_left_out" not in counts


def test_max_images_takes_them_evenly_and_every_row_stays_accepted(tmp_path):
    keys = {"study": "study", "order_by": "[slice]", "max_images": 3}
    counts, values = table(tmp_path, [*SLICES, ("b", "90", "0", "1")], **keys)
    assert values == [[21, 24, 30], [90]]
    assert (counts["read"], counts["accepted"], counts["rejected"]) == (6, 6, 0)
    assert counts["images_left_out"] == 2
    assert "t: max_images leaves out 2 images" in (tmp_path / "out" / "report.html").read_text()
    counts, values = table(tmp_path, SLICES, **{**keys, "max_images": 9})
    assert (values, counts["images_left_out"]) == ([[21, 22, 24, 27, 30]], 0)


def test_each_image_column_of_a_row_counts(tmp_path):
    rows = [("a", str(10 + n), str(20 + n), str(n)) for n in range(3)]
    keys = {"study": "study", "order_by": "slice", "image": "[file, side]"}
    assert table(tmp_path, rows, **keys)[1] == [[10, 20, 11, 21, 12, 22]]
    counts, values = table(tmp_path, rows, **keys, max_images=3)
    assert values == [[10, 21, 22]]
    assert (counts["accepted"], counts["images_left_out"]) == (3, 3)


def test_a_chosen_image_that_is_missing_is_a_rejected_row_and_not_replaced(tmp_path):
    keys = {"study": "study", "order_by": "slice", "max_images": 2}
    rows = [("a", "21", "0", "1"), ("a", "22", "0", "2"), ("a", "lost", "0", "3")]
    counts, values = table(tmp_path, rows, **keys)
    assert values == [[21]]
    assert (counts["accepted"], counts["reasons"]) == (2, {"missing_image": 1})
    rows = [("a", "lost", "0", "1"), ("a", "22", "0", "2"), ("a", "lost", "0", "3")]
    counts, values = table(tmp_path, rows, **keys)
    assert values == []
    assert (counts["read"], counts["reasons"]) == (3, {"missing_image": 2, "no_image": 1})


def test_the_texts_and_groups_of_rows_without_images_still_have_to_agree(tmp_path):
    keys = {"study": "study", "order_by": "slice", "max_images": 1, "text": "'{text} {slice}'"}
    counts, values = table(tmp_path, SLICES, **keys)
    assert (values, counts["reasons"]) == ([], {"different_texts": 5})


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("order_by: slice", "a key study beside order_by"),
        ("max_images: 2", "a key study beside max_images"),
        ("study: study\n    max_images: 0", "max_images"),
        ("study: study\n    order_by: []", "order_by"),
        ("study: study\n    max_images: many", "max_images"),
    ],
)
def test_keys_that_cannot_be_are_one_sentence(tmp_path, key, sentence):
    with pytest.raises(RecipeError) as caught:
        table(tmp_path, SLICES, **dict(line.strip().split(": ") for line in key.split("\n")))
    assert sentence in str(caught.value)
    with pytest.raises(DataError, match="expected the columns nowhere"):
        table(tmp_path, SLICES, study="study", order_by="nowhere")


STUDY = ", study: StudyInstanceUID, order_by: [SeriesNumber, InstanceNumber]"


def write_study(root, study, numbers):
    for place, number in enumerate(numbers):
        pixels = np.where(64 * number > RAMP, 4095, 0)
        write(root / f"IM{place}", pixels, StudyInstanceUID=study, InstanceNumber=number,
              SeriesNumber=1)  # fmt: skip
    (root / "IM0.txt").write_text(f"Report of {study}.")


def numbers_of(pair):
    """The numbers of instances, which are their numbers of white rows."""
    return [int((image[:, 0] > 0).sum()) for image in images_of(pair)]


def test_a_study_of_dicom_files_is_a_tag_and_ordered_by_tags(tmp_path):
    write_study(tmp_path / "files" / "a", "1.2.3", [10, 2, 33, 1, 9])
    write_study(tmp_path / "files" / "b", "1.2.4", [5, 4])
    _, pairs, rejects = prepare_folder(tmp_path, STUDY)
    assert [numbers_of(pair) for pair in pairs] == [[1, 2, 9, 10, 33], [4, 5]]
    assert [pair["text"] for pair in pairs] == ["Report of 1.2.3.", "Report of 1.2.4."]
    assert rejects == []
    counts, pairs, _ = prepare_folder(tmp_path, STUDY + ", max_images: 3")
    assert [numbers_of(pair) for pair in pairs] == [[1, 9, 33], [4, 5]]
    assert (counts["accepted"], counts["images_left_out"]) == (7, 2)
    with pytest.raises(DataError, match="NoSuchTag is none"):
        prepare_folder(tmp_path, ", study: StudyInstanceUID, order_by: NoSuchTag")


def test_every_frame_counts_for_max_images_and_only_those_taken_are_decoded(tmp_path):
    frames = np.stack([np.where(64 * n > RAMP, 4095, 0) for n in range(1, 8)])
    for name, number in (("IM1", 2), ("IM2", 1)):
        write(tmp_path / "files" / name, frames + number - 1, StudyInstanceUID="1.2",
              InstanceNumber=number, SeriesNumber=1)  # fmt: skip
    (tmp_path / "files" / "IM1.txt").write_text("A text.")
    counts, [pair], _ = prepare_folder(tmp_path, STUDY + ", frames: every, max_images: 4")
    assert len(pair["images"]) == 4
    names = [image["path"] for image in pair["images"]]
    assert names == ["IM2", "IM2", "IM1", "IM1"]  # frames 0, 4 and 2, 6 of 14
    assert (counts["accepted"], counts["images_left_out"]) == (2, 10)
    _, [pair], _ = prepare_folder(tmp_path, STUDY + ", max_images: 4")
    assert len(pair["images"]) == 2


def test_files_without_the_tag_of_the_study_are_pairs_of_their_own(tmp_path):
    for index in range(2):
        write(tmp_path / "files" / f"IM{index}", RAMP + index)
        (tmp_path / "files" / f"IM{index}.txt").write_text(f"Text {index}.")
    _, pairs, _ = prepare_folder(tmp_path, STUDY)
    assert [pair["text"] for pair in pairs] == ["Text 0.", "Text 1."]
