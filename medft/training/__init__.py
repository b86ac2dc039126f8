"""Support for the training loop: arguments, callbacks, checkpoints, the run directory."""
