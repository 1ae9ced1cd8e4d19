"""Upload a run's checkpoint to the Hugging Face Hub, with a card of what was measured on it.

    python -m lora_tradeoffs.publish --runs similar_lora_r8_seed42 --to OWNER/NAME --dry-run

The repository is private unless --public is given, and nothing is uploaded before a yes. It holds
the weights, the model card, and a run.json without paths, from which the analyses know how it was
trained: python svd_analysis.py --runs OWNER/NAME.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from config import Settings, UserError, resolve_settings
from lora_tradeoffs.checkpoints import ADAPTER_CONFIG, Checkpoint, check_whole, checkpoints_in
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.files import read_json, write_json
from lora_tradeoffs.hub import hub_errors, is_hub_id

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*config.json")
DTYPES = ("bf16", "fp16", "fp32")


def choose(settings: Settings, run: str, word: str) -> Checkpoint:
    """The run's last checkpoint, or that at a step.

    Raises UserError for a run that the study does not have, and a checkpoint that is not whole.
    """
    folder = settings.runs_dir / run
    if not (folder / "run.json").is_file():
        raise UserError(f"no run {run!r} in {settings.runs_dir}")
    found = {str(c.step): c for c in checkpoints_in(folder)}
    chosen = list(found.values())[-1] if word == "last" else found.get(word)
    if chosen is None:
        raise UserError(f"{run} has no checkpoint {word}; write last, or one of {', '.join(found)}")
    check_whole(chosen)
    return chosen


def write_files(published: Any, name: str, merge: str | None, folder: Path) -> None:
    """Write all that is uploaded. Raises UserError if a file would hold what is private."""
    from lora_tradeoffs.report.model_card import model_card, without_paths

    source, is_adapter = published.checkpoint.folder, published.checkpoint.is_adapter and not merge
    if merge or not is_adapter:
        write_model(published, merge, folder)
    else:
        for path in (path for pattern in PATTERNS for path in source.glob(pattern)):
            shutil.copy(path, folder / path.name)
    for path in folder.glob("*config.json"):
        fields = without_paths(read_json(path))
        if path.name == ADAPTER_CONFIG:
            base = published.base or published.record["base"]["name"]
            fields["base_model_name_or_path"] = base
        path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    record = published_record(published.record) | {"step": published.checkpoint.step}
    write_json(folder / "run.json", record)
    card = str(model_card(published, name, is_adapter))
    (folder / "README.md").write_text(card, encoding="utf-8")
    check_private(published.settings, folder)


def write_model(published: Any, dtype: str | None, folder: Path) -> None:
    """The checkpoint as a whole model with its tokenizer: an adapter merged in fp32, then cast."""
    import torch

    from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base

    base, source = prepare_base(published.settings), published.checkpoint.folder
    load_tokenizer(base).save_pretrained(folder)
    if published.checkpoint.is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(base), source).merge_and_unload()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kinds = dict(zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
    model.to(kinds[dtype or "fp32"]).save_pretrained(folder)


def published_record(record: dict[str, Any]) -> dict[str, Any]:
    """A run.json with what the analyses read, without machine and places."""
    kept = ("record_version", "run", "config", "compared", "steps", "checkpoint_steps")
    fields = {name: record[name] for name in (*kept, "task_weights") if name in record}
    fields["base"] = {name: record["base"].get(name) for name in ("name", "digest", "files")}
    fields["data"] = {t: {"fingerprint": d["fingerprint"]} for t, d in record["data"].items()}
    versions = record.get("environment", {}).get("versions", {})
    return fields | {"environment": {"versions": versions}}


def check_private(settings: Settings, folder: Path) -> None:
    """Raise UserError if a file of text holds the token or the place of a folder."""
    places = {str(p) for p in (Path.home(), settings.output_dir, settings.data_dir)} - {"/"}
    token = os.environ.get("HF_TOKEN")
    private = {place: place for place in places} | ({"HF_TOKEN": token} if token else {})
    for path in (p for p in sorted(folder.iterdir()) if p.suffix != ".safetensors"):
        text = path.read_text(encoding="utf-8")
        for name, value in private.items():
            if value in text:
                raise UserError(f"{path.name} would hold {name}: nothing was uploaded")


def upload(folder: Path, repository: str, public: bool) -> str:
    """Create the repository if need be, and upload the folder as one commit; its address.

    Raises UserError if that fails, and for a public repository that is to be private.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(f"run {repository}", "--to"):
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise UserError(f"{repository} is public; add --public, or choose another --to")
        return api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Weights, card and run.json"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_common_arguments(parser)
    add = parser.add_argument_group("what is published, and where").add_argument
    add("--runs", required=True, metavar="RUN", help="a run of the study")
    text = "the checkpoint: last (default) or its step"
    add("--checkpoints", default="last", metavar="STEP", help=text)
    add("--to", required=True, metavar="OWNER/NAME", help="the repository on the Hub")
    text = "a merged full model in place of an adapter: merged in fp32, then cast (default bf16)"
    add("--merge", nargs="?", const="bf16", choices=DTYPES, help=text)
    add("--public", action="store_true", help="everybody may see it (default: private)")
    add("--yes", action="store_true", help="do not ask before uploading")
    text = "print the card and the files, and stop"
    add("--dry-run", action="store_true", help=text)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve_settings(args)
    if not is_hub_id(args.to):
        raise UserError(f"--to {args.to!r:.99}: write OWNER/NAME")
    checkpoint = choose(settings, args.runs, args.checkpoints)
    from lora_tradeoffs.report.model_card import Published

    with tempfile.TemporaryDirectory() as temporary:
        folder, name = Path(temporary), args.to.rpartition("/")[2]
        write_files(Published(settings, checkpoint), name, args.merge, folder)
        print((folder / "README.md").read_text(encoding="utf-8"))
        for path in sorted(folder.iterdir()):
            print(f"{path.stat().st_size / 1e6:10.3f} MB  {path.name}")
        kind = "public" if args.public else "private"
        print(f"to https://huggingface.co/{args.to} ({kind})", flush=True)
        if args.dry_run:
            return 0
        if not args.yes:
            if not sys.stdin.isatty():
                raise UserError("nothing was uploaded: add --yes to upload without being asked")
            if input("upload? [y/N] ").strip().lower() not in ("y", "yes"):
                print("nothing was uploaded")
                return 0
        print(f"uploaded: {upload(folder, args.to, args.public)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
