"""Tiny random backbones of several families, a tiny tokenizer, and the real small model."""

import copy

import pytest
import torch
from datasets import Dataset
from teacher_server import TeacherServer, write_source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from clsgen.backbones import resolve_backbone
from clsgen.build_explanations import BuildArguments
from clsgen.build_explanations import build as build_explanations
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.teacher import TeacherArguments
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 259  # of `byte_tokenizer`: whatever a model writes can be read
TALKATIVE = {"initializer_range": 0.5}  # with less, a random model writes one byte, whatever it reads
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, **TALKATIVE}
SPECIAL = {"bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 258}
SIDES = {**SIZES, **SPECIAL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 2048}
CONFIGS = {
    "llama": LlamaConfig(**SIDES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIDES, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIDES, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SIDES, head_dim=8, sliding_window=None),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=2048, **SPECIAL,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TALKATIVE,
    ),
}  # fmt: skip
PROMPT = {
    "system_prompt": "You review trials.",
    "template": "Findings: {findings}\n\nClaim: {claim}",
    "question": "Do the findings support the claim?",
    "document": "findings",
    "verdicts": ["not supported", "supported"],
}
READS = [(2, "mean"), (3, "decision")]


def byte_tokenizer():
    """A byte-level tokenizer without merges: 256 bytes, then control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def tokenizer():
    """See [`byte_tokenizer`]."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tokenizer):
    """Folders of tiny random backbones, by family."""
    folders = {}
    for name, config in CONFIGS.items():
        set_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name))
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        lm.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def build(folder, reads=READS, **config_kwargs):
    """A model on the backbone in `folder`, with random head weights."""
    model = ClsGenForCausalLMAndClassification.from_backbone(
        folder,
        task=PROMPT,
        labels=("not_supported", "supported"),
        config_kwargs={"cls_reads": reads, "max_prompt_length": 400, **config_kwargs},
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.cls_head.weight.normal_(std=0.05, generator=generator)
        model.cls_head.bias.fill_(0.1)
    return model


def let_labels_mix(model, texts):
    """Puts the threshold between the texts' probabilities, so that half of them get either label."""
    probabilities = sorted(prediction.probability for prediction in model.classify(texts))
    model.config.threshold = (probabilities[len(texts) // 2 - 1] + probabilities[len(texts) // 2]) / 2
    assert len({prediction.label for prediction in model.classify(texts)}) == 2


@pytest.fixture
def model(backbones):
    """A fresh CLSGen model on the tiny Llama."""
    return build(backbones["llama"])


@pytest.fixture(params=list(CONFIGS))
def any_model(request, backbones):
    """A fresh CLSGen model on each family of backbones."""
    return build(backbones[request.param])


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M-Instruct."""
    return resolve_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.fixture
def texts():
    """Four texts of different lengths."""
    return [
        {"findings": f"Death occurred in {i}0% against 2{i}%. " * (i + 1), "claim": f"Drug {i} lowers death."}
        for i in range(4)
    ]


@pytest.fixture
def task_rows():
    """Rows of a task: with and without explanation, one without a label."""
    rows = [
        {
            "id": str(i),
            "findings": f"Death in {i * 7 % 10}0% and {i}% " * (1 + i % 3),
            "claim": f"Drug {i} works.",
            "label": float(i % 2) if i != 5 else None,
            "explanation": None if i % 4 == 2 else f"It fell by {i} of ten. " * (1 + i % 2),
        }
        for i in range(16)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def teacher():
    """An OpenAI-compatible server on loopback, which behaves as a test tells it to."""
    with TeacherServer() as server:
        yield server


@pytest.fixture
def source_task(tmp_path):
    """Writes a task without explanations."""
    return lambda *args, **spec: write_source(tmp_path / "source", *args, **spec)


@pytest.fixture
def build_with_teacher(teacher, source_task, tmp_path):
    """Builds explanations for a task, with the server as teacher."""
    url = teacher.url

    def call(source=None, teacher=None, filters=None, **arguments):
        asked = BuildArguments(task=str(source or source_task()), output_dir=str(tmp_path / "built"), **arguments)
        options = {"model": "teacher", "base_url": url, "max_retries": 1, **(teacher or {})}
        # The reports are alike, and so are the answers about them.
        chosen = {"near_duplicate_similarity": 0.95, **(filters or {})}
        return build_explanations(asked, TeacherArguments(**options), FilterArguments(**chosen))

    return call
