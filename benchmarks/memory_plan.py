"""What Llama-3.1-8B on LCD-30 takes, by formula: parameters, memory of a GPU, hours and disk. Nothing is loaded.

python -m benchmarks.memory_plan   # rewrites benchmarks/results/memory_plan.json and the tables of docs/scaling.md
"""

import math
import re
from pathlib import Path
from statistics import NormalDist

from transformers import LlamaConfig

from clsgen.atomic_io import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
LLAMA_8B = LlamaConfig(  # of meta-llama/Llama-3.1-8B-Instruct
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
NOTES, SCORED_NOTES = 34759, 7505 + 7568  # train; validation and test
WORDS_MEDIAN, WORDS_QUARTILES = 1687, (1308, 2169)  # published
ASSUMED = {"tokens_per_word": 1.7, "question_tokens": 80, "explanation_tokens": 160, "share_of_peak_flops": 0.4}
H100 = {"flops": 989e12, "nvlink_bytes": 450e9}  # dense bfloat16, one direction; by the data sheet
RECIPE = {"max_length": 8192, "lora_r": 16, "head_reads": 2, "head_depth": 20}
CASES = {"LoRA, 1 GPU": (True, 1), "LoRA, 8 GPUs, FSDP2": (True, 8), "full, 8 GPUs, FSDP2": (False, 8)}


def linear_layers(config: LlamaConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers in one decoder layer."""
    hidden, wide, values = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    attention = [(hidden, queries), (hidden, values), (hidden, values), (queries, hidden)]
    return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Parameters of a Llama's layer, of all layers (with the final norm), of embeddings and LM head, and of all."""
    layer = sum(a * b for a, b in linear_layers(config)) + 2 * config.hidden_size
    layers, embeddings = config.num_hidden_layers * layer + config.hidden_size, config.vocab_size * config.hidden_size
    lm_head = 0 if config.tie_word_embeddings else embeddings
    return {"layer": layer, "layers": layers, "embeddings": embeddings, "LM head": lm_head,
            "all": layers + embeddings + lm_head}  # fmt: skip


def lora_parameters(config: LlamaConfig, rank: int) -> int:
    """Parameters of LoRA on all linear layers of the decoder."""
    return config.num_hidden_layers * sum(rank * (a + b) for a, b in linear_layers(config))


def layer_activations(config: LlamaConfig, lora: bool) -> int:
    """Bytes a token that autograd keeps of a layer under bfloat16 autocast with fused attention (a test measures it).

    Of the hidden size, each RMSNorm keeps two float32 copies, and norms, queries and attention's output are there in
    bfloat16; of the MLP's width, four tensors. Without LoRA, weights and with them the residual stream are float32.
    """
    values = config.num_key_value_heads * config.head_dim
    return (25 if lora else 32) * config.hidden_size + 8 * config.intermediate_size + (4 if lora else 6) * values


def memory(config: LlamaConfig, lora: bool, gpus: int, tokens: int, explanation_tokens: int) -> dict[str, float]:
    """GB of each GPU, with activation checkpointing: LoRA on bfloat16 weights, or all weights in float32; Adam.

    Args:
        config (`LlamaConfig`): The backbone's.
        lora (`bool`): Whether LoRA is trained, or all weights.
        gpus (`int`): How many of them share weights, gradients and optimizer states (FSDP2).
        tokens, explanation_tokens (`int`): Of a micro-batch: all, and those that go through the LM head.
    """
    counts, width = parameters(config), 2 if lora else 4
    trained = lora_parameters(config, RECIPE["lora_r"]) if lora else counts["all"]
    parts = {
        "weights": (width * counts["all"] + 4 * trained * lora) / gpus,
        "gradients, Adam": 12 * trained / gpus,
        # Two layers (one is fetched ahead), one layer's gradients, and the LM head, which stays.
        "gathered layers": width * (3 * counts["layer"] + counts["LM head"]) * (gpus > 1),
        "layer inputs": width * tokens * config.num_hidden_layers * config.hidden_size,
        # What the recomputed layer keeps, and as much for its backward.
        "one layer": 2 * tokens * layer_activations(config, lora),
        # Logits and gradient in bfloat16 (2 + 2), and in float32 with log-softmax and gradient (3 * 4).
        "logits": 16 * explanation_tokens * config.vocab_size,
    }
    return {name: size / 1e9 for name, size in {**parts, "sum": sum(parts.values())}.items()}


def notes() -> dict[str, float]:
    """Tokens of a prompt, a row and an epoch, if word counts are log-normal; share of notes that `max_length` cuts."""
    sigma = math.log(WORDS_QUARTILES[1] / WORDS_QUARTILES[0]) / (2 * NormalDist().inv_cdf(0.75))
    room = RECIPE["max_length"] - ASSUMED["explanation_tokens"] - ASSUMED["question_tokens"]
    mean = WORDS_MEDIAN * math.exp(sigma**2 / 2) * ASSUMED["tokens_per_word"] + ASSUMED["question_tokens"]
    cut = 1 - NormalDist().cdf(math.log(room / ASSUMED["tokens_per_word"] / WORDS_MEDIAN) / sigma)
    row = mean + ASSUMED["explanation_tokens"]
    return {"prompt": mean, "row": row, "epoch": row * NOTES, "% of notes cut in their middle": 100 * cut}


def flops(config: LlamaConfig, length: float, weights: int = 1, attention: int = 1) -> float:
    """Of a causal sequence, for matrix multiplications in its layers (PaLM, appendix B; attention at half: causal).

    Args:
        config (`LlamaConfig`): The backbone's.
        length (`float`): Tokens.
        weights, attention (`int`): How often the work of a forward pass is done over either.
    """
    multiplied = weights * sum(a * b for a, b in linear_layers(config))
    attended = attention * config.num_attention_heads * config.head_dim * length
    return 2 * config.num_hidden_layers * (multiplied + attended) * length


def hours(config: LlamaConfig, lora: bool, gpus: int) -> dict[str, float]:
    """Hours of the probe's features, of an epoch, of what FSDP2 sends meanwhile, and of calibration and test."""
    size, per_hour = notes(), 3600 * gpus * H100["flops"] * ASSUMED["share_of_peak_flops"]
    forward = flops(config, size["prompt"])
    # Forward, again for checkpointing, gradients of inputs; of weights too, where they are trained.
    step = flops(config, size["row"], weights=3 if lora else 4, attention=4)
    # Weights are gathered for both forward passes and the backward (the second keeps them); gradients are scattered.
    sent = (2 * 2 if lora else 4 * 3) * parameters(config)["all"] * (gpus - 1) / gpus
    return {
        "probe": forward * RECIPE["head_depth"] / config.num_hidden_layers * NOTES / per_hour,
        "an epoch": step * NOTES / per_hour,
        "sending, an epoch": sent / H100["nvlink_bytes"] * NOTES / gpus / 3600,
        "validation and test": forward * SCORED_NOTES / per_hour,
    }


def disk(config: LlamaConfig) -> dict[str, float]:
    """GB of files, and of the host's memory."""
    weights, adapter = parameters(config)["all"], lora_parameters(config, RECIPE["lora_r"])
    sizes = {
        "final checkpoint, LoRA merged (bfloat16)": 2 * weights,
        "final checkpoint, full (float32)": 4 * weights,
        "each checkpoint on the way, LoRA": 12 * adapter,
        "each checkpoint on the way, full": 12 * weights,
        "host memory, 8 processes loading bfloat16": 8 * 2 * weights,
        "host memory, 8 processes loading float32": 8 * 4 * weights,
        "the probe's features, in each process": 4 * RECIPE["head_reads"] * config.hidden_size * NOTES,
        "`cache_frozen_layers`, each layer kept (bfloat16)": 2 * config.hidden_size * notes()["epoch"],
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def plan(config: LlamaConfig = LLAMA_8B) -> dict[str, dict[str, list[float]]]:
    """The numbers of each table: rows by name."""
    micro_batch = (RECIPE["max_length"], ASSUMED["explanation_tokens"])
    used = [memory(config, lora, gpus, *micro_batch) for lora, gpus in CASES.values()]
    took = [hours(config, lora, gpus) for lora, gpus in CASES.values()]
    counted = {**parameters(config), "LoRA": lora_parameters(config, RECIPE["lora_r"])}
    return {
        "parameters": {name: [count] for name, count in counted.items()},
        "notes": {name: [count] for name, count in notes().items()},
        "memory": {name: [each[name] for each in used] for name in used[0]},
        "hours": {name: [each[name] for each in took] for name in took[0]},
        "disk": {name: [size] for name, size in disk(config).items()},
    }


def table(name: str, rows: dict[str, list[float]]) -> str:
    """A table in Markdown."""
    head, form = {"parameters": (["parameters"], ",d"), "notes": (["tokens"], ",.1f"), "disk": (["GB"], ",.1f"),
                  "memory": (list(CASES), ".1f"), "hours": (list(CASES), ".2f")}[name]  # fmt: skip
    cells = [[key, *(format(value, form) for value in values)] for key, values in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [["", *head], ["---"] * (len(head) + 1), *cells])


def fill(document: str, found: dict[str, dict[str, list[float]]]) -> str:
    """The document with the tables between their markers."""
    for name, rows in found.items():
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
        document = re.sub(pattern, table(name, rows) + "\n", document, count=1, flags=re.DOTALL)
    return document


def main() -> None:
    """Writes the numbers and the document's tables."""
    found = plan()
    report = {"command": "python -m benchmarks.memory_plan", "assumed": ASSUMED, "gpu": H100, "recipe": RECIPE}
    write_json(ROOT / "benchmarks" / "results" / "memory_plan.json", {**report, "cases": CASES, **found})
    write_text(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8"), found))
    print("\n\n".join(table(name, rows) for name, rows in found.items()))


if __name__ == "__main__":
    main()
