"""Upload of a folder to the model hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils import validate_repo_id

REMEDIES = {
    401: "the hub does not accept the token. Log in again (`hf auth login`), or set HF_TOKEN",
    403: "the token may not write there. Create one with the role `write`, for an account that may write there, and log in "
    "with it (`hf auth login`)",
    404: "there is no such owner, or the token may not see it. Check the spelling",
}
"""Causes and remedies by HTTP status."""


def check_repository(name: str) -> None:
    """Check the name of a repository.

    Args:
        name: OWNER/NAME.

    Raises:
        ValueError: It is not OWNER/NAME.
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ValueError(f"`push_to_hub` must be OWNER/NAME. Found {name!r}: {error}") from error
    if name.count("/") != 1:
        raise ValueError(f"`push_to_hub` must be OWNER/NAME. Found {name!r}; put your user or organization before it.")


def check_access() -> None:
    """Check that the hub is allowed and that there is a token, before anything is written.

    Raises:
        ValueError: Offline mode is on, or there is no token.
    """
    remedy = "or add --dry-run, which writes the folder and uploads nothing"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"`push_to_hub` must reach the hub. Found HF_HUB_OFFLINE set; unset it, {remedy}.")
    if get_token() is None:
        raise ValueError(
            f"`push_to_hub` must have a token that may write. Found none; log in (`hf auth login`), set HF_TOKEN, {remedy}."
        )


def upload(folder: Path, files: Sequence[Path], repository: str) -> str:
    """Upload files of a folder, in one commit; the repository is created if it does not exist.

    Args:
        folder: The folder.
        files: The files in it that are uploaded.
        repository: OWNER/NAME.

    Returns:
        URL of the repository.

    Raises:
        ValueError: The hub cannot be reached, or refuses. The folder stays.
    """
    api, names = HfApi(), [file.relative_to(folder).as_posix() for file in files]
    try:
        url = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="Upload by MARBLE Lightning"
        )
    except (errors.HTTPError, OSError, ValueError) as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        reason = REMEDIES.get(status or 0) or (
            f"the hub failed (status {status}). Try again later"
            if status
            else f"{constants.ENDPOINT} cannot be reached. Check the network and its proxy"
        )
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`push_to_hub` must be a repository that you may write to. Found {repository}: {reason} ({first_line}). The "
            f"folder is complete; `hf upload {repository} {folder}` uploads it."
        ) from error
    return url
