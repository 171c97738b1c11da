"""Trains CLSGen: both heads on one backbone, then calibration, the test table and a checkpoint that stands alone.

python train_sft_cls.py                                                      # the embedded task, on a CPU
python train_sft_cls.py --config recipes/clinifact.yaml --data_dir CliniFact  # real data
python train_sft_cls.py --task path/to/my_task                               # yours, by recipes/any_task.yaml
accelerate launch train_sft_cls.py --config recipes/clinifact.yaml --data_dir CliniFact --bf16 true
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed
from trl import TrlParser, get_peft_config, get_quantization_config

from clsgen.atomic_io import write_json
from clsgen.backbones import DEQUANTIZED_SOURCE, dequantized_folder, resolve_backbone
from clsgen.checkpoint_folder import write_checkpoint
from clsgen.classification_metrics import HEADLINE_METRICS
from clsgen.frozen_layers import FrozenLayers
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.publishing.examples import write_examples
from clsgen.publishing.footprint import available_cores, estimate_footprint
from clsgen.publishing.hub import identity
from clsgen.push_to_hub import PublishArguments, check_publication, license_of, publish
from clsgen.resuming import (
    NEWEST,
    TrainingClock,
    claim_folder,
    last_complete_checkpoint,
    resumption,
    run_of,
    take_up_finished,
)
from clsgen.run_record import describe_run, peak_memory_mib
from clsgen.scoring import calibrate_and_test, check_validation_split, logits_and_labels, table
from clsgen.sft_config_clsgen import ClsGenSFTConfig
from clsgen.sharding import check_launch, gather_model
from clsgen.tasks import Task, class_counts, load_task, rows_that_fit
from clsgen.train_arguments import AUTO, ModelArguments, TaskArguments, parse_reads, read_recipe, split_off_recipe
from clsgen.trainer_clsgen import (
    ClsGenSFTTrainer,
    encode_split,
    frozen_layers_dir,
    resolve_pos_weight,
)
from clsgen.warm_start import Probe, warm_start

logger = logging.getLogger("clsgen.train_sft_cls")
MOST_FROZEN = 2 / 3  # of the layers, where the depth of LoRA is found: the rest has to learn the words
ROOM_TO_END = 1.5  # an explanation's longest, over the longest it learned from


def first_lora_layer(model: PreTrainedModel, asked: int | str) -> int:
    """Index of the lowest layer that LoRA trains.

    With `auto`, what the model's head reads stays as it is, unless that lies above two thirds of the depth.

    Raises:
        ValueError: for a layer that the backbone doesn't have.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if asked == AUTO:
        return min(max(model.read_layers()), int(MOST_FROZEN * layers))
    if asked >= layers:
        raise ValueError(
            f"`lora_first_layer` is {asked}, but this backbone has {layers} layers: nothing would train. Give a lower "
            "one; 0 trains all layers."
        )
    return asked


def lora_config(model: PreTrainedModel, arguments: ModelArguments) -> LoraConfig | None:
    """LoRA as asked for; on all of the backbone's linear layers unless `lora_target_modules` names some."""
    config = get_peft_config(arguments)
    if config is None:
        return None
    if arguments.lora_target_modules is None:
        linear = {
            name.rpartition(".")[2]
            for name, module in model.get_decoder().named_modules()
            if type(module).__name__ == "Conv1D" or isinstance(module, torch.nn.Linear)
        }
        config.target_modules = linear
    first_layer = first_lora_layer(model, arguments.lora_first_layer)
    if first_layer:
        config.layers_to_transform = list(range(first_layer, model.config.get_text_config().num_hidden_layers))
        logger.info("LoRA trains the layers from %d on.", first_layer)
    return config


