"""Builds the CliniFact evidence task; see `data/clinifact/prepare.py`, which does the work."""

from pathlib import Path

from clsgen.data.clinifact import prepare as clinifact


def prepare(source: str | Path, output_dir: str | Path) -> dict:
    """As `clinifact.prepare`, with TRUE and FALSE as evidence against NONE."""
    return clinifact.prepare(source, output_dir, task="clinifact_evidence")
