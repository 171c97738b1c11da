"""What goes wrong while publishing: after each failure nothing is half there, and the same call finishes it."""

import contextlib
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from conftest import build
from hub_on_loopback import READ_TOKEN, TOKEN, LoopbackHub
from huggingface_hub import HfApi, ModelCard, constants
from published_things import tiny_checkpoint, tiny_space, tiny_task
from safetensors.torch import load_file, save_file

from clsgen.export import stock_form_problem
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.publishing.hub import PublicationError
from clsgen.push_to_hub import PublishArguments, publish
from clsgen.train_sft_cls import main as train

WHERE = {
    "dataset": {"repo_id": "alice/tiny-task", "repo_type": "dataset"},
    "model": {"repo_id": "alice/tiny", "repo_type": "model"},
    "space": {"repo_id": "alice/tiny", "repo_type": "space"},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process' client talks to, by LFS; a cache of its own."""
    hub = LoopbackHub(tmp_path, xet=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets where it is there from the start
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def made(backbones, tmp_path_factory):
    """A task, a checkpoint and a Space, made once."""
    folder = tmp_path_factory.mktemp("made")
    tiny_task(folder / "tiny_task")
    tiny_space(folder / "space")
    tiny_checkpoint(build(backbones["llama"]), folder / "tiny_task", folder / "model")
    return folder


@pytest.fixture
def asked(made):
    return PublishArguments(
        model=str(made / "model"), repo_id="alice/tiny", task=str(made / "tiny_task"),
        space_dir=str(made / "space"), license="mit",
    )  # fmt: skip


def seen_by_all(hub):
    """Files on `main` of each part, as somebody without a token sees them; `None` where there is no repository."""
    api, found = HfApi(endpoint=hub.url, token=False), {}
    for part, where in WHERE.items():
        found[part] = set(api.list_repo_files(**where)) if api.repo_exists(**where) else None
    return found


def assert_complete(hub):
    api = hub.api()
    for part, files in seen_by_all(hub).items():
        assert {"README.md", "SHA256SUMS"} <= files, part
        titles = [commit.title for commit in api.list_repo_commits(**WHERE[part])]
        assert titles == ["Publish with CLSGen", "initial commit"], part
        assert [branch.name for branch in api.list_repo_refs(**WHERE[part]).branches] == ["main"]


NOTHING = dict.fromkeys(WHERE)


def test_tokens_that_may_not_write(hub, asked, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublicationError, match=r"no token found.*[^.]\. Log in with a valid token"):
        publish(asked)
    with pytest.raises(PublicationError, match=r"Log in with a valid token"):
        publish(asked, token="hf_wrong")
    with pytest.raises(PublicationError, match=r"alice has no write access to carol/tiny-task"):
        publish(replace(asked, repo_id="carol/tiny"), token=TOKEN)
    with pytest.raises(PublicationError, match=r"Use a token with write access") as raised:
        publish(replace(asked, repo_id="bob/tiny"), token=READ_TOKEN)
    assert READ_TOKEN not in str(raised.value)
    assert seen_by_all(hub) == NOTHING
    assert httpx.get(f"{hub.url}/api/models?author=bob").json() == []


def test_a_name_that_something_else_has(hub, asked):
    api = hub.api()
    api.create_repo(**WHERE["model"])
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="weights.json", repo_id="alice/tiny")
    with pytest.raises(PublicationError, match=r"The name alice/tiny is taken"):
        publish(asked, token=TOKEN)
    assert seen_by_all(hub) == {"dataset": None, "model": {".gitattributes", "weights.json"}, "space": None}


def test_a_card_that_the_hub_refuses(hub, asked):
    with pytest.raises(PublicationError, match=r"license"):
        publish(replace(asked, license="mine"), token=TOKEN)
    assert seen_by_all(hub) == NOTHING


@pytest.mark.parametrize(
    "fault",
    [
        {"match": r"POST /api/models/.*/preupload/", "action": "status", "status": 503, "times": 2},
        {"match": r"PUT /lfs/model", "action": "status", "status": 500, "times": 2},
        {"match": r"PUT /lfs/model", "action": "drop", "after": 1000},
        {"match": r"POST /api/repos/create", "action": "lost"},
    ],
)
def test_short_storms_are_sat_out(hub, asked, fault):
    hub.faults(fault)
    publish(asked, token=TOKEN)
    assert_complete(hub)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"match": r"POST /api/repos/create", "action": "status", "status": 500},
            "dataset.*Run the same command again",
        ),
        (
            {"match": r"POST /api/datasets/.*/commit/", "action": "status", "status": 503},
            "dataset.*Run the same command",
        ),
        ({"match": r"POST /api/models/.*/branch/", "action": "status", "status": 500}, "alice/tiny could not be"),
        ({"match": r"PUT /lfs/model", "action": "status", "status": 413}, "larger than the Hub takes"),
        (
            {"match": r"POST /api/models/.*/commit/clsgen", "action": "status", "status": 500},
            "alice/tiny could not be",
        ),
        ({"match": r"POST /api/models/.*/commit/clsgen", "action": "lost"}, "alice/tiny could not be"),
        ({"match": r"POST /api/models/.*/tag/", "action": "status", "status": 500}, "alice/tiny could not be"),
        ({"match": r"POST /api/models/.*/commit/main", "action": "status", "status": 500}, "alice/tiny could not be"),
        ({"match": r"POST /api/models/.*/commit/main", "action": "lost"}, "alice/tiny could not be"),
        ({"match": r"POST /api/spaces/.*/commit/main", "action": "drop"}, "spaces/alice/tiny could not be"),
        ({"match": r"PUT /api/models/.*/settings", "action": "status", "status": 500}, "could not be made public"),
        ({"match": r"POST /api/collections", "action": "status", "status": 500}, "but not the collection"),
    ],
)
def test_after_a_failure_nothing_is_half_there_and_the_same_call_finishes(hub, asked, fault, message):
    hub.faults({**fault, "times": 1})
    with pytest.raises(PublicationError, match=message) as raised:
        publish(asked, token=TOKEN)
    assert TOKEN not in str(raised.value)
    for files in seen_by_all(hub).values():
        assert files is None or {"README.md", "SHA256SUMS"} <= files
    uploads = [r for r in hub.requests() if r["m"] == "PUT" and r["p"].startswith("/lfs/") and r["s"] == 200]
    publish(asked, token=TOKEN)
    assert_complete(hub)
    again = [r for r in hub.requests() if r["m"] == "PUT" and r["p"].startswith("/lfs/") and r["s"] == 200]
    paths = [r["p"].partition("?")[0] for r in again]
    assert len(paths) == len(set(paths)) >= len(uploads)  # no blob is sent twice


