"""A decoder and a SigLIP over the same images."""

import shutil

import numpy as np
import pytest

from medft.data.images import open_image
from medft.decoder.generator import Generator, Request
from medft.errors import BaseModelError
from medft.inference.predictor import Predictor
from medft.inference.prompts import conversation_for


def test_three_lines_give_a_report_an_embedding_and_cases(runs, images):
    predictor = Predictor.load(runs / "decoder", siglip=runs / "siglip")
    prediction = predictor.predict(str(images[0]))
    turns = conversation_for("Describe this medical image.", predictor.generator.record)
    request = Request(messages=turns, images=[open_image(images[0])])
    [answer] = predictor.generator.generate([request])
    assert (prediction.text, prediction.truncated) == (answer.text, answer.truncated)
    assert prediction.embedding.shape == (64,)
    assert np.linalg.norm(prediction.embedding) == pytest.approx(1, abs=1e-5)
    assert len(prediction.nearest) == 5
    alone = Predictor.load(runs / "siglip").predict(images[0])
    assert alone.text is None
    assert [case.id for case in alone.nearest] == [case.id for case in prediction.nearest]
    with pytest.raises(BaseModelError, match="expected a decoder"):
        Predictor.load(runs / "siglip", siglip=runs / "siglip")


def test_an_adapter_without_record_is_refused_with_a_sentence(runs, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "decoder" / "adapter", adapter)
    (adapter / "medft.json").unlink()
    with pytest.raises(BaseModelError, match=r"expected medft\.json"):
        Generator.load(adapter)
