"""The report as blocks, and the blocks as a self-contained HTML page or as Markdown; all text is escaped."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from clsgen.evaluation.plots import for_page

TEMPLATES = Path(__file__).resolve().parent / "templates"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+|&~])")


@dataclass(frozen=True)
class Paragraph:
    """A few sentences; `warning` for what a reader must not miss."""

    text: str
    warning: bool = False
    kind: str = field(default="paragraph", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Plot:
    """An SVG with a title; `name` is that of its file."""

    name: str
    title: str
    svg: str
    note: str = ""

    @property
    def inline(self) -> Markup:
        """The SVG for a page; ours, so not escaped."""
        return Markup(for_page(self.svg, self.title))


@dataclass(frozen=True)
class Plots:
    """Plots side by side."""

    plots: list[Plot]
    kind: str = field(default="plots", init=False)


@dataclass(frozen=True)
class Example:
    """A row of the data with the model's answer."""

    id: str
    fields: dict[str, str]
    facts: dict[str, str]
    explanations: dict[str, str]


@dataclass(frozen=True)
class Examples:
    """Examples of one kind."""

    title: str
    note: str
    examples: list[Example]
    kind: str = field(default="examples", init=False)


@dataclass(frozen=True)
class Part:
    """A part of the report: a title and its blocks."""

    title: str
    blocks: list[Any]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Args:
        title, subtitle (`str`): Its head.
        question (`str`): The task's.
        headline (`list[tuple[str, str, str]]`): Name, value and interval (or why there is none) of the main figures.
        parts (`list[Part]`): What follows.
        facts (`dict[str, str]`): How it was made.
    """

    title: str
    subtitle: str
    question: str
    headline: list[tuple[str, str, str]]
    parts: list[Part]
    facts: dict[str, str]

    @property
    def plots(self) -> Iterable[Plot]:
        """All plots, in their order."""
        return (
            plot for part in self.parts for block in part.blocks if isinstance(block, Plots) for plot in block.plots
        )

    def to_html(self) -> str:
        """A page that needs nothing beside it: no script, no font, no image from elsewhere."""
        loader = jinja2.FileSystemLoader(TEMPLATES)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.get_template("report.html").render(report=self)

    def to_markdown(self, plot_folder: str) -> str:
        """The same as Markdown, with the plots as files in `plot_folder`."""
        lines = [f"# {escape(self.title)}", escape(self.subtitle), f"> {escape(self.question)}"]
        lines.append(_table(["", "value", "95% interval"], [list(entry) for entry in self.headline]))
        for part in self.parts:
            lines.append(f"## {escape(part.title)}")
            lines += [_RENDERERS[block.kind](block, plot_folder) for block in part.blocks]
        lines.append("## How this was made")
        lines.append(_table(["", ""], [list(fact) for fact in self.facts.items()]))
        return "\n\n".join(line for line in lines if line) + "\n"


def escape(text: str) -> str:
    """`text` on one line, with nothing left that Markdown or HTML would act on."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else escape(cell) for cell in line) + " |" for line in lines
    )


def _examples(block: Examples, _: str) -> str:
    lines = [f"### {escape(block.title)}", escape(block.note)]
    for example in block.examples:
        lines.append(f"**{escape(example.id)}**: {escape('; '.join(f'{k} {v}' for k, v in example.facts.items()))}")
        entries = {**example.fields, **example.explanations}
        lines.append("\n".join(f"- {escape(name)}: {escape(text)}" for name, text in entries.items()))
    return "\n\n".join(line for line in lines if line)


_RENDERERS = {
    "paragraph": lambda block, _: f"**{escape(block.text)}**" if block.warning else escape(block.text),
    "table": lambda block, _: _table(block.columns, block.rows) + (f"\n\n{escape(block.note)}" if block.note else ""),
    "plots": lambda block, folder: "\n\n".join(
        f"![{escape(plot.title)}]({folder}/{plot.name}.svg)" + (f"\n\n{escape(plot.note)}" if plot.note else "")
        for plot in block.plots
    ),
    "examples": _examples,
}
