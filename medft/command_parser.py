"""The words that the `medft` command takes."""

import argparse
from pathlib import Path

import medft

MACHINE_OPTIONS = {
    "num-machines": int,
    "machine-rank": int,
    "main-process-ip": str,
    "main-process-port": int,
    "gpu-ids": str,
}
"""Options of accelerate launch that `medft train` passes on, and their types."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with overrides of a recipe also where options stand before them.

    `command` is the name of the command.
    """
    medft_parser = parser()
    arguments, rest = medft_parser.parse_known_args(argv)
    if rest:
        has_overrides = hasattr(arguments, "overrides")
        wrong = [word for word in rest if word.startswith("-") or not has_overrides]
        if wrong:
            medft_parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        arguments.overrides += rest
    return arguments


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
    demo.set_defaults(command="demo")

    _add_data_commands(commands.add_parser("data", help="prepare data"))

    check = commands.add_parser("check", help="all that can be known of a recipe without weights")
    _add_recipe(check)
    check.add_argument(
        "--images", action="store_true", help="decode every image of the data as well"
    )
    check.set_defaults(command="check")

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
        help="processes on all machines, one for each GPU or several on the CPU; default: the "
        "configuration's",
    )
    for option, kind in MACHINE_OPTIONS.items():
        words = f"--{option}", f"--{option.replace('-', '_')}"
        train.add_argument(*words, type=kind, help="of accelerate launch, passed on")
    train.set_defaults(command="train")

    reproduce = commands.add_parser("reproduce", help="train a run again and compare, bit for bit")
    reproduce.add_argument("source", type=Path, metavar="RUN")
    reproduce.add_argument(
        "--out", type=Path, metavar="DIR", help="default: RUN-reproduced, beside the run"
    )
    reproduce.set_defaults(command="reproduce")

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
    merge.set_defaults(command="merge")
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
    prepare.set_defaults(command="prepare")
    chat = data_commands.add_parser("chat", help="pairs.parquet -> conversations to train on")
    chat.add_argument("pairs", type=Path, metavar="pairs.parquet")
    chat.add_argument("--out", type=Path, required=True, metavar="DIR")
    chat.add_argument("--format", choices=["trl", "sharegpt"], default="trl")
    chat.add_argument(
        "--join-questions",
        action="store_true",
        help="all questions about the same images become one conversation",
    )
    chat.set_defaults(command="chat")


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
    command.set_defaults(command="evaluate")


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
    command.set_defaults(command="predict")


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
