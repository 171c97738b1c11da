"""What a user would pick instead of CLSGen, on the same splits: one system, one task, one seed.

python -m benchmarks.baselines --system tfidf --task trial_claims
python -m benchmarks.baselines --system cnn --task clinifact --data_dir CliniFact --seed 1
python -m benchmarks.baselines --system sft-only --set epochs=2 --set learning_rate=2e-4
"""

import argparse
import importlib
import json
import logging
import math
from pathlib import Path

import yaml
from transformers import set_seed

from benchmarks.baselines.running import Baseline, RefusedRunError, run
from clsgen.backbones import DEFAULT_BACKBONE, resolve_backbone
from clsgen.tasks import load_task

SYSTEMS = {
    "tfidf": "tfidf:TfidfBaseline",
    "encoder-probe": "encoder_probe:EncoderProbe",
    "cnn": "cnn:CnnBaseline",
    "zero-shot-logprob": "prompting:ZeroShotLogProbability",
    "zero-shot-verbalised": "prompting:ZeroShotVerbalised",
    "few-shot": "prompting:FewShot",
    "sft-only": "fine_tuning:SftOnly",
    "classification-only": "fine_tuning:ClassificationOnly",
    "two-models": "fine_tuning:TwoModels",
}
WITHOUT_BACKBONE = {"tfidf", "encoder-probe", "cnn"}


def system_class(name: str) -> type[Baseline]:
    """The class of a system; what it imports is imported only now."""
    module, _, attribute = SYSTEMS[name].partition(":")
    return getattr(importlib.import_module(f"benchmarks.baselines.{module}"), attribute)


def parse_options(pairs: list[str]) -> dict[str, object]:
    """`["epochs=2"]` to `{"epochs": 2}`; raises `ValueError` for another form."""
    options = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ValueError(f"`--set` takes NAME=VALUE, got {pair!r}.")
        try:
            options[name] = json.loads(value)  # for YAML, 1e-3 is a word
        except ValueError:
            options[name] = yaml.safe_load(value)
    return options


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", required=True, choices=sorted(SYSTEMS))
    parser.add_argument("--task", default="trial_claims", help="a task's folder, or its name below data/")
    parser.add_argument("--data_dir", help="source that the task's prepare.py reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="for the systems that have one")
    parser.add_argument("--results_dir", type=Path, help="results/<task>/<system>/seed-<seed> by default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the system")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(arguments.seed)
    try:
        task = load_task(arguments.task, arguments.data_dir)
        backbone = "" if arguments.system in WITHOUT_BACKBONE else resolve_backbone(arguments.backbone)
        baseline = system_class(arguments.system)(task, arguments.seed, backbone, **parse_options(arguments.set))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        named = arguments.backbone if backbone else None
        test = run(baseline, arguments.system, arguments.results_dir, named)["test"]
    except RefusedRunError as error:
        parser.error(str(error))
    figures = ", ".join(
        f"{name} {'undefined' if math.isnan(test[name]) else format(test[name], '.3f')}"
        for name in ("auroc", "f1", "ece")
    )
    print(f"{arguments.system} on {task.name}, seed {arguments.seed}: test {figures}")


if __name__ == "__main__":
    main()
