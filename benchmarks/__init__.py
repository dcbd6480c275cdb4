"""Measurements behind the numbers in README.md and docs. Results go to results/*.json."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
