"""Where a model's files are: a folder here, or a repository of the Hugging Face hub, downloaded once and kept.

`HF_HOME` says where downloads are kept, `HF_ENDPOINT` where from, `HF_TOKEN` by whom, as always with the hub.
"""

from __future__ import annotations

import re
from pathlib import Path

from gptjax.types import UserError

FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Weights, configuration and tokenizer; never a pickle."""
OTHERS = ["*/*", "consolidated*"]
"""Copies of the weights in other forms, which some repositories hold too."""
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder `path`, or else the files of the hub's repository of that name, such as "openai-community/gpt2", at
    `revision` (a branch, tag or commit; None: the newest). The library repeats requests that fail a few times, and goes
    on with a download where it broke off.

    Raises UserError for a name that is neither, at once where it begins with a folder that is here, as a mistyped
    "runs/NAME" does; and for a download that fails: no library, network or permission.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or not _ID.fullmatch(str(path)):
        raise UserError(f"path: got {path}, must be a folder or a repository of the hub, such as openai-community/gpt2")
    if local.parent.is_dir():
        raise UserError(f"path: got {path}, must be a folder; {local.parent} is one and has no {local.name}")
    return _download(str(path), revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"path: got {name}, which is no folder here; to download it from the hub, pip install 'gptjax[hf]'"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=FILES, ignore_patterns=OTHERS, library_name="gptjax"
            )
        )
    except errors.HFValidationError:
        raise UserError(f"path: got {name}, must be a folder or a repository of the hub, owner/name") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"revision: got {revision}, must be a branch, tag or commit of {name}") from None
    except Exception as error:  # of the library's HTTP client too, which differs between its versions
        response = getattr(_cause(error), "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, errors.GatedRepoError) or status == 403:
            raise UserError(
                f"path: got {name}, which its owner shows only to some; ask for access on its page, "
                "then `hf auth login` or set HF_TOKEN"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            raise UserError(
                f"path: got {name}, which is neither a folder here nor a public repository of the hub; check the "
                "name, or, if it is private, `hf auth login` or set HF_TOKEN"
            ) from None
        raise UserError(
            f"path: got {name}, which is no folder here and can't be downloaded ({_reason(error)}); "
            "check the network and try again, the part that came is kept"
        ) from None


def _cause(error: BaseException) -> BaseException:
    """The first error of those that led to this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
