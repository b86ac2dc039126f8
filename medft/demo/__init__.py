"""The pipeline on drawn pictures and tiny base models, so that it can be tried on any computer."""