def build_model(task: Task, arguments: TaskArguments, model_arguments: ModelArguments, training: ClsGenSFTConfig):
    """The task's model on its backbone, before the warm start."""
    backbone = resolve_backbone(model_arguments.model_name_or_path)
    kwargs: dict[str, Any] = {"revision": model_arguments.model_revision} if not Path(backbone).is_dir() else {}
    quantization = get_quantization_config(model_arguments)
    if quantization is not None:
        # One whole copy a process: bitsandbytes places weights while it loads them.
        kwargs.update(quantization_config=quantization, device_map={"": training.device})
    if model_arguments.attn_implementation:
        kwargs["attn_implementation"] = model_arguments.attn_implementation
    model = ClsGenForCausalLMAndClassification.from_backbone(
        backbone,
        task=task.prompt,
        labels=task.labels,
        config_kwargs={
            "max_prompt_length": training.max_length - training.max_explanation_length,
            "cls_reads": parse_reads(arguments.cls_reads),
            "cls_bias": arguments.cls_bias,
            "explanation_no_repeat_ngram_size": arguments.explanation_no_repeat_ngram_size,
            "explanation_guidance_scale": arguments.explanation_guidance_scale,
        },
        dtype=model_arguments.dtype or "float32",
        **kwargs,
    )
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions and training.max_length > positions:
        raise ValueError(
            f"`max_length` is {training.max_length}, but {model_arguments.model_name_or_path} reads {positions} "
            "tokens at most: lower it, or take another backbone."
        )
    # Words of the model's own run on for longer than the teacher's, and say their verdict last.
    verdict = max(len(model.encoder.encode_verdict(label)) for label in (0, 1))  # stands before them
    room = (positions or math.inf) - model.config.max_prompt_length - verdict
    model.generation_config.max_new_tokens = min(int(ROOM_TO_END * training.max_explanation_length), room)
    return model


def start_warm(
    model: ClsGenForCausalLMAndClassification,
    rows: Dataset,
    arguments: TaskArguments,
    training: ClsGenSFTConfig,
    first_layer: int,
) -> Probe:
    """Fits the probe on the training device; every process ends with the main one's head."""
    if not getattr(model, "is_quantized", False):  # bitsandbytes has placed its weights already
        model.to(training.device)
    kept = None
    if training.cache_frozen_layers:
        kept = FrozenLayers(model, first_layer, frozen_layers_dir(training), model.read_layers())
    probe = warm_start(model, rows, parse_reads(arguments.cls_reads), seed=training.seed, frozen_layers=kept)
    if training.world_size > 1:
        found = [probe, {name: tensor.cpu() for name, tensor in model.cls_head.state_dict().items()}]
        broadcast_object_list(found)
        probe = found[0]
        model.set_reads(list(probe.reads))
        model.cls_head.load_state_dict(found[1])
    return probe


def show_examples(examples: list[dict[str, Any]]) -> None:
    """Prints predictions that [`write_examples`] made."""
    for example in examples:
        prediction = example["prediction"]
        print(f"\n[{example['id']}] " + " | ".join(f"{name}: {text}" for name, text in example["text"].items()))
        print(f"  {prediction['label']} (P({prediction['positive_label']}) = {prediction['probability']:.3f}", end="")
        print(f", threshold {prediction['threshold']:.3f}): {prediction['explanation']}")
        print(f"  gold label: {example['gold'] or 'none'}; the LM alone: {prediction['lm_probability']}")


def prepare_output_dir(training: ClsGenSFTConfig, arguments: TaskArguments, task: Task) -> Path:
    """The run's folder, `outputs/<task>` unless asked otherwise; it is writable, and so is that for results."""
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = str(Path("outputs") / task.name)
    for name, place in (("output_dir", training.output_dir), ("results_dir", arguments.results_dir)):
        if place is None:
            continue
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            probe = Path(place) / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"`{name}` {place} is not writable ({error}): choose another with --{name}.") from error
    return Path(training.output_dir)


def check_metric(arguments: TaskArguments, training: ClsGenSFTConfig) -> None:
    """Refuses to choose a checkpoint by the head alone where the number is going to be the LM's reading too."""
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    if arguments.lm_reading_weight and metric in HEADLINE_METRICS:
        raise ValueError(
            f"`metric_for_best_model` {metric} is the head's alone during training, but with `lm_reading_weight` "
            f"{arguments.lm_reading_weight} the number is the LM's reading too: take `eval_loss`."
        )


