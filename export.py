"""Exports a checkpoint to files that need no remote code: stock classes where those can say the same.

python export.py --model outputs/trial_claims/model --output outputs/trial_claims/export

Writes `causal_lm/` (the language model), `cls_head.safetensors` with `clsgen.json` (the head, and all that makes its
logit a probability), and where the head has the stock form `sequence_classification/`. docs/serving.md tells how to
serve them.
"""

import copy
import json
import logging
import math
import shutil
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, normalizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from clsgen.atomic_io import write_json
from clsgen.configuration_clsgen import FORMAT_VERSION
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.prompting_clsgen import PromptEncoder

logger = logging.getLogger("clsgen.export")
CONSTANT_TOLERANCE = 1e-6  # in log-odds
FORMULA = (
    "probability = sigmoid(logit / temperature + bias), where logit = (1 - lm_reading_weight) * (cls_logit - "
    "log(pos_weight)) + lm_reading_weight * (log P(verdict_ids[1]) - log P(verdict_ids[0])), by the language model "
    "behind the prompt; label 1 where probability >= threshold"
)


@dataclass
class ExportArguments:
    """What to export, and where to."""

    model: str = field(metadata={"help": "A CLSGen checkpoint: a folder or a Hub id."})
    output: str = field(metadata={"help": "A new folder."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repository."})


def stock_form_problem(model: ClsGenForCausalLMAndClassification) -> str | None:
    """Why stock classes can't say what this model's head says; `None` where they can."""
    config = model.config
    layers, poolings = model.read_layers(), [pooling for _, pooling in config.cls_reads]
    if layers != [config.text_config.num_hidden_layers] or poolings != ["decision"]:
        return f"the head reads {config.cls_reads}, and a stock one reads [[-1, 'decision']] alone"
    if config.lm_reading_weight:
        return "the language model's own reading is a part of the number (`lm_reading_weight`)"
    constant = head_constant(model)
    if abs(constant) > CONSTANT_TOLERANCE:
        return (
            f"head and calibration have the constant term {constant:.4f} in log-odds, and a stock head has none: "
            "train with --cls_reads=-1:decision --cls_bias false and without pos_weight"
        )
    if type(config.text_config) not in AutoModelForSequenceClassification._model_mapping:
        return f"transformers has no sequence classifier for {config.text_config.model_type!r}"
    if model.encoder.suffix_ids[-1] == model.pad_token_id:
        return "the prompt ends in the padding token, which a stock classifier passes over"
    return None


def head_constant(model: ClsGenForCausalLMAndClassification) -> float:
    """What the calibrated log-odds are where the head's features are 0."""
    config = model.config
    bias = 0.0 if model.cls_head.bias is None else model.cls_head.bias.item()
    calibration = config.calibration
    return (bias - math.log(config.pos_weight)) / calibration["temperature"] + calibration["bias"]


def sequence_classifier(model: ClsGenForCausalLMAndClassification) -> PreTrainedModel:
    """The stock classifier with the same probabilities: softmax over the rows `[0, weight / temperature]`."""
    config = AutoConfig.for_model(**model.config.text_config.to_dict())
    config.id2label = dict(enumerate(model.config.label_names))
    config.label2id = {name: label_id for label_id, name in config.id2label.items()}
    config.pad_token_id = model.pad_token_id
    config.problem_type = "single_label_classification"
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.lm.dtype)
    classifier.base_model.load_state_dict(model.lm.base_model.state_dict())
    row = model.cls_head.weight.detach() / model.config.calibration["temperature"]
    with torch.no_grad():
        classifier.score.weight.copy_(torch.cat([torch.zeros_like(row), row]))
    return classifier.eval()


def classifier_tokenizer(encoder: PromptEncoder) -> PreTrainedTokenizerBase:
    """A tokenizer that puts the prompt around a text by itself, so that a plain string in is enough.

    The question is appended to the text before it is split into tokens, as the model was trained; the ids of the chat
    template, whose control tokens no text may forge, are put around it afterwards.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    backend = tokenizer.backend_tokenizer
    question = normalizers.Replace(Regex(r"\z"), f"\n\n{encoder.prompt.question}")
    backend.normalizer = normalizers.Sequence([question, *([backend.normalizer] if backend.normalizer else [])])
    around = {"clsgen_prefix": encoder.prefix_ids, "clsgen_suffix": encoder.suffix_ids}
    backend.post_processor = processors.TemplateProcessing(
        single="clsgen_prefix $A clsgen_suffix",
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in around.items()
        ],
    )
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    tokenizer.padding_side = "right"
    return tokenizer


def description(model: ClsGenForCausalLMAndClassification) -> dict[str, Any]:
    """`clsgen.json`: all that turns a text into a prompt's ids, and hidden states into an answer."""
    config, encoder = model.config, model.encoder
    return {
        "clsgen_version": FORMAT_VERSION,
        "question": encoder.prompt.question,
        "template": encoder.prompt.template,
        "system_prompt": encoder.prompt.system_prompt,
        "document": encoder.prompt.document,
        "max_prompt_length": config.max_prompt_length,
        "prompt": "prefix_ids + tokens of '{template}\\n\\n{question}', no control tokens in it + suffix_ids",
        "prefix_ids": encoder.prefix_ids,
        "suffix_ids": encoder.suffix_ids,
        "labels": config.label_names,
        "verdict_lines": [encoder.prompt.verdict_line(label) for label in (0, 1)],
        "verdict_ids": [encoder.encode_verdict(label) for label in (0, 1)],
        "end_of_turn_id": encoder.end_of_turn_id,
        "explanation_no_repeat_ngram_size": config.explanation_no_repeat_ngram_size,
        "explanation_guidance_scale": config.explanation_guidance_scale,
        "cls_reads": [
            [layer, pooling] for layer, (_, pooling) in zip(model.read_layers(), config.cls_reads, strict=True)
        ],
        "num_hidden_layers": config.text_config.num_hidden_layers,
        "cls_logit": (
            "bias + sum over cls_reads of weight[i] @ feature[i]; layers count as in transformers' `hidden_states` "
            "(0: embeddings, num_hidden_layers: final, normalised); `decision`: the last token of the prompt, "
            "`mean`: the mean over its tokens"
        ),
        "probability": FORMULA,
        "pos_weight": config.pos_weight,
        "lm_reading_weight": config.lm_reading_weight,
        **config.calibration,
        "threshold": config.threshold,
        "base_rate": config.base_rate,
        "conformal": config.conformal,
    }


def export(model: ClsGenForCausalLMAndClassification, output: str | Path) -> list[str]:
    """Writes the export as a whole, or nothing.

    Args:
        model (`ClsGenForCausalLMAndClassification`): With its tokenizer.
        output (`str` or `Path`): A folder that does not exist yet.

    Returns:
        `list[str]`: Names of what was written below it.

    Raises:
        FileExistsError: where `output` is there already.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: give a new folder.")
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    try:
        model.lm.generation_config = model.generation_config
        model.lm.save_pretrained(temporary / "causal_lm")
        model.tokenizer.save_pretrained(temporary / "causal_lm")
        head = {"weight": model.cls_head.weight.detach().float().reshape(len(model.config.cls_reads), -1).contiguous()}
        bias = torch.zeros(1) if model.cls_head.bias is None else model.cls_head.bias.detach().float()
        save_file({**head, "bias": bias}, temporary / "cls_head.safetensors", metadata={"format": "pt"})
        write_json(temporary / "clsgen.json", description(model))
        problem = stock_form_problem(model)
        if problem is None:
            sequence_classifier(model).save_pretrained(temporary / "sequence_classification")
            classifier_tokenizer(model.encoder).save_pretrained(temporary / "sequence_classification")
            write_json(temporary / "sequence_classification" / "clsgen.json", description(model))
        else:
            logger.warning("No sequence_classification/: %s. The head is in cls_head.safetensors.", problem)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(path.name for path in output.iterdir())


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; see the module's docstring."""
    (arguments,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    kwargs = {"revision": arguments.revision} if arguments.revision else {}
    try:
        model = ClsGenForCausalLMAndClassification.from_pretrained(arguments.model, **kwargs)
        names = export(model, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"export.py: {error}")
    print(f"{arguments.output}: {', '.join(names)}")
    print(json.dumps({"threshold": model.config.threshold, "labels": model.config.label_names}))


if __name__ == "__main__":
    main()
