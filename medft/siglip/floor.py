"""Lower bound of the sigmoid loss where equal pairs have different labels.

Equal images and equal texts have equal embeddings. Where such a pair is labeled once as a match and
once as no match, as copies of a caption are under diagonal labels, its best logit is that of the
fraction of matches, and the entropy of that fraction remains.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def sigmoid_floor(
    images: Sequence[Hashable],
    texts: Sequence[Hashable],
    groups: Sequence[Hashable],
    *,
    batch: int,
    positives: str,
) -> float:
    """Lower bound of the mean sigmoid loss over batches drawn from the pairs.

    Args:
        images: key of each pair's image, equal for equal images.
        texts: key of each pair's text, equal for texts with the same tokens.
        groups: group of each pair.
        batch: number of pairs that are compared with each other, drawn without replacement.
        positives: diagonal, caption or group, as in `medft.siglip.loss.Labels`.

    Source: ours. With P the expected matches and N the expected non-matches of an image and a text
    in a batch, the minimum over l of P softplus(-l) + N softplus(l) is (P + N) H(P / (P + N)), H
    the binary entropy. P counts the pairs' own matches and, times (batch - 1) / (pairs - 1), the
    matches with other pairs.
    """
    pairs = len(images)
    with_other = (min(batch, pairs) - 1) / max(pairs - 1, 1)
    cells = Counter(zip(images, texts, strict=True))
    of_image, of_text = Counter(images), Counter(texts)
    in_groups = _of_images_in_groups(images, texts, groups) if positives == "group" else {}
    of_text_in_group = Counter(zip(texts, groups, strict=True))
    floor = 0.0
    for (image, text), own in cells.items():
        matches, others = float(own), float(of_image[image] * of_text[text] - own)
        if positives != "diagonal":
            matches += with_other * own * (of_text[text] - 1)
            others = (of_image[image] - own) * of_text[text]
        for group, found in in_groups.get(image, {}).items():
            shown = found.total() - found[text]  # label 0 with the group's copies of the text
            others -= shown * of_text_in_group[text, group]
        floor += _entropy(matches, with_other * others)
    return floor / pairs


def _of_images_in_groups(
    images: Sequence[Hashable], texts: Sequence[Hashable], groups: Sequence[Hashable]
) -> dict[Hashable, dict[Hashable, Counter[Hashable]]]:
    """Counts of each image with each text, by image and group."""
    found: dict[Hashable, dict[Hashable, Counter[Hashable]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for image, text, group in zip(images, texts, groups, strict=True):
        found[image][group][text] += 1
    return found


def _entropy(matches: float, others: float) -> float:
    if others <= 0:
        return 0.0
    total = matches + others
    return matches * math.log(total / matches) + others * math.log(total / others)
