"""The `medft` command line; heavy modules are imported only by the command that needs them."""

import argparse
import logging
import os
import sys
from collections.abc import Callable

from medft.command_parser import MACHINE_OPTIONS, parse
from medft.errors import EXIT_NO, run_command
from medft.masking import log_handler, printable


def main() -> int:
    """Run `medft` with the process's arguments; returns the exit code."""
    code = 0

    def run(argv: list[str]) -> None:
        nonlocal code
        arguments = parse(argv)
        code = COMMANDS[arguments.command](arguments) or 0

    return run_command(run, sys.argv[1:]) or code


def _demo(arguments: argparse.Namespace) -> None:
    from medft.demo.chain import run_demo
    from medft.training.process import process_setup

    with process_setup():
        report = run_demo(arguments.out)
    _say(str(report))


def _prepare(arguments: argparse.Namespace) -> None:
    from medft.data.image_sentences import all_sentences
    from medft.data.prepare import prepare

    logging.basicConfig(level=logging.INFO, handlers=[log_handler()])
    summary = prepare(arguments.sources, arguments.out, max_rejects=arguments.max_rejects)
    for name, counts in summary["sources"].items():
        reasons = "".join(f", {reason} {count}" for reason, count in counts["reasons"].items())
        _say(
            f"{name}: {counts['read']} rows read = {counts['accepted']} accepted "
            f"({counts['pairs']} pairs) + {counts['rejected']} rejected{reasons}"
        )
    splits = ", ".join(f"{split} {count}" for split, count in summary["splits"].items())
    _say(f"{summary['pairs']} pairs in {summary['groups']} groups: {splits}")
    _say(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in summary["joins"].items()))
    for sentence in all_sentences(summary):
        _say(sentence.text)
    _say(str(arguments.out / "pairs.parquet"))


def _chat(arguments: argparse.Namespace) -> None:
    from medft.data.chat import write_chat

    counts = write_chat(
        arguments.pairs,
        arguments.out,
        format=arguments.format,
        join_questions=arguments.join_questions,
    )
    for split, count in counts.items():
        _say(f"{arguments.out / split}.jsonl: {count} rows")


def _check(arguments: argparse.Namespace) -> None:
    from medft.check import check, check_images, describe_check
    from medft.training.process import process_setup

    with process_setup(level=logging.WARNING):
        checked = check(arguments.recipe, arguments.overrides)
        _say(describe_check(checked))
        if arguments.images:
            _say(f"images: {check_images(checked)} decoded")


def _train(arguments: argparse.Namespace) -> int:
    # the libraries take seconds to be imported
    sys.stderr.write(f"checking {printable(str(arguments.recipe))}\n")
    from medft.check import check
    from medft.training.launch import train
    from medft.training.process import process_setup

    with process_setup(level=logging.ERROR):  # the training itself warns
        check(arguments.recipe, arguments.overrides)
    options = vars(arguments)
    machine = {option: options[option.replace("-", "_")] for option in MACHINE_OPTIONS}
    return train(
        arguments.recipe,
        arguments.overrides,
        arguments.config_file,
        num_processes=arguments.num_processes,
        machine={option: value for option, value in machine.items() if value is not None},
        debug="--debug" in sys.argv,
    )


def _reproduce(arguments: argparse.Namespace) -> int:
    from medft.reproduce import describe, reproduce
    from medft.reproducible import plan_reproduction
    from medft.training.process import process_setup

    with process_setup(level=logging.ERROR):  # the training itself warns
        plan = plan_reproduction(arguments.source, arguments.out)
    _say(plan.describe())
    result = reproduce(plan)
    _say(describe(result))
    _say(str(plan.out / "reproduce.json"))
    return EXIT_NO if result["differs"] else 0


def _evaluate(arguments: argparse.Namespace) -> None:
    from medft.evaluation.evaluate import evaluate
    from medft.evaluation.report import describe
    from medft.training.process import process_setup

    with process_setup():
        metrics = evaluate(
            arguments.source,
            arguments.out,
            data=arguments.data,
            split=arguments.split,
            against_base=arguments.against == "base",
        )
    _say(describe(metrics))
    _say(str(arguments.out / "report.html"))


def _predict(arguments: argparse.Namespace) -> int:
    from medft.inference.files import predict_files
    from medft.training.process import process_setup

    with process_setup():
        counts = predict_files(
            arguments.source,
            arguments.inputs,
            arguments.out,
            prompt=arguments.prompt,
            siglip=arguments.siglip,
            max_new_tokens=arguments.max_new_tokens,
        )
    _say(
        f"{arguments.out}: {counts['written']} written ({counts['failed']} of them failed, see "
        f"error; {counts['truncated']} truncated), {counts['kept']} kept from before"
    )
    if counts["kept"] or counts["written"] > counts["failed"] or not counts["failed"]:
        return 0
    sys.stderr.write(
        f"medft: error: expected a prediction for one image at least, all {counts['failed']} "
        f"failed: see error in {arguments.out}\n"
    )
    return EXIT_NO


def _merge(arguments: argparse.Namespace) -> None:
    from medft.export.merge import merge
    from medft.training.process import process_setup

    with process_setup():
        adapter = merge(arguments.source, arguments.out, force=arguments.force)
    _say(f"{adapter} merged onto the original weights of its base: {arguments.out}")


def _say(line: str) -> None:
    """Write a line; where nobody can read it any more, what was done is done nevertheless."""
    encoding = sys.stdout.encoding or "utf-8"  # names may hold bytes that are no text
    try:
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError:  # its reader is gone, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": _demo,
    "prepare": _prepare,
    "chat": _chat,
    "check": _check,
    "train": _train,
    "reproduce": _reproduce,
    "evaluate": _evaluate,
    "predict": _predict,
    "merge": _merge,
}
"""What each command does; None for exit code 0."""


if __name__ == "__main__":
    sys.exit(main())
