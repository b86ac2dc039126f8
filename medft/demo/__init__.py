"""The pipeline on drawn images and tiny base models, so that it can be tried on any computer."""
