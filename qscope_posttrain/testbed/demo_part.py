"""One half of the demo: what it printed, shows and leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.report.html import Section
from qscope_posttrain.report.tables import Table


@dataclass(frozen=True)
class DemoPart:
    """A finished experiment, ready for the report and the summary."""

    sections: list[Section]
    """Of the report"""
    tables: Mapping[str, Table]
    """By name, for the summary"""
    results: Mapping[str, Any]
    """JSON-ready numbers for the summary"""
    artefacts: Mapping[str, Path]
    """Files that other commands read"""
    seeds: tuple[int, ...]
