"""Publishes a checkpoint, its task and the demo: a model, a data set and a Space on the Hub that link to each other.

python push_to_hub.py --model outputs/trial_claims/model --repo_id USER/clsgen-trial-claims --dry_run out  # look first
python push_to_hub.py --model outputs/trial_claims/model --repo_id USER/clsgen-trial-claims
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import HfArgumentParser

from clsgen.backbones import DEFAULT_BACKBONE
from clsgen.publishing.cards import TEMPLATE, hub_id
from clsgen.publishing.examples import write_examples
from clsgen.publishing.hub import PublicationError, Published, Publisher, check_repository
from clsgen.publishing.repositories import (
    UNKNOWN_REVISION,
    Repository,
    dataset_repository,
    model_repository,
    space_repository,
)
from clsgen.tasks import find_task, load_task, rows_digest

logger = logging.getLogger("clsgen.push_to_hub")
ROOT = Path(__file__).resolve().parent
PARTS = ("dataset", "model", "space")


@dataclass
class PublishArguments:
    """What to publish, and where."""

    model: str = field(metadata={"help": "The checkpoint's folder."})
    repo_id: str = field(metadata={"help": "NAMESPACE/NAME of the model."})
    task: str | None = field(
        default=None, metadata={"help": "The task's folder or name; by default that of metrics.json."}
    )
    dataset_id: str | None = field(default=None, metadata={"help": "By default NAMESPACE/ and the task's name."})
    space_id: str | None = field(default=None, metadata={"help": "By default as the model's."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Which of the three to publish.", "choices": list(PARTS)},
    )
    variant: str = field(
        default="merged",
        metadata={"help": "All weights, or the LoRA adapter alone.", "choices": ["merged", "adapter"]},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "The adapter's folder; by default `adapter` beside the checkpoint."}
    )
    space_dir: str = field(default=str(ROOT / "space"), metadata={"help": "The app's folder."})
    license: str | None = field(default=None, metadata={"help": "The Hub's id; by default the base model's."})
    card_template: str = field(default=str(TEMPLATE), metadata={"help": "Your own Jinja template of the model card."})
    num_examples: int = field(default=3, metadata={"help": "Answers for the page, where the checkpoint keeps none."})
    collection: str | None = field(
        default=None, metadata={"help": "Title of the collection; by default `CLSGen: TASK`."}
    )
    private: bool = field(default=False, metadata={"help": "New repositories stay private."})
    revision: str = field(default="main", metadata={"help": "The branch that gets the commits."})
    create_pr: bool = field(default=False, metadata={"help": "Open pull requests on existing repositories instead."})
    dry_run: str | None = field(
        default=None, metadata={"help": "Write the repositories to this folder, send nothing."}
    )
    i_may_publish_credentialed_data: bool = field(
        default=False, metadata={"help": "The task is marked `credentialed: true`, and you have the right to publish "
                                         "its texts, explanations and weights."}
    )  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Ids of the repositories that exist or are to be published; `None` for one that a card can't link to."""

    model: str
    dataset: str | None
    space: str | None


def check_publication(arguments: PublishArguments, report: dict[str, Any]) -> dict[str, Any]:
    """What can be refused before any work; returns the task's `task.yaml`.

    Raises:
        PublicationError: for a credentialed task, one that can't be found or whose data are on the Hub already,
            or a name against the base model's license.
    """
    name = arguments.task or report["task"]
    try:
        spec = find_task(name)[1]
    except FileNotFoundError as error:
        raise PublicationError(f"{error} Name the checkpoint's task with --task.") from error
    if spec["name"] != report["task"]:
        raise PublicationError(f"The checkpoint was trained on the task {report['task']!r}, not on {spec['name']!r}.")
    credentialed = spec.get("credentialed", False) or report.get("credentialed", False)
    if credentialed and not arguments.i_may_publish_credentialed_data:
        raise PublicationError(
            f"The task {spec['name']!r} is marked `credentialed: true`: no text, explanation, example or weight made "
            "from its data is published. If you have the right to, say --i_may_publish_credentialed_data true."
        )
    llama = report["base_model"].lower().startswith("meta-llama/")
    if llama and not arguments.repo_id.rpartition("/")[2].startswith("Llama"):
        raise PublicationError(
            f"The license of {report['base_model']} wants names of derived models to start with `Llama`; call it "
            f"{arguments.repo_id.partition('/')[0]}/Llama-{arguments.repo_id.rpartition('/')[2]}."
        )
    unknown = set(arguments.parts) - set(PARTS)
    if unknown or not arguments.parts:
        raise PublicationError(f"--parts takes some of {PARTS}, got {arguments.parts}.")
    source = _source(spec)
    if "dataset" in arguments.parts and source and not arguments.dataset_id:
        raise PublicationError(
            f"Its data are on the Hub as {source}; a copy would have neither the gate nor the card that they "
            "have there. Say `--parts model space`, or name the copy with --dataset_id if you may publish one."
        )
    return spec


def _source(spec: dict[str, Any]) -> str | None:
    """Where on the Hub a task's data come from."""
    return hub_id(spec["dataset"]) if "dataset" in spec else None


