"""Loading CLIP towers from local folders or the hub, in transformers' format or open_clip's; each model once a process."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from rewards.checkpoints import check_finite
from rewards.clip.open_clip import VIT_H_14, architecture, renamed
from rewards.clip.tower import Centre, CLIPTower, Preprocess, Resize
from rewards.files import find_file, load_weights, pinned, resolve_path
from rewards.hub import hub_reason

_models: WeakValueDictionary[tuple[str | None, ...], Any] = WeakValueDictionary()
"""Models in use, by where they come from, so that rewards with the same tower share it."""


def load_tower(
    owner: str,
    *,
    path: str,
    file: str | None = None,
    processor_path: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    fit: Literal["crop", "pad"] = "crop",
    resize: Resize = "bicubic",
    centre: Centre = "floor",
    clean: Callable[[str], str] = str,
) -> CLIPTower:
    """Load a CLIP model, its tokenizer and its preprocessing from a local folder or a hub id.

    A model that another reward of this process has loaded in the same precision is shared with it.

    Args:
        owner: name of the reward, for error messages.
        path: folder or hub id of a transformers-format `CLIPModel`, or of the open_clip `file`.
        file: name of a file of open_clip weights; its model is described by an open_clip_config.json beside it, or else is
            a ViT-H-14. None: transformers' format.
        processor_path: folder or hub id of tokenizer and preprocessor_config.json. None: `path`.
        revision: branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: "float32", "bfloat16" or "float16".
        fit: how images become square, see `Preprocess`.
        resize: how they are resized, see `Preprocess`.
        centre: where they are cropped, see `Preprocess`.
        clean: what becomes of a text before it is tokenised.

    Raises:
        FileNotFoundError: if a file is missing or the hub cannot be reached.
        ValueError: if the folder holds another model, lacks weights, or its files do not fit together.
    """
    from transformers import CLIPTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    path, source = resolve_path(path), resolve_path(processor_path or path)
    # A revision names a commit of one repository, so it must not be looked up in another.
    pin = _pin(source, revision if source == path else None)
    key = (path, file, revision, dtype)
    model = _models.get(key)
    if model is None:
        model = _load(owner, source, path, file, revision, getattr(torch, dtype))
    with _explained(owner, path, source, source):
        numbers, _ = ImageProcessingMixin.get_image_processor_dict(source, **pin)
        tokenizer = CLIPTokenizer.from_pretrained(source, **pin)
    vocabulary, image_size = model.config.text_config.vocab_size, model.config.vision_config.image_size
    if len(tokenizer) != vocabulary:  # transformers builds an all but empty tokenizer where the files are missing
        raise ValueError(
            f"{owner}: the tokenizer in '{source}' must have the {vocabulary} tokens of the model in '{path}'. "
            f"Found {len(tokenizer)}. Put vocab.json and merges.txt, or tokenizer.json, of that model there."
        )
    preprocess = replace(Preprocess.from_config(numbers, fit), resize=resize, centre=centre)
    if preprocess.crop != image_size:
        raise ValueError(
            f"{owner}: preprocessor_config.json in '{source}' must crop to the {image_size} pixels of the model in "
            f"'{path}'. Found {preprocess.crop}. Use the preprocessor of that model."
        )
    _models[key] = model
    return CLIPTower(model, tokenizer, preprocess, clean)


def _load(owner: str, source: str, path: str, file: str | None, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import CLIPModel, PretrainedConfig

    pin = _pin(path, revision)
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if file is not None:
        weights = find_file(owner, path=path, name=file, revision=revision)
        beside = weights.with_name("open_clip_config.json")
        description = json.loads(beside.read_text())["model_cfg"] if beside.exists() else VIT_H_14
        state = renamed(load_weights(owner, weights))
        try:
            loaded: Any = CLIPModel.from_pretrained(None, config=architecture(description), state_dict=state, **options)
        except RuntimeError as error:
            raise ValueError(
                f"{owner}: {weights} must hold the weights of the model that {beside.name} beside it describes, or else "
                "of a ViT-H-14. Found weights of other shapes. Put open_clip's description of the model there."
            ) from error
    else:
        with _explained(owner, path, source, path):
            config, _ = PretrainedConfig.get_config_dict(path, **pin)
            if not config:  # what transformers returns where a folder has no config.json
                raise OSError("there is no config.json")
        if config.get("model_type") != "clip":
            raise ValueError(
                f"{owner}: `path` must hold a CLIPModel (model_type 'clip' in config.json). Found "
                f"{config.get('model_type')!r} in '{path}'. Point it to a transformers-format CLIPModel folder."
            )
        with _explained(owner, path, source, path):
            loaded = CLIPModel.from_pretrained(path, **options, **pin)
    model, report = loaded
    if report["missing_keys"]:  # transformers would leave them random, and a random judge gives scores all the same
        raise ValueError(
            f"{owner}: the checkpoint in '{path}' must hold every weight of its CLIPModel. Found "
            f"{len(report['missing_keys'])} missing, such as {min(report['missing_keys'])}. Download it again."
        )
    model = in_precision(model, dtype)
    check_finite(owner, model, path)
    return model


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A `CLIPModel` with weights in a precision, and exp(logit_scale) as a float32 buffer `scale`, as `CLIPTower` wants it.

    Args:
        model: with weights in float32.
        dtype: what they become.
    """
    scale = model.logit_scale.detach().exp()  # half precision would round a scale of 100 to 98.9
    model.to(dtype).register_buffer("scale", scale, persistent=False)
    return model


def _pin(path: str, revision: str | None) -> dict[str, Any]:
    found = pinned(path, revision)
    return {} if found is None else {"revision": found}


@contextmanager
def _explained(owner: str, path: str, source: str, asked: str) -> Iterator[None]:
    """Say what a folder must hold instead of what the library tripped over; `asked` is the one of both that is read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{owner}: `path` must be a folder or hub id of a transformers-format CLIPModel (config.json and weights), "
            "and the processor's one (`processor_path` if given, else `path`) must hold tokenizer files and "
            f"preprocessor_config.json. Found '{path}' and '{source}': {hub_reason(error, asked)}."
        ) from error


def check_dtype(owner: str, dtype: str) -> str:
    """`dtype`, if a CLIP tower can be loaded in it.

    Raises:
        ValueError: if it is not "float32", "bfloat16" or "float16".
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{owner}: `dtype` must be float32, bfloat16 or float16. Found {dtype!r}. Choose one of them.")
    return dtype
