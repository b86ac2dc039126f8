"""The table that `make proof` leaves: what was run, on which versions, and how it went."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    """Adds --proof-table FILE."""
    parser.addoption("--proof-table", type=Path, help="file for the outcomes of this session")


class ProofTable:
    """Collects the outcome of every test of a session."""

    def __init__(self, file):
        self.file = file
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        """Keep the seconds of all phases, and the worst outcome."""
        row = self.rows.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            row["outcome"] = report.outcome

    def pytest_sessionfinish(self):
        """Write the table."""
        from medft.provenance import hardware, medft_version, package_versions

        table = {
            "medft": medft_version(),
            "versions": package_versions(),
            "hardware": hardware(),
            "tests": self.rows,
        }
        self.file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@pytest.hookimpl
def pytest_configure(config):
    """Collect where a file is named."""
    if file := config.getoption("--proof-table"):
        config.pluginmanager.register(ProofTable(file))
