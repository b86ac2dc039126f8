"""What must hold before a run begins in its folder."""

import pytest

from medft.config.train_keys import TrainSection
from medft.errors import RunError
from medft.training.resume import check_output_dir


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    assert check_output_dir(TrainSection(output_dir=str(tmp_path / "new"))) is None
    assert check_output_dir(TrainSection(output_dir=str(tmp_path))) is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="or resume with"):
        check_output_dir(TrainSection(output_dir=str(tmp_path)))
    with pytest.raises(RunError, match="is a file"):
        check_output_dir(TrainSection(output_dir=str(tmp_path / "file")))
    with pytest.raises(RunError, match="found none"):
        check_output_dir(TrainSection(output_dir=str(tmp_path), resume_from_checkpoint=True))