def train(
    model: ClsGenForCausalLMAndClassification,
    task: Task,
    arguments: TaskArguments,
    training: ClsGenSFTConfig,
    model_arguments: ModelArguments,
    callbacks: Iterable[TrainerCallback] = (),
) -> tuple[ClsGenSFTTrainer, Probe | None]:
    """Starts the model warm and trains it; the trainer holds the result."""
    rows = {
        name: encode_split(split, model.encoder, training, name)
        for name, split in task.splits.items()
        if name != "test"
    }
    fine_tune = training.num_train_epochs > 0 or training.max_steps > 0
    if not fine_tune and not arguments.warm_start:
        raise ValueError("No epochs and no warm start: nothing would be learned. Ask for one of them.")
    adapts = fine_tune and model_arguments.use_peft
    first_layer = first_lora_layer(model, model_arguments.lora_first_layer) if adapts else 0
    if training.cache_frozen_layers and not first_layer:
        logger.info("`cache_frozen_layers` has nothing to do: no layer is gone through twice while it stays frozen.")
        training.cache_frozen_layers = False
    model.config.pos_weight = resolve_pos_weight(training.pos_weight, rows["train"], model.config.cls_bias)
    probe = start_warm(model, rows["train"], arguments, training, first_layer) if arguments.warm_start else None
    adapter = lora_config(model, model_arguments) if adapts else None  # behind the probe, which finds the reads
    if "validation" not in rows:
        logger.warning("The task has no validation split: no evaluation, no calibration, no choice of checkpoint.")
        training.eval_strategy, training.load_best_model_at_end, training.eval_on_start = "no", False, False
    callbacks = list(callbacks)
    if arguments.early_stopping_patience and "validation" in rows:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = ClsGenSFTTrainer(
        model,
        args=training,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        peft_config=adapter,
        callbacks=callbacks,
    )
    if not fine_tune:
        logger.info("No epochs asked for: the linear probe is the head, and the backbone stays as it is.")
        return trainer, probe
    resume = training.resume_from_checkpoint
    if resume == NEWEST:
        resume = last_complete_checkpoint(training.output_dir)
        logger.info("Resuming from %s", resume or "the start: there is no complete checkpoint yet")
    if not (resume and take_up_finished(trainer, resume)):
        trainer.train(resume_from_checkpoint=resume)
    return trainer, probe


