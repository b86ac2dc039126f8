"""The one reset of what Accelerate keeps in a process."""

from accelerate.state import AcceleratorState


def reset_accelerator() -> None:
    """Forget precision, devices and processes, so that the next trainer chooses them anew."""
    AcceleratorState._reset_state(True)
