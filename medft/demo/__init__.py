"""The pipeline on synthetic images and tiny base models, to be tried on any computer."""
