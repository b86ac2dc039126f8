"""At which steps a training saves checkpoints and evaluates, as Trainer will do it."""

from dataclasses import dataclass

from transformers import TrainerState, TrainingArguments

_SHOWN = 5
"""Of a list with more steps, those in the middle are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The steps of a training at which something comes, in order, unless it stops early."""

    checkpoints: list[int]
    evaluations: list[int]
    """Step 0 is the evaluation before training."""

    start: int
    """The step that training goes on from; 0 for a new run."""

    end: int
    """The last step."""

    def sentences(self) -> list[str]:
        """When checkpoints and evaluations come, and what a run without early checkpoints loses."""
        checkpoints = _listed(self.checkpoints, self.end)
        if self.checkpoints == self.evaluations:
            said = [f"checkpoints and evaluations: {checkpoints}"]
        else:
            evaluations = _listed(self.evaluations, self.end)
            said = [f"checkpoints: {checkpoints}", f"evaluations: {evaluations}"]
        if all(step == self.end for step in self.checkpoints):
            again = f"again from step {self.start}" if self.start else "from the beginning"
            key = "lower train.save_steps" if self.checkpoints else "change train.save_strategy"
            said.append(
                f"a run that is killed before its end has to be trained {again}, unless you {key}"
            )
        return said


def schedule(
    arguments: TrainingArguments, *, steps: int, steps_per_epoch: int, start: int = 0
) -> Schedule:
    """The steps at which checkpoints and evaluations come.

    Args:
        arguments: the trainer's.
        steps: of the whole run.
        steps_per_epoch: of which the last epoch may have fewer.
        start: the step of the checkpoint that training goes on from.
    """
    state = TrainerState()
    state.compute_steps(arguments, steps)

    def due(strategy: str, interval: float) -> list[int]:
        if strategy == "no":
            return []
        every = steps_per_epoch if strategy == "epoch" else int(interval)
        # Trainer saves and evaluates in the last step, too
        return sorted(step for step in {*range(every, steps, every), steps} if step > start)

    unit = steps_per_epoch if arguments.eval_strategy == "epoch" else 1
    first = [0] if arguments.eval_on_start and start == 0 else []
    later = due(arguments.eval_strategy, state.eval_steps)
    return Schedule(
        checkpoints=due(arguments.save_strategy, state.save_steps),
        evaluations=first + [step for step in later if step / unit >= arguments.eval_delay],
        start=start,
        end=steps,
    )


def _listed(steps: list[int], end: int) -> str:
    """Such as "steps 17, 34, ... 153 and 165, the end"."""
    if not steps:
        return "none"
    shown = [str(step) for step in steps]
    if len(shown) > _SHOWN:
        shown = [*shown[:2], f"... {shown[-2]}", shown[-1]]
    if steps[-1] == end:
        shown[-1] += ", the end"
    if len(shown) == 1:
        return f"step {shown[0]}"
    return f"steps {', '.join(shown[:-1])} and {shown[-1]}"
