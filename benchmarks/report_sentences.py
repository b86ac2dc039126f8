"""Reads 100 report sentences by the lexicon, against what their writer says that they assert.

    python benchmarks/report_sentences.py

The sentences were written without sight of the lexicon and committed before its rules; those of
sentences_tuning.jsonl guided the rules, those of sentences_held_out.jsonl were scored once, when
the rules were finished. Prints precision and recall of the (finding, side) items, with and without
side, "no finding" included, and every sentence that is read otherwise than its writer says; writes
results/report_sentences.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from medft.metrics.assertions import NO_FINDING, mentions
from medft.metrics.lexicon import load_lexicon

SENTENCES = Path(__file__).parents[1] / "tests" / "metrics"


def agreement(pairs: list[tuple[set[Any], set[Any]]]) -> dict[str, Any]:
    """Precision and recall of the items read, over (items read, items asserted) of each text."""
    shared = sum(len(read & asserted) for read, asserted in pairs)
    read, asserted = (sum(map(len, side)) for side in zip(*pairs, strict=True))
    return {
        "precision": round(shared / read, 4),
        "recall": round(shared / asserted, 4),
        "shared": shared,
        "read": read,
        "asserted": asserted,
    }


def scored(path: Path) -> dict[str, Any]:
    """The agreement on the sentences of a file, and those read otherwise."""
    lexicon, pairs, errors = load_lexicon(), [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence = json.loads(line)
        asserted = {(name, side) for name, side in sentence["findings"]}
        if not asserted and sentence["normal"]:
            asserted = {(NO_FINDING, "")}
        read = set(mentions(sentence["text"], lexicon))
        pairs.append((read, asserted))
        if read != asserted:
            items = {"read": sorted(read), "asserted": sorted(asserted)}
            errors.append({"text": sentence["text"], **items})
    names = [tuple({name for name, _ in items} for items in pair) for pair in pairs]
    return {
        "sentences": len(pairs),
        "read_as_written": len(pairs) - len(errors),
        "with_side": agreement(pairs),
        "without_side": agreement(names),
        "errors": errors,
    }


def main() -> None:
    """Print the figures and write the results."""
    results = {}
    for name in ("tuning", "held_out"):
        found = results[name] = scored(SENTENCES / f"sentences_{name}.jsonl")
        sys.stdout.write(f"{name}: {found['read_as_written']} of {found['sentences']} as written\n")
        for key in ("with_side", "without_side"):
            one = found[key]
            sys.stdout.write(
                f"  {key.replace('_', ' ')}: precision {one['precision']:.3f} ({one['shared']} of "
                f"{one['read']}), recall {one['recall']:.3f} ({one['shared']} of "
                f"{one['asserted']})\n"
            )
        for error in found["errors"]:
            read, asserted = (
                ", ".join(" ".join(item).strip() for item in error[key]) or "nothing"
                for key in ("read", "asserted")
            )
            sys.stdout.write(f"  {error['text']}\n    read {read}; written {asserted}\n")
    target = Path(__file__).parent / "results" / "report_sentences.json"
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
