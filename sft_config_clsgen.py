"""Arguments of a training with two heads: TRL's `SFTConfig`, and what the second head adds."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig


@dataclass
class ClsGenSFTConfig(SFTConfig):
    """Arguments of [`ClsGenSFTTrainer`]: TRL's [`SFTConfig`], and those of the second head.

    Args:
        lm_weight, cls_weight (`float`, *optional*, default to 1.0): Weights of the two losses.
        verdict_weight (`float`, *optional*, defaults to 0.0): Weight of a third loss: cross-entropy of the LM's own
            verdict (what `lm_probability` reads) against the head's probability, so that free words say what the
            number says. The verdict's token is then no part of the LM's loss.
        verdict_texts (`int`, *optional*, defaults to 0): New texts made of each training row's for that loss, others
            in each epoch, see [`text_variants.with_variants`].
        pos_weight (`str`, *optional*, defaults to `"none"`): Weight of the positive class in the BCE loss: `"none"`,
            `"balanced"` (negatives / positives of the training rows) or a number. Undone at inference.
        cls_learning_rate (`float`, *optional*): Learning rate of the head; `learning_rate` by default.
        cls_dropout (`float`, *optional*, defaults to 0.0): Dropout on the head's features.
        max_explanation_length (`int`, *optional*, defaults to 160): Most tokens of an explanation with its verdict
            line. `max_length` less this is left for the prompt. The checkpoint may write half as many again, so that
            its own explanations come to an end.
        explanation_mode (`str`, *optional*, defaults to `"guided"`): `"guided"` teaches a verdict line before each
            explanation, `"free"` none.
        padding_side (`str`, *optional*, defaults to `"right"`): Side of the padding in batches.
        train_sampling_strategy (`str`, *optional*, defaults to `"auto"`): As in `TrainingArguments`; `"auto"` is
            `"group_by_length"` on a CPU and `"random"` elsewhere, and with `verdict_texts`, which are shorter than
            rows with an explanation and would come in runs.
        cache_frozen_layers (`bool`, *optional*, defaults to `False`): Keep the states of the layers below the lowest
            trained one in `output_dir/frozen_layers`, so that a row goes through them once and not in every epoch.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the language-modelling loss."})
    cls_weight: float = field(default=1.0, metadata={"help": "Weight of the classification loss."})
    verdict_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss that teaches the LM the head's verdict."}
    )
    verdict_texts: int = field(
        default=0,
        metadata={"help": "New texts a training row and epoch on which the LM learns the head's verdict."},
    )
    pos_weight: str = field(
        default="none", metadata={"help": "Weight of the positive class: 'none', 'balanced' or a number."}
    )
    cls_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the head."})
    cls_dropout: float = field(default=0.0, metadata={"help": "Dropout on the head's features."})
    max_explanation_length: int = field(default=160, metadata={"help": "Most tokens of an explanation."})
    explanation_mode: str = field(
        default="guided",
        metadata={"help": "Whether a verdict line comes before explanations.", "choices": ["guided", "free"]},
    )
    padding_side: str = field(default="right", metadata={"help": "Side of padding.", "choices": ["left", "right"]})
    train_sampling_strategy: str = field(
        default="auto",
        metadata={
            "help": "Sampler for training; 'auto' is 'group_by_length' on a CPU and 'random' elsewhere.",
            "choices": ["auto", "random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )

    cache_frozen_layers: bool = field(
        default=False, metadata={"help": "Keep on disk what the layers below the trained ones make of each row."}
    )

    def __post_init__(self):
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False  # TRL's default is bfloat16, which a CPU emulates
        finds_strategy = self.train_sampling_strategy == "auto"
        if finds_strategy:
            self.train_sampling_strategy = "random"  # `super` checks the strategy, and finds the device
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns of it
            if finds_strategy and not self.verdict_texts:
                self.train_sampling_strategy = "group_by_length"
        self._check()

    def _check(self) -> None:
        if self.n_gpu > 1:
            raise ValueError(
                f"So launched, one process would share {self.n_gpu} GPUs (nn.DataParallel), which CLSGen can't train "
                "with: use one process a GPU (`accelerate launch --config_file recipes/accelerate/ddp.yaml "
                f"--num_processes {self.n_gpu} train_sft_cls.py ...`), or one GPU (`CUDA_VISIBLE_DEVICES=0`)."
            )
        for name in ("lm_weight", "cls_weight", "verdict_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.lm_weight == self.cls_weight == 0:
            raise ValueError("`lm_weight` and `cls_weight` are both 0: there is nothing to train.")
        # A recipe is not held to the `choices` of flags.
        for name, choices in (("explanation_mode", ("guided", "free")), ("padding_side", ("left", "right"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be {' or '.join(choices)}, got {getattr(self, name)!r}.")
        if self.verdict_weight and self.explanation_mode == "free":
            raise ValueError(
                "`verdict_weight` needs `explanation_mode='guided'`: free explanations have no verdict line."
            )
        if self.verdict_texts < 0 or (self.verdict_texts and not self.verdict_weight):
            raise ValueError(
                f"`verdict_texts` must be at least 0, and needs a `verdict_weight` above 0, got {self.verdict_texts} "
                f"with {self.verdict_weight}."
            )
        if self.verdict_texts and self.train_sampling_strategy not in ("random", "group_by_length"):
            raise ValueError(
                "`verdict_texts` are others in each epoch, which needs `train_sampling_strategy` 'random' or "
                f"'group_by_length', got {self.train_sampling_strategy!r}."
            )
        if self.pos_weight not in ("none", "balanced"):
            try:
                positive = 0 < float(self.pos_weight) < float("inf")
            except (TypeError, ValueError):
                positive = False
            if not positive:
                raise ValueError(
                    f"`pos_weight` must be 'none', 'balanced' or a number above 0, got {self.pos_weight!r}."
                )
        if self.max_length is None or self.max_length <= self.max_explanation_length:
            raise ValueError(
                f"`max_length` ({self.max_length}) must be larger than `max_explanation_length` "
                f"({self.max_explanation_length}): the rest is the prompt's."
            )
        for name, supported in (("loss_type", "nll"), ("packing_strategy", "bfd"), ("label_smoothing_factor", 0.0)):
            if getattr(self, name) != supported:
                raise ValueError(f"`{name}` must be {supported!r} for two losses, got {getattr(self, name)!r}.")
        if self.chat_template_path is not None:
            raise ValueError(
                "`chat_template_path` would change the prompts of a finished checkpoint, but not those that it learns "
                "from: give a folder that holds the backbone and its tokenizer with that template."
            )
        if self.trust_remote_code:
            raise ValueError(
                "`trust_remote_code` has no meaning here: a checkpoint doesn't hold a backbone's own code, and could "
                "not be loaded. Take a backbone that transformers knows."
            )
        if self.assistant_only_loss or self.completion_only_loss is False or self.use_liger_kernel:
            raise ValueError(
                "`assistant_only_loss`, `completion_only_loss=False` and `use_liger_kernel` have no meaning here: the "
                "LM is trained on explanations, the head on decision tokens."
            )
