"""Cards and the files of repositories: what is published, held to what was measured."""

import json
import re
import shlex
import subprocess
from importlib.metadata import version

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, ModelCard
from packaging.requirements import Requirement
from published_things import tiny_checkpoint, tiny_space, tiny_task

from clsgen.publishing.calibration_plot import calibration_plot
from clsgen.publishing.cards import check_numbers, model_card
from clsgen.publishing.checksums import checksum_lines, verify_checksums
from clsgen.publishing.footprint import estimate_footprint
from clsgen.publishing.hub import PublicationError
from clsgen.publishing.repositories import dataset_repository, model_repository
from clsgen.push_to_hub import PublishArguments, check_publication, main, publish
from clsgen.tasks import load_task

REVISION = "a" * 40


@pytest.fixture
def task(tmp_path):
    return tiny_task(tmp_path / "tiny_task")


@pytest.fixture
def checkpoint(model, task, tmp_path):
    return tiny_checkpoint(model, task, tmp_path / "model")


@pytest.fixture
def space(tmp_path):
    return tiny_space(tmp_path / "space")


def arguments(checkpoint, task, space, **more):
    return PublishArguments(
        model=str(checkpoint), repo_id="alice/tiny", task=str(task), space_dir=str(space), license="mit", **more
    )


def test_the_card_says_what_was_measured_and_pins_every_snippet(checkpoint):
    report = json.loads((checkpoint / "metrics.json").read_text())
    card = model_card(
        checkpoint, repo_id="alice/tiny", revision=REVISION, dataset_id="alice/data", dataset_revision="b" * 40,
        test_rows=report["test_rows_sha256"], space_id="alice/demo", license="mit",
    )  # fmt: skip
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "mit")
    assert (data.base_model, data.base_model_relation, data.datasets) == (
        "someone/tiny-llama",
        "finetune",
        ["alice/data"],
    )
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["roc_auc"] == pytest.approx(report["test"]["auroc"], abs=5e-5)
    assert values["brier_score"] == pytest.approx(report["test"]["brier"], abs=5e-5)
    assert {result.dataset_revision for result in data.eval_results} == {"b" * 40}
    assert set(data.metrics) == set(values)
    example = json.loads((checkpoint / "examples.json").read_text())[0]
    widget = data.widget[0]
    assert widget["text"] == f"Findings: {example['text']['findings']}\n\nClaim: {example['text']['claim']}"
    scores = {answer["label"]: answer["score"] for answer in widget["output"]}
    assert scores["supported"] == pytest.approx(example["prediction"]["probability"], abs=5e-5)
    assert sum(scores.values()) == pytest.approx(1, abs=2e-4)
    text = str(card)
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(block, "card", "exec")
        for load in re.findall(r"(?:from_pretrained|pipeline|load_dataset)\(.*", block):
            assert re.search(r'revision="[ab]{40}"', load), load
    assert "alice/demo" in text
    assert "3.0" not in yaml.safe_dump(data.widget)
    assert "Environmental cost: about" in text
    assert "\\<b\\>" in text  # a row's text is no markup of the page


def test_results_name_the_data_set_only_where_they_are_of_its_rows(checkpoint, task, space, tmp_path):
    def published(name):
        publish(arguments(checkpoint, task, space, dry_run=str(tmp_path / name)))
        card = ModelCard.load(tmp_path / name / "alice" / "tiny" / "README.md")
        return {result.dataset_type for result in card.data.eval_results}, card

    types, card = published("same")
    assert types == {"alice/tiny-task"}
    assert "Nothing shows" not in card.text
    rows = (task / "test.jsonl").read_text()
    (task / "test.jsonl").write_text(rows.replace("Drug 3.", "Drug 33."))
    types, card = published("other")
    assert types == {"tiny_task"}
    assert card.data.datasets == ["alice/tiny-task"]
    assert "Nothing shows that test numbers are of rows of `alice/tiny-task`." in card.text


