"""The `medft` command line; heavy modules are imported only by the command that needs them."""

import argparse
import logging
import os
import sys
from pathlib import Path

import medft
from medft.errors import EXIT_NO, run_command
from medft.masking import log_handler


def main() -> int:
    """Run `medft` with the process's arguments; returns the exit code."""
    code = 0

    def run(argv: list[str]) -> None:
        nonlocal code
        arguments = parser().parse_args(argv)
        code = arguments.command(arguments) or 0

    return run_command(run, sys.argv[1:]) or code


def parser() -> argparse.ArgumentParser:
    """The argument parser of `medft`."""
    medft_parser = argparse.ArgumentParser(
        prog="medft",
        description="Fine-tune medical image-text models without silent failures. "
        "For research use.",
        epilog="--debug after any command shows the traceback of an error.",
    )
    medft_parser.add_argument("--version", action="version", version=medft.__version__)
    commands = medft_parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole pipeline on drawn images and tiny models")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.set_defaults(command=_demo)

    _add_data_commands(commands.add_parser("data", help="prepare data"))

    check = commands.add_parser("check", help="all that can be known of a recipe without weights")
    _add_recipe(check)
    check.add_argument(
        "--images", action="store_true", help="decode every image of the data as well"
    )
    check.set_defaults(command=_check)

    train = commands.add_parser("train", help="check a recipe, then train it under accelerate")
    _add_recipe(train)
    train.add_argument(
        "--config-file",
        "--config_file",
        type=Path,
        metavar="FILE",
        help="of accelerate; default: a single device, or DDP for several processes",
    )
    train.add_argument(
        "--num-processes",
        "--num_processes",
        type=_at_least_one,
        metavar="N",
        help="processes, one for each GPU or several on the CPU; default: the configuration's",
    )
    train.set_defaults(command=_train)

    reproduce = commands.add_parser("reproduce", help="train a run again and compare, bit for bit")
    reproduce.add_argument("source", type=Path, metavar="RUN")
    reproduce.add_argument(
        "--out", type=Path, metavar="DIR", help="default: RUN-reproduced, beside the run"
    )
    reproduce.set_defaults(command=_reproduce)

    evaluate = commands.add_parser(
        "evaluate", help="predictions of a model on held-out rows, their scores, and a page of both"
    )
    _add_evaluate_arguments(evaluate)

    predict = commands.add_parser("predict", help="reports, embeddings and nearest training cases")
    _add_predict_arguments(predict)

    merge = commands.add_parser("merge", help="fold an adapter into its base")
    merge.add_argument("source", type=Path, metavar="RUN|ADAPTER")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR")
    merge.add_argument(
        "--onto", choices=["original"], default="original", help="which weights of the base"
    )
    merge.add_argument(
        "--force",
        action="store_true",
        help="write a model that plain transformers computes otherwise than it was trained",
    )
    merge.set_defaults(command=_merge)
    return medft_parser


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = data_commands.add_parser("prepare", help="tables and images -> pairs.parquet")
    prepare.add_argument("sources", type=Path, metavar="SOURCES.yaml")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    prepare.add_argument(
        "--max-rejects",
        type=_share,
        default=0.2,
        metavar="SHARE",
        help="share of a source's rows that may be rejected (default 0.2)",
    )
    prepare.set_defaults(command=_prepare)
    chat = data_commands.add_parser("chat", help="pairs.parquet -> conversations to train on")
    chat.add_argument("pairs", type=Path, metavar="pairs.parquet")
    chat.add_argument("--out", type=Path, required=True, metavar="DIR")
    chat.add_argument("--format", choices=["trl", "sharegpt"], default="trl")
    chat.add_argument(
        "--join-questions",
        action="store_true",
        help="all questions about the same images become one conversation",
    )
    chat.set_defaults(command=_chat)


def _add_evaluate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="RUN|MODEL")
    command.add_argument(
        "--data", type=Path, metavar="FILE", help="chat JSONL or pairs.parquet; default: the run's"
    )
    command.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        help="of the run or of pairs.parquet; default: test, or validation where it has none",
    )
    command.add_argument("--against", choices=["base"], help="score the adapter's base as well")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.set_defaults(command=_evaluate)


def _add_predict_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="RUN|MODEL")
    command.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE|FOLDER|TABLE")
    command.add_argument(
        "--prompt",
        metavar="TEXT",
        help="for images without a question; default: one that the training rows declared",
    )
    command.add_argument(
        "--max-new-tokens",
        type=_at_least_one,
        metavar="N",
        help="of an answer; default: 1.5 times the longest trained answer",
    )
    command.add_argument(
        "--siglip", type=Path, metavar="RUN", help="adds embeddings and nearest training cases"
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl or .csv, continued if there",
    )
    command.set_defaults(command=_predict)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return share


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")


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
    from medft.check import check
    from medft.training.launch import train
    from medft.training.process import process_setup

    with process_setup(level=logging.ERROR):  # the training itself warns
        check(arguments.recipe, arguments.overrides)
    return train(
        arguments.recipe,
        arguments.overrides,
        arguments.config_file,
        num_processes=arguments.num_processes,
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


if __name__ == "__main__":
    sys.exit(main())
