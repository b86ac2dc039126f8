"""What texts assert, and that one word that turns the meaning round is seen."""

import re

import numpy as np
import pytest

from medft.errors import RecipeError
from medft.metrics.bootstrap import estimate
from medft.metrics.findings import NO_FINDING, finding_f1, load_lexicon, mentions
from medft.metrics.text import bleu


@pytest.fixture(scope="module")
def lexicon():
    return load_lexicon()


def value(scorer):
    return scorer.score(np.ones(len(scorer.rows)))


# "finding" or "finding side", separated by commas; nothing: no finding
SENTENCES = [
    ("Pleural effusion.", "effusion"),
    ("No pleural effusion.", ""),
    ("No left effusion, right pneumothorax", "pneumothorax right"),
    ("Left pleural effusion and right pneumothorax", "effusion left, pneumothorax right"),
    ("Bilateral effusions", "effusion left, effusion right"),
    ("No effusion or pneumothorax.", ""),
    ("No focal consolidation, pleural effusion, or pneumothorax.", ""),
    ("No focal consolidation, large effusion or pneumothorax is seen.", ""),
    ("No pneumothorax, small left effusion.", "effusion left"),
    ("No fracture, dislocation, erosion.", ""),
    ("Small effusion in the upper left.", "effusion left"),
    ("No pneumothorax. Effusion on the right.", "effusion right"),
    ("No pneumothorax; effusion on the right", "effusion right"),
    ("Effusion without pneumothorax", "effusion"),
    ("Pneumothorax is not seen", ""),
    ("Effusion is present, pneumothorax is not seen.", "effusion"),
    ("Effusion is seen and pneumothorax is not seen.", "effusion"),
    ("Effusion, pneumothorax, and consolidation are absent.", ""),
    ("Effusion on the right and pneumothorax on the left.", "effusion right, pneumothorax left"),
    ("Pneumothorax on the right with left-sided effusion.", "pneumothorax right, effusion left"),
    ("Right lower lobe consolidation; the left lung is clear.", "consolidation right"),
    ("No effusion, but there is a right apical pneumothorax.", "pneumothorax right"),
    ("No abnormality except for a calcified granuloma.", "granuloma"),
    ("No effusion and the heart is enlarged.", "cardiomegaly"),
    ("No effusion, heart is enlarged.", "cardiomegaly"),
    ("The heart is not enlarged, effusion on the left.", "effusion left"),
    ("Neither effusion nor pneumothorax.", ""),
    ("Negative for acute fracture or dislocation.", ""),
    ("There isn't an effusion.", ""),
    ("No change in the left pleural effusion.", "effusion left"),
    ("Not only an effusion but a mass.", "effusion, mass"),
    ("Pneumonia cannot be excluded.", "pneumonia"),
    ("Pneumonia has been excluded.", ""),
    ("The right pneumothorax has resolved.", ""),
    ("The right pneumothorax has not resolved.", "pneumothorax right"),
    ("Pneumothorax: none. Effusion: left", "effusion left"),
    ("Knee joint effusion with meniscal tear.", "joint effusion, meniscal tear"),
    ("Pericardial effusion", "pericardial effusion"),
    ("No pleural\neffusion", ""),
    ("No pleural effusion\n\nPneumothorax", "pneumothorax"),
    ("Pulmonary oedema and haemorrhage", "edema, hemorrhage"),
    ("Pulmonary edema and a bleed", "edema, hemorrhage"),
    ("Masses and metastases in both lungs", "mass, metastasis left, metastasis right"),
    ("Left effusion. The effusion is small.", "effusion left"),
    ("Left pneumothorax. No pneumothorax on the right.", "pneumothorax left"),
    ("Fluid in the pleural cavity", ""),
    ("A cavity in the left upper lobe with haze.", "cavity left, haze"),
    ("Non-calcified nodule", "nodule"),
    ("Non-displaced fracture of the right radius", "fracture right"),
    ("Abnormal heart, normal lungs.", ""),
    ("Nodule of 3.5 cm. No lymphadenopathy", "nodule"),
    ("Effusions on the left and right", "effusion left, effusion right"),
    ("In the left lung, there is a consolidation.", "consolidation left"),
    ("No evidence of free air; appendicitis is likely", "appendicitis"),
    ("Midline shift and hydrocephalus, no infarct", "midline shift, hydrocephalus"),
    ("Effusion no longer seen", ""),
    ("Large effusion, not previously seen", "effusion"),
    ("Nodular melanoma; no naevi", "nodule, melanoma"),
    ("Chest tube on the right, pacemaker on the left.", "tube right, pacemaker left"),
    ("Lucencies and plaques", "lucency, plaque"),
    ("Normal chest radiograph.", ""),
    ("No effusion is seen and pneumothorax is present.", "pneumothorax"),
    ("Effusion left pneumothorax", "effusion, pneumothorax left"),
    ("Effusion, the trachea is not seen.", "effusion"),
    ("Effusion on the right without pneumothorax.", "effusion right"),
    ("No acute, displaced fracture.", ""),
    ("The film does not show effusion, pneumothorax or mass.", ""),
    ("Small right and moderate left pleural effusions.", "effusion right, effusion left"),
    ("Opacities in the right upper and left lower lobe.", "opacity right, opacity left"),
    ("The left lung is clear, effusion on the right.", "effusion right"),
    ("FINDINGS: No effusion.\nIMPRESSION: Left lower lobe pneumonia.", "pneumonia left"),
    ("1. No effusion. 2. Cysts, upper half of the left knee.", "cyst left"),
]