def test_a_card_whose_numbers_differ_is_refused(checkpoint, tmp_path):
    report = json.loads((checkpoint / "metrics.json").read_text())
    text = (checkpoint / "README.md").read_text()
    check_numbers(text, report)
    auroc, temperature = f"{report['test']['auroc']:.3f}", "| temperature | 1.500 |"
    for before, after, name in (
        (f"| test | {auroc} |", "| test | 0.999 |", "row 'test'"),
        (temperature, "| temperature | 1.400 |", "row 'temperature'"),
        (temperature, "", "row 'temperature'"),
        (f"value: {round(report['test']['auroc'], 4)}", "value: 0.999", "roc_auc"),
        ("    - type: f1\n", "    - type: f2\n", "f2"),
    ):
        assert before in text
        with pytest.raises(ValueError, match=name):
            check_numbers(text.replace(before, after), report)
    template = tmp_path / "own.md"
    template.write_text("---\n{{ card_data }}\n---\n\n# Mine\n\n{{ results }}\n\n{{ calibration }}\n")
    own = model_card(checkpoint, template=template)
    assert "# Mine" in str(own)
    template.write_text(template.read_text().replace("{{ calibration }}", "| threshold | 0.9 |"))
    with pytest.raises(ValueError, match="'threshold'"):
        model_card(checkpoint, template=template)


def test_a_split_that_was_not_measured_has_no_row(checkpoint):
    report = json.loads((checkpoint / "metrics.json").read_text())
    del report["test"]
    (checkpoint / "metrics.json").write_text(json.dumps(report))
    card = model_card(checkpoint)
    assert card.data.eval_results is None
    with pytest.raises(ValueError, match="nothing was measured"):
        check_numbers(str(card) + "\n| test | 1 |\n", report)


def test_undefined_metrics_are_called_so(checkpoint):
    report = json.loads((checkpoint / "metrics.json").read_text())
    report["test"]["auroc"] = None
    (checkpoint / "metrics.json").write_text(json.dumps(report))
    card = model_card(checkpoint)
    assert "| test | undefined |" in str(card)
    assert "roc_auc" not in {result.metric_type for result in card.data.eval_results}


def test_texts_act_neither_as_template_nor_as_code(checkpoint):
    examples = json.loads((checkpoint / "examples.json").read_text())
    examples[0]["text"] = {"findings": '{{ 7 * 7 }} """ \\ \'', "claim": "a\n```\nb"}
    (checkpoint / "examples.json").write_text(json.dumps(examples))
    card = model_card(checkpoint)
    assert "49" not in str(card).partition("## Examples")[2].partition("## Intended")[0]
    assert card.data.widget[0]["text"].startswith("Findings: {{ 7 * 7 }}")
    for block in re.findall(r"```python\n(.*?)```", str(card), flags=re.DOTALL):
        compile(block, "card", "exec")


def test_picture_of_calibration():
    labels, probabilities = np.tile([0, 1], 30), np.linspace(0, 1, 60)
    assert calibration_plot(labels, probabilities, 0.5).startswith(b"\x89PNG")
    assert calibration_plot([1, 0], [0.5, 0.5], 0.5).startswith(b"\x89PNG")


def test_footprint_is_hours_times_watts_times_carbon():
    found = estimate_footprint(7200, 0, cpu_cores=10, gpus=1)
    assert found["energy_kwh"] == pytest.approx(2 * (10 * 12 + 400) / 1000)
    assert found["co2_eq_grams"] == pytest.approx(found["energy_kwh"] * 475)
    assert estimate_footprint(3600, 1 / 1.073741824, 0)["energy_kwh"] == pytest.approx(0.3725 / 1000)


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a b.txt").write_bytes(b"x" * 3_000_000)
    files = {"a b.txt": tmp_path / "a b.txt", "z": b"bytes"}
    (tmp_path / "z").write_bytes(b"bytes")
    (tmp_path / "SHA256SUMS").write_text(checksum_lines(files))
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    verify_checksums(tmp_path)
    (tmp_path / "z").write_bytes(b"other")
    (tmp_path / "a b.txt").unlink()
    with pytest.raises(ValueError, match=r"a b\.txt is missing; z differs"):
        verify_checksums(tmp_path)


