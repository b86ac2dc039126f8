"""The floor of the loss is what perfect embeddings reach, and what facts known before say."""

import math
import random
from collections import Counter

import pytest
import torch

from medft.siglip.floor import sigmoid_floor
from medft.siglip.loss import Labels


def best_loss(images, texts, labels):
    """The smallest loss over one free logit for each image and text, by their labels' counts."""
    counts = Counter()
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            counts[image, text, float(labels[i, j])] += 1
    total = 0.0
    for image, text in {key[:2] for key in counts}:
        matches, others = counts[image, text, 1.0], counts[image, text, -1.0]
        if matches and others:
            logit = math.log(matches / others)
            total += matches * math.log1p(math.exp(-logit)) + others * math.log1p(math.exp(logit))
    return total / len(images)


@pytest.fixture
def drawn():
    """40 pairs: images that come again with other texts, texts that come again."""
    draw = random.Random(3)
    images = [draw.randrange(12) for _ in range(40)]
    texts = [draw.randrange(9) for _ in range(40)]
    groups = [image // 2 for image in images]
    return images, texts, groups


def labels_of(texts, groups, positives):
    return Labels(torch.tensor(texts)[:, None], torch.tensor(groups), positives).tile()


@pytest.mark.parametrize("positives", ["diagonal", "caption", "group"])
def test_it_is_the_best_loss_of_the_whole_data(drawn, positives):
    images, texts, groups = drawn
    expected = best_loss(images, texts, labels_of(texts, groups, positives))
    found = sigmoid_floor(images, texts, groups, batch=40, positives=positives)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > 0


def test_a_image_in_two_groups_keeps_a_floor_under_group_labels():
    images, texts, groups = [1, 1, 2], ["a", "b", "a"], [1, 2, 3]
    found = sigmoid_floor(images, texts, groups, batch=3, positives="group")
    labels = labels_of([0, 1, 0], groups, "group")
    assert found == pytest.approx(best_loss(images, texts, labels), rel=1e-9)
    assert found > 0


@pytest.mark.parametrize("positives", ["diagonal", "caption"])
def test_it_is_the_mean_over_drawn_batches_for_the_best_logits(drawn, positives):
    images, texts, groups = drawn
    expected, rounds, draw = Counter(), 3000, random.Random(0)
    labels = labels_of(texts, groups, positives)
    for _ in range(rounds):
        chosen = draw.sample(range(40), 16)
        for i in chosen:
            for j in chosen:
                expected[images[i], texts[j], float(labels[i, j])] += 1 / rounds
    total = 0.0
    for image, text in {key[:2] for key in expected}:
        matches, others = expected[image, text, 1.0], expected[image, text, -1.0]
        if matches and others:
            both = matches + others
            total += matches * math.log(both / matches) + others * math.log(both / others)
    found = sigmoid_floor(images, texts, groups, batch=16, positives=positives)
    assert found == pytest.approx(total / 16, rel=0.02)  # 3000 drawn batches


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_nine_captions_under_diagonal_labels_have_the_floor_of_their_shares(batch):
    # many pairs of 9 captions: sum of p m H(1 / m) with m = 1 + (batch - 1) p copies in a batch
    counts = [700, 900, 1000, 1100, 1200, 1300, 1300, 1200, 1300]
    texts = [caption for caption, count in enumerate(counts) for _ in range(count)]
    expected = 0.0
    for count in counts:
        p = count / 10_000
        m = 1 + (batch - 1) * p
        entropy = math.log(m) / m - (1 - 1 / m) * math.log1p(-1 / m)
        expected += p * m * entropy
    for images in (range(10_000), texts):  # whether or not images come again with their captions
        found = sigmoid_floor(images, texts, range(10_000), batch=batch, positives="diagonal")
        assert found == pytest.approx(expected, rel=2e-3)  # drawn with repetition there
    assert sigmoid_floor(range(10_000), texts, texts, batch=batch, positives="caption") == 0
