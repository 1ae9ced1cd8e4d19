"""The Hugging Face Hub: what is fetched from it, and its failures in one line each."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from config import Settings, UserError

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
CHECKPOINT_FILES = ("*.safetensors", "*adapter_config.json", "*config.json", "*run.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


def fetch_config(settings: Settings, folder: Path) -> None:
    """Fetch a Hub model's config.json alone. Raises UserError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    if settings.model.startswith(("/", ".", "~")):
        raise UserError(
            f"model is {settings.model!r} ({settings.sources['model']}): no such folder"
        )
    revision = _revision(settings)
    try:
        hf_hub_download(settings.model, "config.json", revision=revision, local_dir=folder)
    except Exception as error:
        raise hub_error(error, f"model {settings.model}", settings.sources["model"]) from None


def fetch_model(settings: Settings, folder: Path) -> dict[str, Any]:
    """Fetch config, tokenizer and safetensors of a Hub model; a broken download is resumed."""
    from huggingface_hub import snapshot_download

    revision = _revision(settings)
    print(f"downloading {settings.model} into {settings.bases_dir} (once)", flush=True)
    try:
        snapshot_download(
            settings.model,
            revision=revision,
            local_dir=folder,
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES],
        )
    except Exception as error:
        raise hub_error(error, f"model {settings.model}", settings.sources["model"]) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"source": settings.model, "revision": revision}


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be a repository, <owner>/<name>."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


def fetch_checkpoints(name: str) -> Path:
    """Fetch a repository's adapters or weights into the Hub's cache; their folder.

    The weights may lie at its top or in checkpoint-<step> folders.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES)))
    except Exception as error:
        raise hub_error(error, f"run {name}", "--runs") from None


def _revision(settings: Settings) -> str:
    """A Hub model's commit. Raises UserError unless it is there, with config.json and safetensors.

    Asked before any download: without a network, that would retry for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi().model_info(settings.model)
    except HFValidationError:
        raise UserError(f"model is {settings.model!r}: neither a folder nor a Hub id") from None
    except Exception as error:
        raise hub_error(error, f"model {settings.model}", settings.sources["model"]) from None
    names = [file.rfilename for file in info.siblings or ()]
    if names and "config.json" not in names:
        raise UserError(f"model {settings.model} has no config.json on the Hub")
    if names and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"model {settings.model} has no *.safetensors on the Hub; pickled weights are not"
            " loaded, convert them first"
        )
    return info.sha


def hub_error(error: Exception, what: str, source: str) -> Exception:
    """A failed Hub call as a UserError that names the ways out; another error unchanged.

    `what` is "model <id>", "run <id>" or "data set <id>".
    """
    from huggingface_hub import errors

    is_data = what.startswith("data set")
    page = f"https://huggingface.co/{'datasets/' if is_data else ''}{what.split()[-1]}"
    flag = {"data": "--data", "run": "--runs"}.get(what.split()[0], "--model")
    ways_out = f"give a local folder with {flag}, or run the demo with --preset demo"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # the HTTP library below huggingface_hub and datasets changes with their versions
    http = any(k.__module__.startswith(("httpx", "requests")) for k in type(error).__mro__)
    # datasets says it in words only; the error for an unknown repository speaks of gated ones too
    if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
        return UserError(
            f"{what} ({source}) is gated: accept its licence at {page} and set HF_TOKEN in .env;"
            f" or {ways_out}"
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return UserError(
            f"{what} ({source}) is not on the Hub, or is private and HF_TOKEN may not read it;"
            f" check the name, or {ways_out}"
        )
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return UserError(
            f"{what} ({source}) cannot be fetched, the Hub does not know HF_TOKEN; make one at"
            f" https://huggingface.co/settings/tokens, or {ways_out}"
        )
    offline = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    if http or isinstance(error, (*offline, ConnectionError)):
        return UserError(
            f"{what} ({source}) cannot be fetched, the Hub is unreachable"
            f" ({type(error).__name__}); check the network, or {ways_out}"
        )
    return error