def items(text):
    """The set that a line of the table means."""
    if not text:
        return {(NO_FINDING, "")}
    found = set()
    for item in text.split(", "):
        name, _, last = item.rpartition(" ")
        found.add((name, last) if last in ("left", "right") else (item, ""))
    return found


@pytest.mark.parametrize(("text", "expected"), SENTENCES, ids=[text for text, _ in SENTENCES])
def test_a_text_asserts(text, expected, lexicon):
    assert mentions(text, lexicon) == items(expected)


def test_case_and_line_breaks_do_not_matter(lexicon):
    for text, expected in SENTENCES:
        assert mentions(text.upper().replace(" ", "\n"), lexicon) == items(expected)


@pytest.mark.parametrize(
    "names",
    [
        "effusion pneumothorax consolidation atelectasis edema cardiomegaly nodule mass fracture "
        "opacity infiltrate pneumonia emphysema fibrosis calcification hernia hemorrhage infarct",
        "hydronephrosis stone cyst tumor metastasis abscess aneurysm dissection stenosis thrombus "
        "embolus appendicitis diverticulitis ascites osteophyte dislocation sclerosis lysis",
        "nevus melanoma hemangioma keratosis erosion ulcer scar lymphadenopathy tube catheter "
        "pacemaker haze cavity lucency plaque",
    ],
)
def test_the_common_findings_are_found_by_their_names_and_plurals(names, lexicon):
    for name in names.split():
        assert mentions(f"{name.capitalize()}.", lexicon) == {(name, "")}
        assert mentions(f"No {name}.", lexicon) == {(NO_FINDING, "")}
        plurals = [name + "s", name + "es", name[:-1] + "ies", name[:-2] + "es"]
        plurals += [name[:-2] + "i", name[:-1] + "e"]
        assert any(mentions(plural, lexicon) == {(name, "")} for plural in plurals)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "There is no pleural effusion in the right hemithorax on this frontal chest view.",
            "There is a pleural effusion in the right hemithorax on this frontal chest view.",
        ),
        (
            "Small pleural effusion at the base of the left lung, unchanged from the last study.",
            "Small pleural effusion at the base of the right lung, unchanged from the last study.",
        ),
    ],
)
def test_a_word_that_turns_the_meaning_round_is_seen_here_and_not_by_bleu(one, other, lexicon):
    assert value(bleu([one], [other])) > 75
    assert value(finding_f1([one], [other], lexicon)) == 0
    assert value(finding_f1([one], [one], lexicon)) == 1


def test_f1_by_hand(lexicon):
    predictions = ["Left effusion and mass.", "Normal.", "No nodule.", None]
    references = ["Left effusion.", "Normal.", "Nodule.", "Normal."]
    # tp: effusion, no finding; fp: mass, no finding; fn: nodule, no finding
    scorer = finding_f1(predictions, references, lexicon)
    assert value(scorer) == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert scorer.n == 4


def test_failed_generations_assert_nothing_and_are_wrong(lexicon):
    for failed in (None, "", " \n "):
        assert mentions(failed, lexicon) == frozenset()
        assert value(finding_f1([failed], ["Normal."], lexicon)) == 0
        assert value(finding_f1([failed, "Mass"], ["Normal.", "Mass"], lexicon)) == (
            pytest.approx(2 / 3)
        )
    assert value(finding_f1(["Clear."], ["Normal."], lexicon)) == 1
    nothing = estimate(finding_f1([None], [""], lexicon), ["p"])
    assert (nothing.value, nothing.reason) == (None, "no text names a finding")


LEXICON = """\
findings:
  rust: [rust, red rust]
sides: {left: [port], right: [starboard], both: [amidships]}
cues:
  before: ["no"]
  not: [not]
  after: [gone]
  ignored: [rust red]
  ends: [but]
  affirms: [is there]
  and: [and]
  or: [or]
  with: [with]
  openers: [some]
"""


def test_a_lexicon_of_ones_own_is_used(tmp_path):
    path = tmp_path / "ship.yaml"
    path.write_text(LEXICON)
    own = load_lexicon(path)
    assert mentions("No rust, some red rust to port.", own) == {("rust", "left")}
    assert mentions("Rust amidships", own) == {("rust", "left"), ("rust", "right")}
    assert mentions("Painted rust red. Rust gone. Effusion.", own) == {(NO_FINDING, "")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[rust, red rust]", "rust", r"ship.yaml:2: findings.rust: expected .*list, got 'rust'"),
        ("[rust, red rust]", "['...']", r"ship.yaml:2: findings.rust.0: expected"),
        ("  after: [gone]\n", "", r"ship.yaml:\d+: cues.after is required and missing: add it"),
        ("  after:", "  aftr:", r"unknown key cues.aftr: did you mean after"),
        ("port", "port, starboard", r"one meaning of 'starboard', got side left and side right"),
        ("[gone]", "[rust]", r"one meaning of 'rust', got finding rust and after"),
        ("[some]", "[some more]", r"ship.yaml:\d+: cues.openers.0: expected"),
        ("findings:", "findings", r"ship.yaml:\d+: expected YAML"),
    ],
)
def test_a_malformed_lexicon_is_refused(old, new, message, tmp_path):
    path = tmp_path / "ship.yaml"
    path.write_text(LEXICON.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_lexicon(path)
    assert any(re.search(message, problem) for problem in caught.value.problems), caught.value
    with pytest.raises(RecipeError, match="could not read it"):
        load_lexicon(tmp_path / "none.yaml")