def test_the_server_dies_in_an_upload_and_comes_back(hub, asked):
    hub.faults({"match": r"PUT /lfs/model", "action": "kill", "after": 1000})

    def come_back():
        hub.process.wait()
        time.sleep(1)
        hub.start()

    thread = threading.Thread(target=come_back)
    thread.start()
    with contextlib.suppress(PublicationError):  # the client tries again for about 20 seconds
        publish(asked, token=TOKEN)
    thread.join()
    publish(asked, token=TOKEN)
    assert_complete(hub)


def test_the_server_dies_in_the_commit(hub, asked):
    hub.faults({"match": r"POST /api/models/.*/commit/main", "action": "kill", "after": 1})
    with pytest.raises(PublicationError, match="Run the same command again"):
        publish(asked, token=TOKEN)
    hub.start()
    assert seen_by_all(hub) == NOTHING
    publish(asked, token=TOKEN)
    assert_complete(hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"match": r"POST /v1/xorbs/", "action": "kill", "after": 1000},
        {"match": r"POST /v1/shards", "action": "status", "status": 503, "times": 99},
        {"match": r"GET /api/models/.*/xet-write-token", "action": "status", "status": 500, "times": 99},
    ],
)
def test_the_same_command_finishes_an_upload_by_xet(made, tmp_path, fault):
    hub = LoopbackHub(tmp_path, xet=True)
    command = [
        "--model", str(made / "model"), "--repo_id", "alice/tiny", "--task", str(made / "tiny_task"), "--space_dir",
        str(made / "space"), "--license", "mit",
    ]  # fmt: skip
    try:
        hub.faults(fault)
        failed = hub.push(*command)
        assert failed.returncode == 1
        message = failed.stderr.strip().splitlines()[-1]
        assert re.match(r"push_to_hub.py: \S+ could not be published: .*Run the same command", message)
        if fault["action"] == "kill":
            hub.process.wait()
            hub.start()
        hub.faults()
        for files in seen_by_all(hub).values():
            assert files is None or {"README.md", "SHA256SUMS"} <= files
        finished = hub.push(*command)
        assert finished.returncode == 0, finished.stderr
        assert_complete(hub)
    finally:
        hub.stop()


