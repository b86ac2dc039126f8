"""Runs the recipe of a finished run again, as it was recorded, and compares the two.

The recorded values of the libraries' configurations are applied, not today's defaults.
"""

import logging
import signal
from pathlib import Path
from typing import Any

from medft.errors import EXIT_SIGNAL, RunError, Stopped
from medft.files import packaged_file, write_json
from medft.masking import printable
from medft.models.resolved import OPTION, environment_of
from medft.models.saved import RunLayout
from medft.provenance import masked
from medft.reproducible import Plan
from medft.training.compare_runs import compare_runs, first_different_step
from medft.training.launch import supervised
from medft.training.launched import ASKED
from medft.training.process import THREADS
from medft.training.signals import STOPPING

logger = logging.getLogger(__name__)


def reproduce(plan: Plan) -> dict[str, Any]:
    """Repeat a run below `plan.out`, and write reproduce.json there; returns its content.

    Args:
        plan: from `plan_reproduction`; nothing is written into its run.

    Raises:
        RunError: the repeated run did not end, or a result cannot be read.
        Stopped: a signal arrived.
    """
    again = run_again(plan)
    differs = compare_runs(plan.run, again)
    weights = [entry for entry in differs if entry["what"] in ("adapter", "model")]
    result = {
        "identical_adapter": not weights,
        "first_different_step": first_different_step(differs),
        "differs": differs,
        "expected": plan.verdict,
        "differs_now": plan.differs_now,
        "applied": plan.applied,
    }
    write_json(plan.out / "reproduce.json", masked(result))
    return result


def describe(result: dict[str, Any]) -> str:
    """The result of a comparison as text, a difference a line."""
    lines = [_sentence(entry) for entry in result["differs"]]
    if not lines:
        return "identical: adapter or model, log history and metrics are equal bit for bit"
    step = result["first_different_step"]
    where = "no step of the log" if step is None else f"step {step} of the log first"
    return "\n".join(map(printable, [f"different: {where}", *lines]))


def _sentence(entry: dict[str, Any]) -> str:
    if "tensors" in entry:
        return (
            f"{entry['what']}: {entry['tensors']} of {entry['of']} tensors differ, first "
            f"{entry['first']}; largest difference of two weights: {entry['max_difference']}"
        )
    step = f"step {entry['step']}: " if "step" in entry else ""
    return f"{step}{entry['what']} was {entry['then']} and is {entry['now']}"


def run_again(plan: Plan) -> RunLayout:
    """Train with the recorded launcher, processes and values; returns the new run.

    Raises:
        RunError: it did not end as completed.
        Stopped: a signal arrived.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    again = RunLayout(plan.out / "run")
    script = packaged_file(f"recipes/{plan.recipe.script}")
    words = [str(plan.run.recipe), *plan.overrides, OPTION, str(plan.run.record)]
    module, *options = _launcher(plan)
    recorded = plan.recorded.resolved.determinism
    environment = {**environment_of(recorded), THREADS: str(plan.threads)}
    environment.pop(ASKED, None)  # of a launcher above
    code = supervised(module, [*options, str(script), *words], environment)
    if code - EXIT_SIGNAL in STOPPING:
        logger.warning("%s", _left(plan.out))
        raise Stopped(signal.Signals(code - EXIT_SIGNAL))
    status = again.read_record()["status"] if again.record.is_file() else "not begun"
    if code or status != "completed":
        raise RunError(
            f"expected the repeated run to complete, it is {status} (exit code {code}; its own "
            f"message stands above): {_left(plan.out)}"
        )
    return again


def _left(out: Path) -> str:
    return f"{out} is left as it is, remove it before the next try"


def _launcher(plan: Plan) -> list[str]:
    """The module that starts the processes, with options; writes DeepSpeed's files to `out`."""
    launch = plan.launch
    if launch.strategy == "ddp":
        return ["torch.distributed.run", "--standalone", f"--nproc_per_node={launch.processes}"]
    config = packaged_file(f"accelerate_configs/{'cpu' if plan.on_cpu else 'single_gpu'}.yaml")
    if launch.strategy != "single":
        deepspeed, config = plan.out / "deepspeed.json", plan.out / "accelerate.json"
        write_json(deepspeed, plan.recorded.resolved.deepspeed)
        content = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "deepspeed_config_file": str(deepspeed.absolute()),
                "zero3_init_flag": launch.strategy == "zero3",
            },
            "num_machines": 1,
            "machine_rank": 0,
            "num_processes": launch.processes,
            "use_cpu": plan.on_cpu,
        }
        write_json(config, content)
    threads = ["--num_cpu_threads_per_process", "1"]  # each process sets its own number
    return ["accelerate.commands.launch", "--config_file", str(config), *threads]
