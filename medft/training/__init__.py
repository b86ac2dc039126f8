"""The training loop's surroundings: arguments, callbacks, checkpoints, the run directory."""