def test_a_newer_version_replaces_the_older_one_at_once(hub, asked, made, tmp_path):
    publish(asked, token=TOKEN)
    api, checkpoint = hub.api(), tmp_path / "newer"
    shutil.copytree(made / "model", checkpoint)
    asked = replace(asked, model=str(checkpoint))
    first, files = api.repo_info("alice/tiny").sha, seen_by_all(hub)["model"]
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="note.txt", repo_id="alice/tiny")
    (checkpoint / "recipe.yaml").unlink()
    weights = load_file(checkpoint / "model.safetensors")
    weights["cls_head.bias"] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    hub.faults({"match": r"POST /api/models/.*/commit/main", "action": "status", "status": 500})
    with pytest.raises(PublicationError):
        publish(asked, token=TOKEN)
    assert seen_by_all(hub)["model"] == files | {"note.txt"}
    publish(asked, token=TOKEN)
    assert seen_by_all(hub)["model"] == (files | {"note.txt"}) - {"recipe.yaml"}
    revisions = []
    for revision in (first, "main"):
        card = ModelCard.load(api.hf_hub_download("alice/tiny", "README.md", revision=revision))
        revisions += set(re.findall(r'"alice/tiny", revision="([0-9a-f]{40})"', str(card)))
    assert len(set(revisions)) == 2
    for revision in revisions:  # what an older card pins stays
        assert "model.safetensors" in api.list_repo_files("alice/tiny", revision=revision)
    assert "recipe.yaml" in api.list_repo_files("alice/tiny", revision=revisions[0])


def test_private_repositories_stay_so(hub, asked):
    publish(replace(asked, private=True), token=TOKEN)
    assert seen_by_all(hub) == NOTHING
    api = hub.api()
    assert all(api.repo_info(**where).private for where in WHERE.values())
    publish(asked, token=TOKEN)  # whoever made them private decides, not a later call
    assert seen_by_all(hub) == NOTHING


def test_public_repositories_are_not_published_to_as_private(hub, asked):
    publish(asked, token=TOKEN)
    with pytest.raises(PublicationError, match="is public already"):
        publish(replace(asked, private=True), token=TOKEN)


def test_another_branch(hub, asked):
    publish(asked, token=TOKEN)
    api = hub.api()
    main = api.repo_info("alice/tiny").sha
    publish(replace(asked, revision="next", parts=["model"], num_examples=0, license="apache-2.0"), token=TOKEN)
    assert api.repo_info("alice/tiny").sha == main
    card = ModelCard.load(api.hf_hub_download("alice/tiny", "README.md", revision="next"))
    assert card.data.license == "apache-2.0"