def finish(
    trainer: ClsGenSFTTrainer,
    probe: Probe | None,
    task: Task,
    arguments: TaskArguments,
    report: dict[str, Any],
    recipe: str,
    clock: TrainingClock,
) -> Path:
    """Calibrates, tests, writes the checkpoint and the result files, and shows them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The checkpoint will answer without the training's autocast: what it is calibrated on does, too.
    trainer.accelerator.native_amp = False
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        model.forward = forward
    config, training = base.config, trainer.args
    report["history"] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]

    def score_split(name: str, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        if config.lm_reading_weight:
            return logits_and_labels(base, rows)
        return trainer.logits_and_labels(
            trainer.predict(encode_split(rows, base.encoder, training, name), metric_key_prefix=name)
        )

    metrics, predictions = calibrate_and_test(config, task, score_split, arguments)
    report.update(
        metrics,
        cls_reads=config.cls_reads,
        probe=None if probe is None else {"C": probe.inverse_penalty, "cv_auroc": probe.auroc},
        wall_seconds=round(clock.seconds, 1),
        peak_memory_gib=round(peak_memory_mib() / 2**10, 2),
    )
    gpus = training.world_size * training.n_gpu
    report["footprint"] = estimate_footprint(
        report["wall_seconds"], report["peak_memory_gib"], available_cores(), gpus
    )
    output_dir = Path(training.output_dir)
    model = gather_model(trainer.accelerator, trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return output_dir / "model"
    if isinstance(model, PeftModel):
        if arguments.save_adapter:
            model.save_pretrained(output_dir / "adapter")
        model = model.merge_and_unload()
    folder = write_checkpoint(model, output_dir / "model", report, predictions, recipe)
    for results in filter(None, (output_dir, arguments.results_dir)):
        write_json(Path(results) / "metrics.json", report)
        write_json(Path(results) / "test_predictions.json", predictions)
    return folder


def publication(task: Task, arguments: TaskArguments, training: ClsGenSFTConfig, report: dict[str, Any]):
    """What `--push_to_hub` asks for, checked before training; `None` without it.

    The trainer's own pushing is switched off: it would publish every checkpoint, as it stands, with a card of its own.
    """
    if not training.push_to_hub:
        return None
    training.push_to_hub = False
    if not training.hub_model_id:
        raise ValueError("`--push_to_hub` needs the name of the repository: --hub_model_id NAMESPACE/NAME.")
    asked = PublishArguments(
        model=str(Path(training.output_dir) / "model"),
        repo_id=training.hub_model_id,
        task=arguments.task,
        parts=["model"],
        private=bool(training.hub_private_repo),
        revision=training.hub_revision or "main",
        num_examples=arguments.num_examples,
        license=arguments.model_license,
        i_may_publish_credentialed_data=arguments.i_may_publish_credentialed_data,
    )
    check_publication(asked, report)
    license_of(report, asked)
    identity(HfApi(token=training.hub_token))
    return asked


def main(argv: list[str] | None = None, run: dict[str, Any] | None = None) -> None:
    """Runs the command line; see the module's docstring.

    Args:
        argv (`list[str]`, *optional*): Its arguments.
        run (`dict`, *optional*): What [`run_record.describe_run`] says of another command that this one is part of.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe, others = split_off_recipe(argv)
    parser = TrlParser((TaskArguments, ClsGenSFTConfig, ModelArguments))
    arguments, training, model_arguments = parser.parse_args_and_config(["--config", recipe, *others])
    recipe_text = read_recipe(recipe)  # as it is now: it may be edited while the training runs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "accelerate", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logger.info("Settings: %s, and what the command line changes", recipe)
    set_seed(training.seed)
    check_launch(arguments.warm_start, training, model_arguments, arguments.lm_reading_weight)
    check_metric(arguments, training)
    task = load_task(arguments.task, arguments.data_dir, on_bad_row=arguments.on_bad_row)
    check_validation_split(task)
    if arguments.num_examples is None:
        arguments.num_examples = 0 if task.credentialed else 3
    output_dir = prepare_output_dir(training, arguments, task)
    training.resume_from_checkpoint = resumption(training.resume_from_checkpoint)
    clock = TrainingClock(output_dir / "seconds.json", goes_on=training.resume_from_checkpoint is not None)
    with training.main_process_first(local=False, desc="looking for checkpoints"):
        of = run_of(task, arguments, training, model_arguments)
        claim_folder(output_dir, of, resume=training.resume_from_checkpoint is not None)
    report = {
        "task": task.name,
        "credentialed": task.credentialed,
        "base_model": model_arguments.model_name_or_path,
        "seed": training.seed,
        **(run or describe_run("train_sft_cls.py", argv)),
    }
    asked = publication(task, arguments, training, report)
    model = build_model(task, arguments, model_arguments, training)
    task = rows_that_fit(task, model.encoder, arguments.on_bad_row)
    check_validation_split(task)
    report["train_rows"] = class_counts(task.splits["train"])
    trainer, probe = train(model, task, arguments, training, model_arguments, [clock])
    if trainer.model.config.name_or_path == str(dequantized_folder()):
        report["base_model_source"] = DEQUANTIZED_SOURCE
    folder = finish(trainer, probe, task, arguments, report, recipe_text, clock)
    trainer.accelerator.end_training()  # who exits within a process group may abort, and the launcher kills the rest
    if not trainer.is_world_process_zero():
        return
    print(f"\n{table(report)}")
    print(
        f"\n{report['wall_seconds']:.0f} s, peak memory {report['peak_memory_gib']:.1f} GiB; all of it in {output_dir}"
    )
    if arguments.num_examples:
        show_examples(write_examples(folder, task, arguments.num_examples))
    field_names = json.dumps(dict.fromkeys(task.fields, "..."))
    print("\nUse it from anywhere:\n  from transformers import AutoModel")
    print(f'  model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)')
    print(f"  print(model.classify_and_explain({field_names}))")
    if asked is not None:
        for each in publish(asked, training.hub_token):
            print(f"Published: {each.url} at {each.commit}")


if __name__ == "__main__":
    main()
