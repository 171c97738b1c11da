"""One table of all ratios in `benchmarks/results`, under the machines that they were measured on.

python -m benchmarks.report

A row is a ratio of ours over a peer's, or with a speed-up over without it. What is compared, and whether more or less
is better, stands at the head of the module that wrote the file: `benchmarks/<file>.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl")
RESULTS = Path(__file__).resolve().parent / "results"


def ratios_of(report: dict[str, Any]) -> dict[str, float]:
    """The ratios of a result file, by name: the numbers in `ratios`, and the `ratio` of whatever has one.

    Args:
        report (`dict`): A result file's content.
    """
    ratios = report.get("ratios", {})
    found = {name: value.get("ratio") if isinstance(value, dict) else value for name, value in ratios.items()}
    sections = {name: value for name, value in report.items() if isinstance(value, dict) and "ratio" in value}
    return found | {name: value["ratio"] for name, value in sections.items()}


def describe(report: dict[str, Any]) -> str:
    """Machine, versions and command of a result file, in one line."""
    machine = report.get("machine", {})
    threads, versions = machine.get("threads"), report.get("versions", {})
    named = [f"{name} {versions[name]}" for name in PACKAGES if name in versions]
    parts = [
        f"{machine.get('processor', 'unknown processor')}, {threads} thread{'s' * (threads != 1)}",
        ", ".join(named),
        f"`{report.get('command', 'unknown command')}`",
    ]
    return "; ".join(filter(None, parts))


def table(folder: Path) -> str:
    """The table, in Markdown.

    Args:
        folder (`Path`): With the result files.

    Raises:
        FileNotFoundError: for a folder without result files.
        ValueError: for a file that is not JSON, by its name.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"No result files in {folder}: run `make bench` first.")
    runs, rows, others = [], [], []
    for file in files:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}): run `python -m benchmarks.{file.stem}` again.") from error
        ratios = ratios_of(report)
        if not ratios:
            others.append(file.name)
            continue
        runs.append(f"- {file.stem}: {describe(report)}")
        rows += [f"| {file.stem} | {name} | {value:.3f} |" for name, value in ratios.items()]
    lines = [*runs, "", "| benchmark | ratio | value |", "|---|---|---:|", *rows]
    if others:
        lines += ["", f"Without ratios, to be read as they are: {', '.join(others)}."]
    return "\n".join(lines)


def main() -> None:
    """Prints the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="A folder of result files.")
    print(table(parser.parse_args().results))


if __name__ == "__main__":
    main()
