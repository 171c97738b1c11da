"""A page for one CLSGen checkpoint: a probability, its gauge and its reason for a text, or for a CSV file of them.

CLSGEN_MODEL=outputs/trial_claims/model python space/app.py     # a Space reads space.json instead
"""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# In the Hub's cache this file is a link, and Python would look for its siblings beside what it links to.
sys.path.insert(0, str(Path(__file__).absolute().parent))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import batch
import gradio as gr
import rendering
from answering import Answerer, Shown, Turn
from loading import Example, Source, load_model, read_examples, read_source

HERE = Path(__file__).absolute().parent
BY_FIELD, WHOLE = "By field", "As one text"
MAX_WAITING = 32
KEPT_SECONDS = 3600  # uploaded and written files, on the server
STATUS = '<p role="status" aria-live="polite">${value}</p>'
# Where the columns stand below each other, the answer would come out of sight.
SHOW_ANSWER, SHOW_REPORT = (
    f"(turn) => {{ if (innerWidth < 768) document.getElementById('{place}').scrollIntoView(); return turn; }}"
    for place in ("answer", "report")
)
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # events of the page itself
logger = logging.getLogger("space")

THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
).set(  # Gradio's own blues are too pale for text
    button_primary_background_fill="#1a4fc4",
    button_primary_background_fill_hover="#163f9c",
    button_primary_background_fill_dark="#2f63d8",
    button_primary_background_fill_hover_dark="#2856c0",
    button_primary_text_color="white",
    button_secondary_background_fill="var(--card)",
    button_secondary_background_fill_dark="var(--card)",
    button_secondary_background_fill_hover="var(--soft)",
    button_secondary_background_fill_hover_dark="var(--soft)",
    button_secondary_border_color="var(--line)",
    button_secondary_border_color_dark="var(--line)",
    button_border_width="1px",
    color_accent="#1a4fc4",
    block_background_fill="var(--card)",
    block_background_fill_dark="var(--card)",
    block_border_color="var(--line)",
    block_border_color_dark="var(--line)",
    block_label_text_color="var(--ink)",
    block_label_text_color_dark="var(--ink)",
    block_title_text_color="var(--ink)",
    block_title_text_color_dark="var(--ink)",
    input_background_fill="var(--ground)",
    input_background_fill_dark="var(--ground)",
    input_border_color="#7d8a9b",
    input_border_color_dark="#66748a",
    input_border_width="1px",
    input_placeholder_color="var(--muted)",
    input_placeholder_color_dark="var(--muted)",
    checkbox_label_background_fill="var(--soft)",
    checkbox_label_background_fill_dark="var(--soft)",
)


