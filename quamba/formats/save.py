"""From a model in memory to a folder, and from a folder to the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from quamba.errors import DataError, QuambaError
from quamba.formats.artifact import INDEX, ArtifactWriter
from quamba.formats.card import LICENCE_FILES, Card, copy_files, saved_card
from quamba.formats.load import shard_of, write_generation_config
from quamba.formats.location import TOKENIZER_FILES
from quamba.formats.tokenizer import copy_tokenizer, load_tokenizer

log = logging.getLogger("quamba")

OUR_FILES = (
    *("README.md", "config.json", "generation_config.json", INDEX),
    *("embedding.safetensors", "block-*.safetensors", "head.safetensors"),
    *TOKENIZER_FILES,
    *LICENCE_FILES,
)
"""What an upload takes along."""

_HUB_KEYS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def save_model(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    tags: list[str] | None = None,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    max_shard_size: Any = None,
    safe_serialization: bool = True,
    **hub: Any,
) -> None:
    """See `QuambaLMHeadModel.save_pretrained`. config.json goes first and comes last: nothing half-written loads."""
    if unknown := sorted(hub.keys() - set(_HUB_KEYS)):
        raise TypeError(f"save_pretrained doesn't know {', '.join(unknown)}")
    if not safe_serialization:
        raise QuambaError("only safetensors are written: leave out safe_serialization=False")
    if not is_main_process:
        return
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = model.backbone.norm_f.weight.dtype
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name in model.tied:
        state.pop(name, None)
    if wrong := state.keys() ^ (model.state_dict().keys() - model.tied.keys()):
        raise QuambaError(f"state_dict is not this model's: {', '.join(sorted(wrong)[:3])} is missing or too many")
    words, card = _tokenizer(model, tokenizer), saved_card(model, config).with_tags(tags)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    writer = ArtifactWriter(folder, config)
    shards: dict[str, dict[str, Tensor]] = {shard: {} for shard in writer.shards()}
    for name, tensor in state.items():
        shards[shard_of(name)][name] = tensor
    for shard, tensors in shards.items():
        writer.write(shard, tensors)
    for left_over in set(folder.glob("block-*.safetensors")) - {folder / shard for shard in shards}:
        left_over.unlink()
    if words is not None:
        copy_tokenizer(words, folder)
    if model.origin is not None:
        copy_files(model.origin.path, folder, LICENCE_FILES)
    if model.generation_config is not None:
        write_generation_config(model.generation_config, folder)
    card.write(folder)
    writer.finish()
    if push_to_hub:
        hub.setdefault("repo_id", folder.absolute().name)
        upload(folder, **hub)


def push_model(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    tags: list[str] | None = None,
    max_shard_size: Any = None,
    **hub: Any,
) -> Any:
    """See `QuambaLMHeadModel.push_to_hub`."""
    if unknown := sorted(hub.keys() - set(_HUB_KEYS)):
        raise TypeError(f"push_to_hub doesn't know {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="quamba-push-") as scratch:
        save_model(model, scratch, tokenizer=tokenizer, tags=tags)
        return upload(Path(scratch), repo_id, **hub)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Put an artifact's files into a repository of the hub, made if it isn't there, in one commit. Returns its CommitInfo.

    Blocks that an earlier, deeper model left in the repository are deleted. A README.md there stays if somebody else wrote
    it. Raises QuambaError if the hub refuses or can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        theirs = _card_there(api, repo_id)
        ours = Card.read(folder)
        if ours is not None:
            ours.at(repo_id).write(folder)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a model quantized with quamba",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(OUR_FILES),
            ignore_patterns=["README.md"] if theirs is not None and not theirs.is_ours else None,
            delete_patterns=["block-*.safetensors"],
        )
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ": log in with `hf auth login`, or give token=" if status in (401, 403) else ""
        raise QuambaError(f"the hub refused {repo_id} ({str(error).splitlines()[0]}){advice}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise QuambaError(f"{repo_id} could not be uploaded: {type(error).__name__}: {error}") from error


def _card_there(api: Any, repo_id: str) -> Card | None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Card.read(Path(api.hf_hub_download(repo_id, "README.md")).parent)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer to write: the given one, or that of the folder which the model was loaded from."""
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    if tokenizer is not None:
        return load_tokenizer(str(tokenizer), str(tokenizer))
    if model.origin is None or not model.origin.path.is_dir():
        return None
    try:
        return load_tokenizer(str(model.origin.path), required=False)
    except DataError as error:
        log.warning("no tokenizer is written: %s", error)
        return None