def test_a_published_task_is_the_same_task(task, tmp_path):
    repository = dataset_repository(task, "alice/tiny-task", model_id="alice/tiny")
    repository.write_to(tmp_path / "out", REVISION)
    folder = tmp_path / "out" / "datasets" / "alice" / "tiny-task"
    verify_checksums(folder)
    before, after = load_task(task), load_task(folder)
    assert after.prompt == before.prompt
    for split in ("train", "validation", "test"):
        assert after.splits[split].to_list() == before.splits[split].to_list()
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert "Made for a test." in card.text
    assert f'load_dataset("alice/tiny-task", revision="{REVISION}")' in card.text
    assert "train 24, validation 12, test 20" in card.text


def test_csv_tasks_are_published_too(task, tmp_path):
    spec = yaml.safe_load((task / "task.yaml").read_text())
    for split, file in spec["data_files"].items():
        rows = [json.loads(line) for line in (task / file).read_text().splitlines()]
        lines = [",".join("" if row[name] is None else str(row[name]) for name in rows[0]) for row in rows]
        (task / f"{split}.csv").write_text("\n".join([",".join(rows[0]), *lines]))
        spec["data_files"][split] = f"{split}.csv"
    (task / "task.yaml").write_text(yaml.safe_dump(spec))
    dataset_repository(task, "alice/tiny-task").write_to(tmp_path / "out")
    again = load_task(tmp_path / "out" / "datasets" / "alice" / "tiny-task")
    assert again.splits["test"].to_list() == load_task(task).splits["test"].to_list()


