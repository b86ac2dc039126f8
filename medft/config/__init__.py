"""Run configuration: strictly validated YAML files."""