def test_a_space_alone_pins_the_model_that_is_published(hub, asked):
    alone = replace(asked, parts=["dataset", "space"])
    with pytest.raises(PublicationError, match=r"alice/tiny, which is not published on 'main'.*--parts model space"):
        publish(alone, token=TOKEN)
    assert seen_by_all(hub) == NOTHING
    api = hub.api()
    api.create_repo(**WHERE["model"])
    with pytest.raises(PublicationError, match="not published on 'main'"):  # begun, and holds no checkpoint yet
        publish(alone, token=TOKEN)
    publish(replace(asked, parts=["model"]), token=TOKEN)
    publish(alone, token=TOKEN)
    what = json.loads(Path(api.hf_hub_download("alice/tiny", "space.json", repo_type="space")).read_text())
    assert (what["model"], what["revision"]) == ("alice/tiny", api.repo_info("alice/tiny").sha)
    with pytest.raises(PublicationError, match="not published on 'next'"):
        publish(replace(alone, revision="next"), token=TOKEN)


def test_pull_requests(hub, asked):
    with pytest.raises(PublicationError, match="nothing to open a pull request on"):
        publish(replace(asked, create_pr=True), token=TOKEN)
    assert seen_by_all(hub) == NOTHING
    api = hub.api()
    api.create_repo(**WHERE["model"])
    before = api.repo_info("alice/tiny").sha
    (published,) = publish(replace(asked, create_pr=True, parts=["model"]), token=TOKEN)
    assert published.url.endswith("/discussions/1")
    assert api.repo_info("alice/tiny").sha == before
    files = api.list_repo_files("alice/tiny", revision="refs/pr/1")
    assert {"README.md", "model.safetensors"} <= set(files)
    card = str(ModelCard.load(api.hf_hub_download("alice/tiny", "README.md", revision="refs/pr/1")))
    (revision,) = set(re.findall(r'revision="([0-9a-f]{40})"', card))
    assert "model.safetensors" in api.list_repo_files("alice/tiny", revision=revision)


def test_training_publishes_the_finished_checkpoint(hub, made, backbones, tmp_path):
    command = [
        "--task", str(made / "tiny_task"), "--model_name_or_path", backbones["llama"], "--output_dir",
        str(tmp_path / "out"), "--max_length", "300", "--max_explanation_length", "40", "--max_steps", "2",
        "--save_strategy", "no", "--lora_first_layer", "0", "--lora_r", "2", "--num_examples", "1",
        "--cls_reads=-1:decision", "--cls_bias", "false", "--lm_reading_weight", "0", "--push_to_hub", "true",
        "--hub_token", TOKEN,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--hub_model_id"):
        train(command)
    command += ["--hub_model_id", "alice/tiny"]
    with pytest.raises(PublicationError, match="state the model's with --license"):
        train(command)
    assert not (tmp_path / "out" / "model").exists()
    train([*command, "--model_license", "mit"])
    files = seen_by_all(hub)["model"]
    assert {
        "README.md",
        "model.safetensors",
        "metrics.json",
        "recipe.yaml",
        "examples.json",
        "calibration.png",
    } <= files
    api = hub.api()
    assert [commit.title for commit in api.list_repo_commits("alice/tiny")] == [
        "Publish with CLSGen",
        "initial commit",
    ]
    for name in ("metrics.json", "recipe.yaml", "README.md", "config.json"):
        text = Path(api.hf_hub_download("alice/tiny", name)).read_text()
        assert TOKEN not in text
    assert stock_form_problem(ClsGenForCausalLMAndClassification.from_pretrained(tmp_path / "out" / "model")) is None


def test_somebody_else_commits_meanwhile(hub, asked):
    publish(asked, token=TOKEN)
    hub.faults({"match": r"POST /api/models/.*/commit/main", "action": "status", "status": 412})
    with pytest.raises(PublicationError, match="Somebody else has committed"):
        publish(replace(asked, license="apache-2.0"), token=TOKEN)
