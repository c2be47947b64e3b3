"""Location of a model's files: a local folder, or a repository of the Hugging Face hub, downloaded once and cached.

The hub's usual environment variables apply: `HF_HOME` (the cache), `HF_ENDPOINT` (the server), `HF_TOKEN` (the user).
"""

from __future__ import annotations

import re
from pathlib import Path

from gptjax.types import UserError

FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Files to download: weights, configuration and tokenizer; never a pickle."""
OTHERS = ["*/*", "consolidated*"]
"""Files to ignore: copies of the weights in other formats."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder `path`, or the downloaded files of a hub repository, such as "openai-community/gpt2".

    revision  branch, tag or commit. None: the newest

    The hub's library retries failed requests a few times and resumes an interrupted download. Raises UserError for a
    name that is neither (without asking the hub if its first part is a local folder, as in a mistyped "runs/NAME"), and
    for a failed download: no library, network or permission.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or not _ID.fullmatch(str(path)):
        raise UserError(f"path: got {path}, must be a folder or a hub repository, such as openai-community/gpt2")
    if local.parent.is_dir():
        raise UserError(f"path: got {path}, must be a folder; {local.parent} exists but has no {local.name}")
    return _download(str(path), revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"path: got {name}, which is not a local folder; to download it from the hub, pip install 'gptjax[hf]'"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=FILES, ignore_patterns=OTHERS, library_name="gptjax"
            )
        )
    except errors.HFValidationError:
        raise UserError(f"path: got {name}, must be a folder or a hub repository, owner/name") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"revision: got {revision}, must be a branch, tag or commit of {name}") from None
    except Exception as error:  # also errors of the HTTP client, which differs between the library's versions
        response = getattr(_cause(error), "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.GatedRepoError) or status == 403:
            raise UserError(
                f"path: got {name}, which is gated; request access on its page, then `hf auth login` or set HF_TOKEN"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            raise UserError(
                f"path: got {name}, which is neither a local folder nor a public repository of the hub; check the "
                "name or, if it is private, `hf auth login` or set HF_TOKEN"
            ) from None
        raise UserError(
            f"path: got {name}, which is not a local folder and cannot be downloaded ({_reason(error)}); "
            "check the network and try again; the download will resume"
        ) from None


def _cause(error: BaseException) -> BaseException:
    """The root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
