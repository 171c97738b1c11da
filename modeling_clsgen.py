"""CLSGen: one causal LM, two heads. A probability is read from the prompt's last token before a word is generated."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_clsgen import ClsGenConfig
from .decision_clsgen import ClsGenDecisionMixin
from .early_exit_clsgen import decoder_up_to
from .head_clsgen import ClassificationHead, pads_behind, positions_from_mask
from .inference_clsgen import ClsGenInferenceMixin
from .linear_clsgen import use_onednn_in_inference_mode
from .losses_clsgen import classification_loss, language_modeling_loss, supervised_positions
from .prompting_clsgen import TaskPrompt


@dataclass
class ClsGenOutput(CausalLMOutputWithPast):
    """Output of [`ClsGenForCausalLMAndClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`): `lm_weight * lm_loss + cls_weight * cls_loss`, given any labels.
        lm_loss (`torch.FloatTensor` of shape `()`): Cross-entropy, mean over the tokens with a label.
        cls_loss (`torch.FloatTensor` of shape `()`): Binary cross-entropy, mean over the decisions.
        logits (`torch.FloatTensor` of shape `(batch_size, kept_positions, vocab_size)`): Of the LM head; of shape
            `(kept_positions, vocab_size)` where `logits_to_keep` is a mask, as it is while training.
        cls_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length)`): Of the classification head, float32,
            as if each token were the decision token. Neither calibrated nor corrected for `pos_weight`.
        cls_past_scores (`torch.FloatTensor` of shape `(batch_size,)`): What the head's means have summed up to the
            last token, for a prompt that goes on in another call (`None` where the head reads no mean).
        past_key_values, hidden_states, attentions: As in any causal LM (inherited: transformers renames the first).
    """

    lm_loss: torch.FloatTensor | None = None
    cls_loss: torch.FloatTensor | None = None
    cls_logits: torch.FloatTensor | None = None
    cls_past_scores: torch.FloatTensor | None = None


class ClsGenForCausalLMAndClassification(ClsGenInferenceMixin, ClsGenDecisionMixin, PreTrainedModel, GenerationMixin):
    """A causal LM with a second head that answers a binary question about the prompt.

    The backbone is any model of `AutoModelForCausalLM`, held whole as `lm`: its logits stay bit for bit its own.

    Args:
        config ([`ClsGenConfig`]): Its `text_config` builds the backbone.
        lm (`PreTrainedModel`, *optional*): A loaded backbone to wrap instead, see [`from_backbone`].
    """

    config_class = ClsGenConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules = {"cls_head"}  # noqa: RUF012  # what no quantiser converts
    _keep_in_fp32_modules_strict = {"cls_head"}  # noqa: RUF012

    def __init__(self, config: ClsGenConfig, lm: PreTrainedModel | None = None):
        super().__init__(config)
        self.lm = AutoModelForCausalLM.from_config(config.text_config) if lm is None else lm
        use_onednn_in_inference_mode(self.lm)
        self.cls_head = ClassificationHead(config.text_config.hidden_size, len(config.cls_reads), bias=config.cls_bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ClassificationHead):
            module.reset_parameters()
        else:
            self.lm._init_weights(module)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        task: TaskPrompt | dict[str, Any] | None = None,
        labels: tuple[str, str] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        like: ClsGenConfig | None = None,
        **kwargs,
    ) -> "ClsGenForCausalLMAndClassification":
        """Wraps a plain LLM; its tokenizer is kept on the model.

        Args:
            name_or_path (`str`): Hub id or folder, as `AutoModelForCausalLM.from_pretrained` takes it.
            task (`TaskPrompt` or `dict`, *optional*): The task's prompt.
            labels (`tuple[str, str]`, *optional*): Names of label 0 and label 1.
            config_kwargs (`dict`, *optional*): Further fields of [`ClsGenConfig`].
            like ([`ClsGenConfig`], *optional*): In the place of the three: that of a finished model, whose adapter is
                going to be loaded.
            kwargs: For `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

        Raises:
            ValueError: for a multimodal model, whose LM is only a part of it.
        """
        lm = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        if lm.config.get_text_config() is not lm.config:
            raise ValueError(
                f"{name_or_path} is multimodal ({type(lm).__name__}): take a backbone that reads text alone, of a "
                f"config like its {lm.config.get_text_config().model_type!r}."
            )
        place = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only")
        tokenizer_kwargs = {key: kwargs[key] for key in place if key in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **tokenizer_kwargs)
        if like is None:
            prompt = task if isinstance(task, TaskPrompt) else TaskPrompt.from_dict(task)
            fields = {"prompt": prompt.to_dict(), "id2label": dict(enumerate(labels or prompt.verdicts))}
            fields |= config_kwargs or {}
        else:
            of_the_backbone = {"text_config", "dtype", "architectures", "model_type", "transformers_version"}
            fields = {name: value for name, value in like.to_dict().items() if name not in of_the_backbone}
        config = ClsGenConfig(
            text_config=lm.config,
            dtype=lm.dtype,
            attn_implementation=lm.config._attn_implementation,  # a composite config would reset the backbone's
            **fields,
        )
        config.name_or_path = str(name_or_path)
        model = cls(config, lm=lm)
        model.set_reads(config.cls_reads)
        model.generation_config = lm.generation_config
        # Deterministic unless asked otherwise: whoever reads a decision reads the same one twice.
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=128)
        model.tokenizer = tokenizer
        model._stop_at_end_of_turn()
        for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(lm, name):
                setattr(model, name, getattr(lm, name))
        if hasattr(lm, "hf_device_map"):
            model.hf_device_map = {f"lm.{name}" if name else "": device for name, device in lm.hf_device_map.items()}
        if hasattr(lm.config, "quantization_config"):
            config.quantization_config = lm.config.quantization_config
        return model.eval()

    def set_reads(self, cls_reads: list[tuple[int, str]]) -> None:
        """Makes the head read `cls_reads` (see [`ClsGenConfig`]), with new weights of zero: every logit is 0."""
        self.config.cls_reads = [list(read) for read in cls_reads]
        self.config._check()
        device = self.get_output_embeddings().weight.device
        hidden_size = self.config.text_config.hidden_size
        self.cls_head = ClassificationHead(hidden_size, len(cls_reads), device, self.config.cls_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.lm.get_decoder()

    def read_layers(self) -> list[int]:
        """Non-negative indices into `hidden_states` that the head reads, one a read."""
        return [layer % (self.config.text_config.num_hidden_layers + 1) for layer, _ in self.config.cls_reads]

    def run_to_head(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        past_key_values: Cache | None = None,
        cls_past_scores: torch.FloatTensor | None = None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """[`forward`] for the head alone: only the layers below it are run.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Padded on the left.
            attention_mask, past_key_values, cls_past_scores: As in [`forward`].

        Returns:
            The logit at each row's last token, `torch.FloatTensor` of shape `(batch_size,)`, and `cls_past_scores`.
        """
        layers = self.read_layers()
        position_ids = positions_from_mask(attention_mask, input_ids.shape[1])
        hidden_states = decoder_up_to(self.get_decoder(), max(layers))(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            output_hidden_states=sorted(set(layers)),
            return_dict=True,
        ).hidden_states
        logits, past_scores = self.cls_head(
            [hidden_states[layer] for layer in layers],
            [pooling for _, pooling in self.config.cls_reads],
            attention_mask[:, -input_ids.shape[1] :],
            position_ids,
            cls_past_scores,
        )
        return logits[:, -1], past_scores

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cls_past_scores: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        cls_labels: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_decisions_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> ClsGenOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, cached_and_new_length)`, *optional*): 0 at padding,
                on either side. Without one, `position_ids` that restart at 0 mark packed sequences, which don't see
                each other (unless `use_cache` is true: by default, no cache is made then).
            cls_past_scores (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): From the call that computed
                `past_key_values`, where the prompt goes on in this one.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids, -100 where
                there is no language-modelling loss.
            cls_labels (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 to 1 at decision
                tokens, -100 elsewhere.
            logits_to_keep (`int`, `torch.LongTensor` of shape `(kept_positions,)` or `torch.BoolTensor` of shape
                `(batch_size, sequence_length)`): Which positions go through the LM head: the last `logits_to_keep`,
                those listed, those that are true (then `logits` are flat), or (0) all. While training with `labels`, 0
                means those that `labels` need.
            num_items_in_batch, num_decisions_in_batch (`int` or `torch.Tensor`, *optional*): Labelled tokens and
                decisions of the whole optimizer step; each loss is its sum over this batch divided by them.

        Returns:
            [`ClsGenOutput`]. With the pooling `"mean"`, `cls_logits` know of earlier calls by `cls_past_scores` alone.
        """
        if isinstance(kwargs.get("cache"), Cache):  # its name from transformers 5.24 on; a paged cache goes through
            past_key_values = kwargs.pop("cache")
        keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and keep_all and self.training and not torch.compiler.is_compiling():
            logits_to_keep = supervised_positions(labels)
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is not None and attention_mask is None and past_key_values is None and use_cache is None:
            use_cache = False  # backbones tell packed sequences apart only where there is no cache
        # `generate` with a static cache hands over masks that are ready for each layer.
        is_2d_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        lm_mask, lm_position_ids = attention_mask, position_ids
        if position_ids is None and is_2d_mask:
            position_ids = positions_from_mask(attention_mask, length)
            if past_key_values is None and pads_behind(attention_mask):
                # Causal attention never looks there, and its kernels do half the work where they get no mask.
                lm_mask = None
            else:
                lm_position_ids = position_ids
        layers = self.read_layers()
        wanted = True if output_hidden_states is True else sorted({*layers, *(output_hidden_states or ())})
        outputs = self.lm(
            input_ids=input_ids,
            attention_mask=lm_mask,
            position_ids=lm_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=wanted,
            return_dict=True,
            **{key: value for key, value in kwargs.items() if key != "return_dict"},
        )
        if position_ids is None:
            position_ids = past_length + torch.arange(length, device=outputs.logits.device)[None]
        mask = attention_mask[:, -length:] if is_2d_mask else None
        cls_logits, cls_past_scores = self.cls_head(
            [outputs.hidden_states[layer] for layer in layers],
            [pooling for _, pooling in self.config.cls_reads],
            mask,
            position_ids,
            cls_past_scores,
            self.config.cls_dropout,
        )

        loss = lm_loss = cls_loss = None
        if labels is not None:
            lm_loss = language_modeling_loss(outputs.logits, labels, logits_to_keep, num_items_in_batch)
            loss = self.config.lm_weight * lm_loss
        if cls_labels is not None:
            cls_loss = classification_loss(cls_logits, cls_labels, self.config.pos_weight, num_decisions_in_batch)
            cls_loss_weighted = self.config.cls_weight * cls_loss
            loss = cls_loss_weighted if loss is None else loss + cls_loss_weighted.to(loss.device)
        return ClsGenOutput(
            loss=loss,
            lm_loss=lm_loss,
            cls_loss=cls_loss,
            logits=outputs.logits,
            cls_logits=cls_logits,
            cls_past_scores=cls_past_scores,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


ClsGenForCausalLMAndClassification.register_for_auto_class("AutoModel")  # `save_pretrained` writes the code files

__all__ = ["ClsGenForCausalLMAndClassification"]
