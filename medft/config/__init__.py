"""What a run is asked to do: YAML files, read strictly."""
