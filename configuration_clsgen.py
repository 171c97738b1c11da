"""CLSGen configuration: a causal LM's own config, and all that its second head and its prompts need at inference."""

import copy
import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

FORMAT_VERSION = 2  # raised when older code would read a newer checkpoint wrongly; one fixture each in tests/fixtures
POOLINGS = ("decision", "mean")
AUTO_MAP = {
    "AutoConfig": "configuration_clsgen.ClsGenConfig",
    "AutoModel": "modeling_clsgen.ClsGenForCausalLMAndClassification",
    "AutoModelForCausalLM": "modeling_clsgen.ClsGenForCausalLMAndClassification",
    "AutoModelForSequenceClassification": "modeling_clsgen.ClsGenForCausalLMAndClassification",
    "AutoModelForDecision": "modeling_clsgen.ClsGenForCausalLMAndClassification",
}
CUSTOM_PIPELINES = {
    "text-classification": {
        "impl": "pipeline_clsgen.ClsGenPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}


class ClsGenConfig(PreTrainedConfig):
    """Configuration of [`ClsGenForCausalLMAndClassification`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the backbone, any that `AutoModelForCausalLM` knows. Defaults to a Llama config.
        cls_reads (`list[tuple[int, str]]`, *optional*, defaults to `[(-1, "decision")]`):
            What the classification head reads, as `(layer, pooling)` pairs whose features are concatenated. `layer`
            indexes `hidden_states` (0 is the embeddings, -1 the final, normalised state); `pooling` is `"decision"`
            (the decision token) or `"mean"` (mean over the prompt, up to and with the decision token).
        cls_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the head's features while training.
        cls_bias (`bool`, *optional*, defaults to `True`):
            Whether the head has a constant term. Stock classification heads have none: without it, a head that reads
            `[(-1, "decision")]` exports to them with the same probabilities.
        lm_weight, cls_weight (`float`, *optional*, defaults to 1.0):
            Weights of the two losses in `loss`.
        pos_weight (`float`, *optional*, defaults to 1.0):
            Weight of the positive class in the BCE loss; undone at inference by subtracting its log from the logit.
        lm_reading_weight (`float`, *optional*, defaults to 0.0):
            Weight of the LM's own reading (the log-odds of the two verdict lines) in the number, from 0 to 1; the rest
            is the head's. Above 0, `classify` runs all layers, and the verdict lines too. Set it with
            `calibrate_clsgen.py`, for calibration, threshold and prediction sets are of one weight.
        calibration (`dict[str, float]`, *optional*, defaults to `{"temperature": 1.0, "bias": 0.0}`):
            `probability = sigmoid(logit / temperature + bias)`, where the logit is the head's less `log(pos_weight)`,
            or what `lm_reading_weight` makes of it. Nested, since transformers takes a top-level `temperature` for a
            generation parameter.
        threshold (`float`, *optional*, defaults to 0.5):
            The positive label is given where `probability >= threshold`.
        base_rate (`float`, *optional*):
            Share of the positive class among the rows that calibration was fitted on; needed to re-base probabilities.
        conformal (`dict`, *optional*):
            `{"error_rate": ..., "quantiles": [q0, q1]}`: a label stays in the prediction set while `1 - p(label)` is
            at most its quantile; rows of each label then lose it with a probability of at most `error_rate`.
        prompt (`dict`, *optional*):
            The task's prompt, see [`prompting_clsgen.TaskPrompt`].
        max_prompt_length (`int`, *optional*, defaults to 864):
            Longest prompt in tokens; a longer text is cut in the middle of its document.
        explanation_mode (`"guided"` or `"free"`, *optional*, defaults to `"guided"`):
            Whether explanations start from the verdict line of the model's decision, or of the LM's own reading.
        explanation_no_repeat_ngram_size (`int`, *optional*, defaults to 0):
            Longest run of tokens that an explanation may say twice, plus one; 0 for no limit. Unlike `generate`'s
            `no_repeat_ngram_size` it leaves the prompt alone, whose numbers an explanation has to repeat.
        explanation_guidance_scale (`float`, *optional*, defaults to 1.0):
            How firmly an explanation is held to its verdict line: above 1, words count more that only this verdict
            makes likely, not the other one, and an explanation that would end before it has told its verdict goes on
            for a sentence. A step of decoding then costs two.
        clsgen_version (`int`, *optional*):
            Version of the checkpoint format; a file without one has version 1. Newer ones than this code knows are
            refused, older ones are read and saved again in the current format.
    """

    model_type = "clsgen"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        cls_reads: list[tuple[int, str]] | None = None,
        cls_dropout: float = 0.0,
        cls_bias: bool = True,
        lm_weight: float = 1.0,
        cls_weight: float = 1.0,
        pos_weight: float = 1.0,
        lm_reading_weight: float = 0.0,
        calibration: dict[str, float] | None = None,
        threshold: float = 0.5,
        base_rate: float | None = None,
        conformal: dict[str, Any] | None = None,
        prompt: dict[str, Any] | None = None,
        max_prompt_length: int = 864,
        explanation_mode: str = "guided",
        explanation_no_repeat_ngram_size: int = 0,
        explanation_guidance_scale: float = 1.0,
        clsgen_version: int = FORMAT_VERSION,
        **kwargs,
    ):
        if clsgen_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has the CLSGen format version {clsgen_version}; this code reads versions up to "
                f"{FORMAT_VERSION}. Load it with the code that it was published with (`trust_remote_code=True`, and "
                "`code_revision` equal to `revision` or left out), or update your copy of CLSGen."
            )
        self.clsgen_version = FORMAT_VERSION
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
        self.text_config = text_config
        self.cls_reads = [[layer, pooling] for layer, pooling in (cls_reads or [(-1, "decision")])]
        self.cls_dropout = cls_dropout
        self.cls_bias = cls_bias
        self.lm_weight = lm_weight
        self.cls_weight = cls_weight
        self.pos_weight = pos_weight
        self.lm_reading_weight = lm_reading_weight
        self.calibration = {"temperature": 1.0, "bias": 0.0, **(calibration or {})}
        self.threshold = threshold
        self.base_rate = base_rate
        self.conformal = conformal
        self.prompt = prompt
        self.max_prompt_length = max_prompt_length
        self.explanation_mode = explanation_mode
        self.explanation_no_repeat_ngram_size = explanation_no_repeat_ngram_size
        self.explanation_guidance_scale = explanation_guidance_scale
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs.setdefault("custom_pipelines", copy.deepcopy(CUSTOM_PIPELINES))
        kwargs.setdefault("num_labels", 2)
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self.label2id = {name: label_id for label_id, name in self.id2label.items()}
        self._check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As any config's. It knows its commit on the Hub, from which the tokenizer then comes, too."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config, revision = loaded[0] if isinstance(loaded, tuple) else loaded, kwargs.get("revision")
        config._commit_hash = getattr(revision, "resolved", revision)  # transformers 5.23 resolves it, and forgets it
        return loaded

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return super().from_dict({"clsgen_version": 1, **config_dict}, **kwargs)

    def _check(self) -> None:
        layers = self.text_config.num_hidden_layers
        for layer, pooling in self.cls_reads:
            if not isinstance(layer, int) or not -layers - 1 <= layer <= layers or pooling not in POOLINGS:
                raise ValueError(
                    f"`cls_reads` holds {(layer, pooling)}: the layer must lie in [{-layers - 1}, {layers}] for this "
                    f"backbone of {layers} layers, and the pooling must be one of {POOLINGS}."
                )
        above_zero = {
            "pos_weight": self.pos_weight,
            "temperature": self.calibration["temperature"],
            "explanation_guidance_scale": self.explanation_guidance_scale,
        }
        for name, value in above_zero.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` must be a finite number above 0, got {value}.")
        if set(self.calibration) != {"temperature", "bias"} or not math.isfinite(self.calibration["bias"]):
            raise ValueError(f"`calibration` has a `temperature` and a finite `bias`, got {self.calibration}.")
        for name in ("threshold", "lm_reading_weight"):
            value = getattr(self, name)
            if isinstance(value, str | bool | None) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")
        if not isinstance(self.max_prompt_length, int) or self.max_prompt_length < 1:
            raise ValueError(
                f"`max_prompt_length` must be a whole number of 1 or more, got {self.max_prompt_length!r}."
            )
        if self.base_rate is not None and not 0 < self.base_rate < 1:
            raise ValueError(f"`base_rate` must lie between 0 and 1, both excluded, got {self.base_rate}.")
        if self.explanation_mode not in ("guided", "free"):
            raise ValueError(f"`explanation_mode` must be 'guided' or 'free', got {self.explanation_mode!r}.")

    @property
    def label_names(self) -> list[str]:
        """Names of label 0 and label 1."""
        return [self.id2label[0], self.id2label[1]]


ClsGenConfig.register_for_auto_class()  # `save_pretrained` writes the code beside the config

__all__ = ["ClsGenConfig"]