class Page:
    """The page of one model.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
        source (`Source`): Where it came from.
        examples (`list[Example]`): Texts to start with.
    """

    def __init__(self, model: Any, source: Source, examples: list[Example]):
        self.answerer = Answerer(model)
        self.prompt = self.answerer.prompt
        self.config = model.config
        self.source = source
        self.examples = examples

    def answer_text(self, turn: Turn, way: str, weigh: bool, whole: str, *values: str) -> Iterator[Shown]:
        """Answers what the inputs hold."""
        fields = dict(zip(self.prompt.fields, (value or "" for value in values), strict=True))
        yield from self.answerer.answer_text((whole or "") if way == WHOLE else fields, weigh, turn.wanted())

    def answer_file(self, turn: Turn, path: str | None, explain: bool) -> Iterator[tuple[str, str, Any]]:
        """Answers the file, and shows the download when it is there."""
        for announced, report, written in self.answerer.answer_file(path, explain, turn.wanted()):
            # Gradio copies the file before it asks for the next step.
            yield announced, report, gr.DownloadButton(value=written and str(written), visible=written is not None)

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(
            title="CLSGen: a number and a reason", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
        ) as page:
            gr.HTML(rendering.header(self.prompt.question, self.source.name))
            announcer = gr.HTML("", html_template=STATUS, elem_id="announcer")
            with gr.Tabs():
                with gr.Tab("One text"):
                    self._build_text_tab(announcer)
                with gr.Tab("A file of texts"):
                    self._build_file_tab(announcer)
            gr.HTML(rendering.about(self.source, self.config, self.answerer.error_rate))
        return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)  # one model on one set of cores

    def _build_text_tab(self, announcer: gr.HTML) -> None:
        fields, document = self.prompt.fields, self.prompt.document
        with gr.Row(elem_classes="columns"):
            with gr.Column(elem_classes="asking"):
                places = gr.Column(visible=bool(self.examples))
                way = gr.Radio([BY_FIELD, WHOLE], value=BY_FIELD, label="Write the text", visible=len(fields) > 1)
                inputs = [
                    gr.Textbox(label=rendering.readable(name), lines=8 if name == document else 2, max_lines=16)
                    for name in fields
                ]
                whole = gr.Textbox(
                    label="Text", lines=10, max_lines=20, visible=False, placeholder=self._skeleton(), elem_id="whole"
                )
                weigh = gr.Checkbox(True, label="Show what each sentence does to the number")
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, interactive=False)
                with places:
                    self._build_examples(way, whole, inputs)
            with gr.Column(elem_classes="answering"):
                answer = gr.HTML(rendering.empty("The answer appears here."), elem_id="answer")
                explanation = gr.HTML(elem_id="explanation")
        sentences = gr.HTML(elem_id="sentences")
        way.change(
            lambda chosen: [gr.Textbox(visible=chosen == each) for each in (*[BY_FIELD] * len(fields), WHOLE)],
            way, [*inputs, whole], **QUIET,
        )  # fmt: skip
        self._connect(
            [ask.click, whole.submit, *(each.submit for each in inputs)],
            self.answer_text,
            [way, weigh, whole, *inputs],
            [announcer, answer, explanation, sentences],
            stop,
            SHOW_ANSWER,
        )

    def _connect(
        self, triggers: list[Any], ask: Any, inputs: list[Any], outputs: list[Any], stop: gr.Button, js: str
    ) -> None:
        """Makes `triggers` ask, and `stop` end it: what is asked for checks in its turn whether it still is wanted."""

        def begin(turn: Turn) -> tuple[str, Any]:
            turn.begin()
            return rendering.progress("Waiting for its turn…"), gr.Button(interactive=True)

        turn = gr.State(Turn())
        begun = gr.on(triggers, begin, turn, [outputs[1], stop], js=js, **QUIET)
        asked = begun.then(ask, [turn, *inputs], outputs, show_progress="hidden", api_name=ask.__name__)
        asked.then(lambda: gr.Button(interactive=False), None, stop, **QUIET)
        stop.click(Turn.stop, turn, None, **QUIET)

    def _skeleton(self) -> str:
        """How one text of this task looks."""
        template = self.prompt.template
        for name in self.prompt.fields:
            template = template.replace(f"{{{name}}}", "…")
        return template

    def _build_examples(self, way: gr.Radio, whole: gr.Textbox, inputs: list[gr.Textbox]) -> None:
        gr.HTML('<h2 class="examples">Examples</h2>')
        with gr.Row():
            for example in self.examples:
                is_whole = isinstance(example.text, str)
                values = [
                    WHOLE if is_whole else BY_FIELD,
                    example.text if is_whole else "",
                    *("" if is_whole else example.text[name] for name in self.prompt.fields),
                ]
                gr.Button(example.title, size="sm", min_width=120, elem_classes="example").click(
                    lambda values=values: values, None, [way, whole, *inputs], **QUIET
                )  # fmt: skip

    def _build_file_tab(self, announcer: gr.HTML) -> None:
        gr.HTML(rendering.file_help(self.prompt.fields, batch))
        with gr.Row(elem_classes="columns"):
            with gr.Column():
                file = gr.File(label="CSV file", file_types=[".csv"], elem_id="file", height=160)
                explain = gr.Checkbox(
                    False, label=f"Write explanations too (slow; at most {batch.MAX_EXPLAINED_ROWS} rows)"
                )
                with gr.Row():
                    ask = gr.Button("Answer all rows", variant="primary", elem_id="ask-file", scale=3)
                    stop = gr.Button("Stop", elem_id="stop-file", scale=1, interactive=False)
            with gr.Column():
                report = gr.HTML(rendering.empty("The answers appear here."), elem_id="report")
                download = gr.DownloadButton(
                    "Download the answers", variant="primary", visible=False, elem_id="download"
                )
        self._connect([ask.click], self.answer_file, [file, explain], [announcer, report, download], stop, SHOW_REPORT)


def main() -> int:
    """Serves the page; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        source = read_source(HERE, os.environ)
        model = load_model(source)
        page = Page(model, source, read_examples(HERE / "examples.json", model.encoder.prompt.fields)).build()
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    page.launch(
        theme=THEME, css_paths=[HERE / "style.css"], ssr_mode=False, footer_links=["api", "settings"],
        max_file_size=4 * batch.MAX_BYTES,  # those just above the limit get our own message
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
