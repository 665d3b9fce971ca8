"""Find the real cause of a failed hub download in the chain of exceptions that libraries raise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

DENIED = (401, 403)
"""HTTP statuses with which the hub refuses access to an existing repository."""


def hub_reason(error: BaseException, path: str) -> str:
    """Return the real cause and its remedy for an error message, or the error's first line if the hub is not the cause.

    Libraries report nearly every failure as a missing file. The real cause is deeper in the chain of exceptions.

    Args:
        error: The raised exception.
        path: The requested folder or hub id.
    """
    if Path(path).expanduser().exists():
        return f"{_first_line(error)}. Check the folder, or download it again"
    from huggingface_hub import constants, errors

    chain = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    status = next((cause.response.status_code for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    if caused_by(errors.HFValidationError):
        return "there is no such folder, and a hub id is owner/name. Check the spelling, or download it and give its folder"
    if caused_by(errors.GatedRepoError):
        return (
            f"access to it is gated. Accept its licence at {constants.ENDPOINT}/{path}, then log in (`hf auth login`) or "
            "set HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE or caused_by(errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and the cache on this machine does not have it. Unset it, or run "
            f"`hf download {path}` on a machine with a network"
        )
    if caused_by(errors.RevisionNotFoundError):
        return "the repository has no such revision. Check `revision`"
    if caused_by(errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private. Check the spelling, or log in (`hf auth login`)"
    if caused_by(errors.RemoteEntryNotFoundError):
        return f"the repository exists, the file does not: {_first_line(error)}"
    if status in DENIED:
        return f"the hub refuses access (status {status}). Log in with a token that may read it (`hf auth login`)"
    if status is not None:
        return f"the hub failed (status {status}), and the cache on this machine does not have it. Try again later"
    if caused_by(errors.LocalEntryNotFoundError, errors.HTTPError):
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
