"""The table that `make proof` and `make gpu` leave: what was run, on what, how it went."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    """Adds --result-table FILE."""
    parser.addoption("--result-table", type=Path, help="file for the outcomes of this session")


class ResultTable:
    """Collects the outcome of every test of a session; a session that is stopped leaves a table."""

    def __init__(self, file):
        from medft.provenance import hardware, medft_version, package_versions

        self.file = file
        self.rows = {}
        self.facts = {
            "medft": medft_version(),
            "versions": package_versions(),
            "hardware": hardware(),
        }

    def pytest_runtest_logreport(self, report):
        """Keep the seconds of all phases, the worst outcome, and the figures a test recorded."""
        row = self.rows.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            row["outcome"] = report.outcome
        row |= dict(report.user_properties)

    def pytest_runtest_logfinish(self, nodeid):
        """Write the table as it is after this test."""
        table = {**self.facts, "tests": self.rows}
        self.file.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@pytest.hookimpl
def pytest_configure(config):
    """Collect where a file is named."""
    if file := config.getoption("--result-table"):
        config.pluginmanager.register(ResultTable(file))
