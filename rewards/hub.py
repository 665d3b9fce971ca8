"""Why something could not be had from the hub, found in what its library raises and other libraries raise from that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

DENIED = (401, 403)
"""Statuses of a hub that knows the repository and keeps it to itself."""


def hub_reason(error: BaseException, path: str) -> str:
    """The real cause and its remedy, for an error message; an error's first line where the hub had no part in it.

    Libraries say of nearly every failure that a file is missing. The first cause lies further down.

    Args:
        error: What was raised.
        path: Folder or hub id that was asked for.
    """
    if Path(path).expanduser().exists():
        return f"{_first_line(error)}. Check the folder, or download it again"
    from huggingface_hub import constants, errors

    chain = list(_causes(error))

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if found(errors.HFValidationError):
        return "there is no such folder, and a hub id is owner/name. Check the spelling, or download it and give its folder"
    if found(errors.GatedRepoError):
        return (
            f"access to it is gated. Accept its licence at {constants.ENDPOINT}/{path}, then log in (`hf auth login`) or "
            "set HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE or found(errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and the cache on this machine does not have it. Unset it, or run "
            f"`hf download {path}` where there is a network"
        )
    if found(errors.RevisionNotFoundError):
        return "the repository has no such revision. Look at `revision`"
    if found(errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private. Check the spelling, or log in (`hf auth login`)"
    if found(errors.RemoteEntryNotFoundError):
        return f"the repository is there, the file is not: {_first_line(error)}"
    if status in DENIED:
        return f"the hub refuses access (status {status}). Log in with a token that may read it (`hf auth login`)"
    if status is not None:
        return f"the hub failed (status {status}), and the cache on this machine does not have it. Try again later"
    if found(errors.LocalEntryNotFoundError, errors.HTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({_first_line(chain[-1])}), and the cache on this machine does not "
            "have it. Check the network and its proxy"
        )
    return _first_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
