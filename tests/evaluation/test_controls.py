"""Controls are what they say."""

from datasets import Dataset

from medft.data.rows import load_rows
from medft.evaluation.controls import nearest_texts, shuffled_image_control
from medft.evaluation.items import Item, items_of


def item(name, group, source="a", images=1, reference="", question="What?"):
    prompt = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return Item(
        id=name,
        group_id=group,
        source=source,
        prompt=prompt,
        row=0,
        images=range(images),
        reference=reference,
    )


def test_a_partner_is_of_the_same_source_and_count_and_of_another_group():
    items = [item(f"{s}{g}{i}", f"{s}{g}", s) for s in "ab" for g in range(5) for i in range(3)]
    items += [item("two", "x", images=2), item("other two", "x", images=2)]
    found = shuffled_image_control(items)
    for one, other in zip(items[:-2], found[:-2], strict=True):
        assert items[other].source == one.source
        assert items[other].group_id != one.group_id
        assert len(items[other].images) == len(one.images)
    assert found[-2:] == [None, None]
    assert len(set(found[:-2])) > 15  # not one image for all
    assert shuffled_image_control([item("x", "g", images=0), item("y", "h", images=0)]) == [
        None,
        None,
    ]


def test_the_nearest_text_is_that_of_the_nearest_image_of_the_source(data):
    train = load_rows(data / "chat" / "train.jsonl", split="train")
    references = [one.reference for one in items_of(train)]
    few = train.select(range(5))
    assert nearest_texts(few, train) == references[:5]

    def moved(rows):
        return Dataset.from_list([{**row, "source": "somewhere"} for row in rows], train.features)

    assert nearest_texts(moved(few), train) == references[:5]
    both = Dataset.from_list([*train, *moved(train.select([7, 9]))], train.features)
    assert set(nearest_texts(moved(few), both)) <= {references[7], references[9]}
