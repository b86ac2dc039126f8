"""The minor versions of the libraries that medft was tested with."""

import re

from medft.provenance import package_versions

TESTED = {
    "accelerate": ["1.15"],
    "bitsandbytes": ["0.50"],
    "datasets": ["5.2"],
    "deepspeed": ["0.19"],
    "peft": ["0.21"],
    "torch": ["2.13"],
    "transformers": ["5.23"],
    "trl": ["1.16"],
}


def untested_versions() -> dict[str, str]:
    """The installed versions that lie outside the tested minors, by package."""
    return {
        name: version
        for name, version in package_versions().items()
        if name in TESTED and _minor(version) not in TESTED[name]
    }


def _minor(version: str) -> str:
    """The first two numbers of a version."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version
