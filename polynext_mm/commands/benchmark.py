"""Measure time and memory against peers: ``polynext-mm benchmark`` runs benchmarks/run.py."""

from __future__ import annotations

from collections.abc import Sequence

from polynext_mm.resources import folder

from .run import run_script


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(folder('benchmarks') / 'run.py', argv or [])