def test_a_column_that_starts_in_a_later_row_is_published(task, tmp_path):
    path = task / "train.jsonl"
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("label", "explanation", "area"):
        del first[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *others]))
    dataset_repository(task, "alice/tiny-task").write_to(tmp_path / "out")
    folder = tmp_path / "out" / "datasets" / "alice" / "tiny-task"
    assert load_task(folder).splits["train"].to_list() == load_task(task).splits["train"].to_list()
    published = Dataset.from_parquet(str(folder / "data" / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert published["area"] == [None, *["x"] * len(others)]


def test_splits_with_other_columns_are_loaded_together(task, tmp_path):
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    rows = [{**row, "site": i, "area": None} for i, row in enumerate(rows)]
    (task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "out" / "datasets" / "alice" / "tiny-task"
    dataset_repository(task, "alice/tiny-task").write_to(tmp_path / "out")
    published = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert published["test"]["site"] == list(range(20))
    assert published["train"]["site"] == [None] * 24
    assert published["train"].features == published["validation"].features == published["test"].features


@pytest.mark.parametrize("values", [["x", 1], [1, "x"], [{"a": 1}, "x"]])
@pytest.mark.parametrize("places", [[("train", 0), ("train", 1)], [("train", 0), ("test", 0)]])
def test_a_column_of_several_types_is_named(checkpoint, task, space, values, places):
    for value, (split, place) in zip(values, places, strict=True):
        path = task / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[place]["site"] = value
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PublicationError, match=r"Nothing was published: .*column 'site' are not all of one type"):
        publish(arguments(checkpoint, task, space, parts=["dataset"]))


def test_dry_run_writes_the_exact_trees(checkpoint, task, space, tmp_path, capsys):
    out = tmp_path / "out"
    publish(arguments(checkpoint, task, space, dry_run=str(out)))
    listed = capsys.readouterr().out
    model_files = {path.name for path in (out / "alice" / "tiny").iterdir()}
    assert {
        "README.md", "SHA256SUMS", "config.json", "model.safetensors", "modeling_clsgen.py", "pipeline_clsgen.py",
        "handler.py", "requirements.txt", "tokenizer.json", "chat_template.jinja", "metrics.json", "recipe.yaml",
        "calibration.png", "examples.json",
    } <= model_files  # fmt: skip
    for folder in (
        out / "alice" / "tiny",
        out / "datasets" / "alice" / "tiny-task",
        out / "spaces" / "alice" / "tiny",
    ):
        verify_checksums(folder)
        listed_files = (folder / "SHA256SUMS").read_text().splitlines()
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(listed_files) == len(files) - 2  # neither the card nor the list itself
    assert "alice/tiny/model.safetensors" in listed
    assert "Nothing was sent" in listed
    space_folder = out / "spaces" / "alice" / "tiny"
    what = json.loads((space_folder / "space.json").read_text())
    assert what == {"model": "alice/tiny", "revision": "0" * 40, "dataset": "alice/tiny-task"}
    assert "models:\n- alice/tiny" in (space_folder / "README.md").read_text()
    assert sorted(path.name for path in space_folder.iterdir()) == [
        "README.md", "SHA256SUMS", "app.py", "requirements.txt", "space.json",
    ]  # fmt: skip
    with pytest.raises(PublicationError, match="not empty"):
        publish(arguments(checkpoint, task, space, dry_run=str(out)))


def test_endpoints_are_told_which_transformers_the_code_needs(checkpoint):
    wanted = [Requirement(line) for line in (checkpoint / "requirements.txt").read_text().splitlines()]
    assert [each.name for each in wanted] == ["transformers", "accelerate"]
    assert all(each.specifier.contains(version(each.name)) for each in wanted)
    assert not any(wanted[0].specifier.contains(other) for other in ("4.57.1", "5.22.0", "6.0.0"))


def test_credentialed_tasks_are_refused_unless_said_so(checkpoint, space, tmp_path):
    secret = tiny_task(tmp_path / "secret", credentialed=True)
    for parts in (["model"], ["dataset"], ["space"], ["dataset", "model", "space"]):
        with pytest.raises(PublicationError, match="credentialed: true"):
            publish(arguments(checkpoint, secret, space, parts=parts, dry_run=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    allowed = arguments(checkpoint, secret, space, dry_run=str(tmp_path / "out"), i_may_publish_credentialed_data=True)
    publish(allowed)
    assert (tmp_path / "out" / "alice" / "tiny").is_dir()


def test_a_checkpoint_remembers_that_its_data_were_credentialed(checkpoint, task, space, tmp_path):
    report = json.loads((checkpoint / "metrics.json").read_text())
    (checkpoint / "metrics.json").write_text(json.dumps({**report, "credentialed": True}))
    with pytest.raises(PublicationError, match="credentialed: true"):
        publish(arguments(checkpoint, task, space, dry_run=str(tmp_path / "out")))


def test_data_that_are_on_the_hub_are_copied_only_to_a_name_that_is_given(checkpoint, task, space):
    spec = yaml.safe_load((task / "task.yaml").read_text())
    del spec["data_files"]
    (task / "task.yaml").write_text(yaml.safe_dump({**spec, "dataset": "myorg/private-notes"}))
    report = json.loads((checkpoint / "metrics.json").read_text())
    with pytest.raises(PublicationError, match=r"on the Hub as myorg/private-notes.*--parts model space"):
        publish(arguments(checkpoint, task, space))
    check_publication(arguments(checkpoint, task, space, parts=["model", "space"]), report)
    check_publication(arguments(checkpoint, task, space, dataset_id="alice/notes"), report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo_id": "tiny"}, "NAMESPACE/NAME"),
        ({"repo_id": "alice/ti ny"}, "is no name for a repository"),
        ({"dataset_id": "alice/..data"}, "is no name for a repository"),
        ({"task": "nowhere"}, "Name the checkpoint's task with --task"),
        ({"task": "trial_claims"}, "was trained on the task 'tiny_task', not on 'trial_claims'"),
        ({"space_dir": "nowhere"}, "is no Space: it has no README.md, app.py, requirements.txt"),
        ({"parts": ["modle"]}, "--parts takes"),
        ({"model": "nowhere"}, "is no checkpoint"),
        ({"variant": "adapter"}, "holds no adapter"),
    ],
)
def test_what_cannot_be_published_is_said_before_any_work(checkpoint, task, space, tmp_path, change, message):
    asked = arguments(checkpoint, task, space, dry_run=str(tmp_path / "out"))
    for name, value in change.items():
        setattr(asked, name, value)
    with pytest.raises(PublicationError, match=message):
        publish(asked)
    assert not (tmp_path / "out").exists()


def test_no_path_of_this_machine_is_published(checkpoint, task, space, tmp_path):
    assert str(tmp_path.parent) not in (checkpoint / "config.json").read_text()
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/jane/backbone"  # as older checkpoints have it
    (checkpoint / "config.json").write_text(json.dumps(config))
    report = json.loads((checkpoint / "metrics.json").read_text())
    paths = ["--model_name_or_path", "/home/jane/ward7/llama", "--data_dir=/home/jane/my notes/", "--fp16", "1/2"]
    command = shlex.join(["python", "train_sft_cls.py", *paths, "--output_dir", "/home/jane/out dir"])
    report |= {"base_model": "/home/jane/ward7/llama", "command": command, "recalibration": {"command": command}}
    (checkpoint / "metrics.json").write_text(json.dumps(report))
    recipe = 'task: /home/jane/tasks/mine  # not /home/jane/other\ndata_dir: "/home/jane/my notes"\nseed: 0\n'
    (checkpoint / "recipe.yaml").write_text(recipe)
    publish(arguments(checkpoint, task, space, dry_run=str(tmp_path / "out")))
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".json", ".yaml", ".md", ".py", ".jinja", ".txt"):
            assert not re.search(rf"/home/jane|ward7|notes/|{tmp_path.parent}", path.read_text()), path
    folder = tmp_path / "out" / "alice" / "tiny"
    published = json.loads((folder / "config.json").read_text())
    assert published["text_config"]["_name_or_path"] == ""
    assert published["cls_reads"] == config["cls_reads"]
    published = json.loads((folder / "metrics.json").read_text())
    assert shlex.split(published["command"])[2:] == [
        "--model_name_or_path", ".../llama", "--data_dir=.../my notes", "--fp16", "1/2", "--output_dir", ".../out dir",
    ]  # fmt: skip
    assert {name for name in report if published[name] != report[name]} == {"base_model", "command", "recalibration"}
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == {
        "task": ".../mine", "data_dir": ".../my notes", "seed": 0,
    }  # fmt: skip
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None
    assert "Base model: `llama`" in card.text
    assert ".../llama" in card.text


def test_strange_and_oversized_files_are_refused(checkpoint, task, space, tmp_path):
    asked = arguments(checkpoint, task, space, dry_run=str(tmp_path / "out"))
    (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(PublicationError, match=r"optimizer\.pt"):
        publish(asked)
    (checkpoint / "optimizer.pt").unlink()
    with (checkpoint / "more.safetensors").open("wb") as file:
        file.truncate(50 * 1000**3 + 1)
    with pytest.raises(PublicationError, match="the Hub takes at most 50,000,000,000"):
        publish(asked)


def test_names_that_the_base_models_license_asks_for(checkpoint, task, space, tmp_path):
    report = json.loads((checkpoint / "metrics.json").read_text())
    report["base_model"] = "meta-llama/Llama-3.1-8B-Instruct"
    (checkpoint / "metrics.json").write_text(json.dumps(report))
    asked = arguments(checkpoint, task, space, dry_run=str(tmp_path / "out"))
    with pytest.raises(PublicationError, match="alice/Llama-tiny"):
        publish(asked)
    asked.repo_id = "alice/Llama-tiny"
    publish(asked)


def test_the_command_ends_with_one_line(checkpoint, task, capsys):
    with pytest.raises(SystemExit, match=r"^push_to_hub\.py: 'tiny' is no name"):
        main(
            [
                "--model",
                str(checkpoint),
                "--repo_id",
                "tiny",
                "--task",
                str(task),
                "--parts",
                "model",
                "--license",
                "mit",
            ]
        )


def test_adapter_repositories_hold_the_adapter_and_no_other_weights(checkpoint, model, task, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["cls_head"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    repository = model_repository(checkpoint, "alice/tiny", adapter=tmp_path / "adapter")
    assert [path for path in repository.files if path.endswith(".safetensors")] == ["adapter_model.safetensors"]
    config = json.loads(repository.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "someone/tiny-llama"
    card = repository.card(REVISION)
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    report = json.loads((checkpoint / "metrics.json").read_text())
    (checkpoint / "metrics.json").write_text(json.dumps({**report, "base_model_source": "de-quantised"}))
    with pytest.raises(ValueError, match="Publish the merged checkpoint"):
        model_repository(checkpoint, "alice/tiny", adapter=tmp_path / "adapter")
    (checkpoint / "metrics.json").write_text(json.dumps({**report, "base_model": str(tmp_path)}))
    with pytest.raises(ValueError, match="which nobody else can load"):
        model_repository(checkpoint, "alice/tiny", adapter=tmp_path / "adapter")


def test_a_local_checkpoints_card_runs_where_it_lies(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
        assert '"."' in block
    assert card.data.model_name == "tiny_task"
