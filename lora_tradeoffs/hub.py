"""The Hugging Face Hub: models and checkpoints fetched, failures as errors of one line."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import Settings, UserError

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "*run.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")
# Read with them: the template by what asks with it, the tokens where no other file lists them.
OTHER_TOKENIZER_FILES = ("chat_template.jinja", "added_tokens.json")


def fetch_config(settings: Settings, folder: Path) -> None:
    """Fetch only a Hub model's config.json. Raises UserError if that fails."""
    from huggingface_hub import hf_hub_download

    check_hub_id(settings)
    revision = _revision(settings)
    with hub_errors(f"model {settings.model}", settings.sources["model"]):
        hf_hub_download(settings.model, "config.json", revision=revision, local_dir=folder)


def fetch_model(settings: Settings, folder: Path) -> dict[str, Any]:
    """Fetch a Hub model's configuration, tokenizer and safetensors; continues a broken download."""
    from huggingface_hub import snapshot_download

    revision = _revision(settings)
    print(f"downloading {settings.model} into {settings.bases_dir} (once)", flush=True)
    with hub_errors(f"model {settings.model}", settings.sources["model"]):
        snapshot_download(
            settings.model,
            revision=revision,
            local_dir=folder,
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES, *OTHER_TOKENIZER_FILES],
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"source": settings.model, "revision": revision}


def fetch_checkpoints(name: str) -> Path:
    """Fetch a repository's adapters or weights into the Hub's cache; returns their folder.

    The weights may be at its top or in checkpoint-<step> folders.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(f"run {name}", "--runs"):
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES)))


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be a repository, <owner>/<name>."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


def check_hub_id(settings: Settings) -> None:
    """Raise UserError for a model that is given as a folder which does not exist."""
    if settings.model.startswith(("/", ".", "~")):
        raise UserError(
            f"model is {settings.model!r} ({settings.sources['model']}): no such folder"
        )


def _revision(settings: Settings) -> str:
    """A Hub model's commit. Raises UserError unless it has config.json and safetensors.

    Asked before any download: without a network, a download retries for half a minute.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"model {settings.model}", settings.sources["model"]):
        info = HfApi().model_info(settings.model)
    names = [file.rfilename for file in info.siblings or ()]
    if names and "config.json" not in names:
        raise UserError(f"model {settings.model} has no config.json on the Hub")
    if names and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"model {settings.model} has no *.safetensors on the Hub; pickled weights are not"
            " loaded, convert them first"
        )
    return info.sha


@contextlib.contextmanager
def hub_errors(what: str, source: str) -> Iterator[None]:
    """Raise a failed Hub call inside the block as `hub_error` puts it."""
    try:
        yield
    except Exception as error:
        raise hub_error(error, what, source) from None


def hub_error(error: Exception, what: str, source: str) -> Exception:
    """A failed Hub call as a UserError that names the ways out; any other error unchanged.

    `what` is "model <id>", "run <id>" or "data set <id>"; `source` is where the user named it.
    """
    from huggingface_hub import errors

    is_data = what.startswith("data set")
    page = f"https://huggingface.co/{'datasets/' if is_data else ''}{what.split()[-1]}"
    flag = {"data": "--data", "run": "--runs"}.get(what.split()[0], "--model")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # the HTTP library below huggingface_hub and datasets changes with their versions
    http = any(k.__module__.startswith(("httpx", "requests")) for k in type(error).__mro__)
    offline = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    # datasets says it in its message only, whose kind is that of an unknown repository
    if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
        problem = f"is gated: accept its licence at {page} and set HF_TOKEN in .env"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        problem = "is not on the Hub, or is private and HF_TOKEN may not read it; check the name"
    elif "HFValidationError" in kinds:
        problem = "is neither a folder nor a Hub id"
    elif getattr(getattr(error, "response", None), "status_code", None) == 401:
        problem = (
            "cannot be fetched, the Hub does not know HF_TOKEN; make one at"
            " https://huggingface.co/settings/tokens"
        )
    elif kinds & {"UnicodeEncodeError", "LocalProtocolError"}:  # their text would show the token
        problem = "cannot be fetched, HF_TOKEN has characters that no token has; copy it again"
    elif http or isinstance(error, (*offline, ConnectionError)):
        problem = (
            f"cannot be fetched, the Hub is unreachable ({type(error).__name__}); check the network"
        )
    else:
        return error
    return UserError(
        f"{what} ({source}) {problem}, or give a local folder with {flag}, or run the demo with"
        " --preset demo"
    )
