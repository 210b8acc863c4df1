"""Models by the id that they have on the Hugging Face hub: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.

Beside such a name and `upload`, only data/fetch.py makes this package use the network.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from vlkd_jax.config import HUB
from vlkd_jax.errors import UserError
from vlkd_jax.hf.files import (
    CONFIG,
    GENERATION,
    INDEX,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_FILES,
    WEIGHTS,
)

PATTERNS = (
    *(CONFIG, GENERATION, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES, "README.md"),
    *(WEIGHTS, INDEX, "model-*.safetensors", OPEN_CLIP, OPEN_CLIP_WEIGHTS),
    *(f"clip_tokenizer/{name}" for name in TOKENIZER_FILES),  # of an export
)
"""What is downloaded: no code and no pickles."""


def _parts(name: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", name)
    if not match:
        raise UserError(f"{name}: not the name of a model on the hub; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return match[1], match[2]


def pinned(name: str) -> str:
    """`name` with the commit that its revision, the main one by default, means now.

    Raises:
      UserError: no such model or revision; the hub cannot be reached and no copy is in its cache.
    """
    model, _ = _parts(name)
    return f"{HUB}{model}@{snapshot(name).name}"


@functools.cache
def snapshot(name: str) -> Path:
    """The directory of a model in the hub's local cache, downloaded if need be. Raises UserError as `pinned`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model, revision = _parts(name)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS)))
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: {model} has no revision {revision}; leave @{revision} out for the newest") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: no such model on the hub, or it asks for a login (hf auth login)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: not in the hub's local cache, and the hub gives no answer ({reason}); once there is a network, "
            f"hf download {model} --local-dir DIR brings it, then give DIR"
        ) from error


def upload(directory: Path, repository: str, private: bool) -> str:
    """Uploads a directory to `OWNER/NAME`, which is made if need be; returns its address. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=directory).repo_url)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repository}: cannot be uploaded ({reason}); hf auth login, or another name") from error
