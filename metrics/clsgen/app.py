"""The Space of this metric: a table of probabilities and labels in, the metric's values out."""

from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).absolute().parent  # not where a link of the Hub's cache leads
EXAMPLE = [[0.2, 0], [0.8, 1], [0.6, 0], [0.4, 1]]


def compute(table, configuration, threshold):
    """The metric of the table's rows."""
    metric = evaluate.load(str(FOLDER / "clsgen.py"), configuration)
    try:
        filled = [row for row in table if set(row) - {None, ""}]
        if not filled or any({None, ""} & set(row) for row in filled):
            raise ValueError("Give a row at least, and both a probability and a label in each.")
        rows = [(float(probability), float(label)) for probability, label in filled]
        found = metric.compute(
            predictions=[row[0] for row in rows], references=[row[1] for row in rows], threshold=threshold
        )
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error  # the visitor reads it
    return {name: None if value != value else value for name, value in found.items()}


demo = gr.Interface(
    fn=compute,
    inputs=[
        gr.Dataframe(EXAMPLE, headers=["predictions", "references"], datatype="number", type="array"),
        gr.Radio(["classification", "alignment"], value="classification", label="Configuration"),
        gr.Slider(0, 1, value=0.5, label="Threshold"),
    ],
    outputs=gr.JSON(label="Values"),
    title="CLSGen metric",
    flagging_mode="never",
    article=(FOLDER / "README.md").read_text(encoding="utf-8").split("---", 2)[2],
)

if __name__ == "__main__":
    demo.launch()