def license_of(report: dict[str, Any], arguments: PublishArguments) -> str:
    """The license that the model card states."""
    if arguments.license:
        return arguments.license
    if report["base_model"] == DEFAULT_BACKBONE:
        return "apache-2.0"
    try:
        found = ModelCard.load(report["base_model"], ignore_metadata_errors=True).data.license
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        found = None
    if not found:
        raise PublicationError(
            f"The license of {report['base_model']} can't be found out: state the model's with --license."
        )
    return found


def _test_rows(arguments: PublishArguments, report: dict[str, Any]) -> str | None:
    """The digest of the task's test rows; `None` where its data can't be had here."""
    try:
        splits = load_task(arguments.task or report["task"]).splits
    except (OSError, ValueError):
        return None
    return rows_digest(splits["test"]) if "test" in splits else None


def _names(arguments: PublishArguments, spec: dict[str, Any]) -> Names:
    namespace = arguments.repo_id.partition("/")[0]
    dataset = arguments.dataset_id
    if "dataset" in arguments.parts:
        dataset = dataset or f"{namespace}/{spec['name'].replace('_', '-')}"
    space = arguments.space_id
    if "space" in arguments.parts:
        space = space or arguments.repo_id
    return Names(arguments.repo_id, dataset or _source(spec), space)


def _repositories(arguments: PublishArguments, report: dict[str, Any], spec: dict[str, Any]):
    """The parts in the order in which one names the other, how each is made, and where their commits are noted."""
    names = _names(arguments, spec)
    checkpoint = Path(arguments.model)
    adapter = arguments.adapter or checkpoint.parent / "adapter" if arguments.variant == "adapter" else None
    commits: dict[str, str] = {}

    def make(part: str) -> Repository:
        if part == "dataset":
            return dataset_repository(
                arguments.task or report["task"], names.dataset, model_id=names.model, space_id=names.space
            )
        if part == "model":
            return model_repository(
                checkpoint, names.model, adapter=adapter, template=arguments.card_template, commits=commits,
                dataset_id=names.dataset, space_id=names.space, license=license_of(report, arguments),
                test_rows=_test_rows(arguments, report) if names.dataset else None,
            )  # fmt: skip
        return space_repository(
            arguments.space_dir, names.space, model_id=names.model, dataset_id=names.dataset,
            model_revision=commits.get("model", UNKNOWN_REVISION),
        )  # fmt: skip

    return [part for part in PARTS if part in arguments.parts], make, commits


def publish(arguments: PublishArguments, token: str | None = None) -> list[Published]:
    """Publishes the parts, or with `dry_run` writes them to a folder.

    Args:
        arguments ([`PublishArguments`]): What, and where.
        token (`str`, *optional*): Defaults to the one that the machine is logged in with.

    Returns:
        `list[Published]`: In the order data set, model, Space; nothing after a dry run.

    Raises:
        PublicationError: with what failed and what to do; nothing is published half.
    """
    checkpoint = Path(arguments.model)
    path = checkpoint / "metrics.json"
    if not path.is_file():
        raise PublicationError(f"{checkpoint} is no checkpoint of train_sft_cls.py: it has no metrics.json.")
    report = json.loads(path.read_text(encoding="utf-8"))
    spec = check_publication(arguments, report)
    if arguments.num_examples and not (checkpoint / "examples.json").is_file():
        task = load_task(arguments.task or report["task"], log=logger)
        write_examples(checkpoint, task, arguments.num_examples)
    parts, make, commits = _repositories(arguments, report, spec)
    try:
        repositories = [make(part) for part in parts]
        for repository in repositories:
            repository.card(UNKNOWN_REVISION)
            check_repository(repository)
    except (ValueError, OSError) as error:
        raise PublicationError(f"Nothing was published: {error}") from error
    if arguments.dry_run is not None:
        _dry_run(repositories, Path(arguments.dry_run))
        return []
    publisher = Publisher(HfApi(token=token), arguments.private, arguments.revision, arguments.create_pr)
    publisher.check(repositories)
    if "model" not in parts and "space" in parts:
        commits["model"] = publisher.published_model(arguments.repo_id)
    published = []
    for part, repository in zip(parts, repositories, strict=True):
        # A Space has the model's commit in a file; weights are hashed once.
        published.append(publisher.publish(make(part) if part == "space" else repository))
        commits[part] = published[-1].commit
        logger.info("%s: %s at %s", part, published[-1].url, published[-1].commit)
    publisher.finish()
    if arguments.private and "space" in parts:
        logger.warning("The private Space needs a secret to read its model: set HF_TOKEN in its settings.")
    if len(parts) > 1 and not arguments.create_pr:
        title = arguments.collection or f"CLSGen: {spec['name']}"
        logger.info("collection: %s", publisher.collect(title, repositories))
    return published


def _dry_run(repositories: list[Repository], folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise PublicationError(f"{folder} is not empty: give another folder for the dry run.")
    for repository in repositories:
        for line in repository.write_to(folder):
            print(line)
    print(f"Nothing was sent. Commits that only the Hub gives are written as {UNKNOWN_REVISION}.")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; see the module's docstring."""
    (arguments,) = HfArgumentParser(PublishArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        published = publish(arguments)
    except PublicationError as error:
        sys.exit(f"push_to_hub.py: {error}")
    for each in published:
        print(f"{each.url} at {each.commit}")


if __name__ == "__main__":
    main()
