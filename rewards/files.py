"""Find and load weight files from a local folder, the installed package or the hub."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rewards.hub import hub_reason

PINNED = {
    "facebook/mask2former-swin-small-coco-instance": "f77f179fc62b98f6734481ebbef5bceeb1e7f10b",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "MizzenAI/HPSv3": "4f81e3e09edd82fe3c5f636444c721b592a735ca",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}
"""Pinned commits of published weights, so that scores stay reproducible. Other repositories use their main branch."""

BUNDLED = "package:"
"""Prefix of paths inside the installed `PACKAGE`, so that settings and results contain no machine-specific folders."""

PACKAGE = "marble_lightning"
"""The package with bundled weights and prompts. It is located by name, because `rewards` does not import it."""


def resolve_path(path: str) -> str:
    """Replace `package:` and `~` by folders of this machine; return other paths and hub ids unchanged.

    Args:
        path: Folder, file or hub id, as in a setting; `package:tinyworld/weights/sd3` is a folder of the package.

    Raises:
        FileNotFoundError: if the package is not installed.

    >>> resolve_path("xswu/HPSv2")
    'xswu/HPSv2'
    """
    if not path.startswith(BUNDLED):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"A path with `{BUNDLED}` must have {PACKAGE} installed. Found none, for '{path}'.")
    return str(Path(spec.submodule_search_locations[0], path.removeprefix(BUNDLED)))


def resolve_revision(path: str, revision: str | None) -> str | None:
    """Return the revision of a hub repository: `revision` if given, else the pinned one, else None for the main branch.

    >>> resolve_revision("xswu/HPSv2", None)
    '697403c78157020a1ae59d23f111aa58ced35b0a'
    """
    return PINNED.get(path) if revision is None else revision


def find_file(owner: str, *, path: str, name: str, revision: str | None = None) -> Path:
    """Find the file `name` in a local folder or a hub repository, and download it if necessary.

    Args:
        owner: Name of the reward, for error messages.
        path: Folder or hub id, see `resolve_path`.
        name: Name of the file in that folder or repository.
        revision: Branch, tag or commit of a hub id. None: the pinned commit, see `rewards.files`.

    Raises:
        FileNotFoundError: if the file does not exist, or the hub cannot be reached.
    """
    path = resolve_path(path)
    folder = Path(path)
    if (folder / name).is_file():
        return folder / name
    try:
        if folder.exists():
            raise OSError("the folder exists, the file does not")
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(path, name, revision=resolve_revision(path, revision)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{owner}: {name} must be a file in a folder or hub repository. Found no such file in '{path}': "
            f"{hub_reason(error, path)}. A folder that contains it also works."
        ) from error


def load_weights(owner: str, file: Path) -> dict[str, Tensor]:
    """Load the named tensors of a safetensors or PyTorch file on the CPU; a PyTorch file is read with `weights_only`.

    If the file is a training checkpoint with a `state_dict`, its weights are returned.

    Raises:
        ValueError: if the file is damaged or holds other content.
    """
    content: Any
    try:
        safe = file.suffix == ".safetensors"
        content = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or "it ends too early"
        raise ValueError(
            f"{owner}: {file} must be a file of named tensors. Found one that cannot be read: {reason}. Download it again."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{owner}: {file} must hold named tensors, or those under 'state_dict'. Found something else.")
    return dict(content)


def select_prefix(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights with names that begin with `prefix`, and remove the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
