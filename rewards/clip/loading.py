"""Load CLIP towers from local folders or the hub, in transformers or open_clip format; each model once per process."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from rewards.checkpoints import check_finite
from rewards.clip.open_clip import VIT_H_14, architecture, rename_weights
from rewards.clip.tower import Centre, CLIPTower, Preprocess, Resize
from rewards.files import find_file, load_weights, resolve_path, resolve_revision
from rewards.hub import hub_reason

VIT_H_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Hub id of tokenizer and preprocessor_config.json that the published weights of PickScore and HPSv2 were trained with."""

_models: WeakValueDictionary[tuple[str | None, ...], Any] = WeakValueDictionary()
"""Loaded models by path, file, revision and dtype, so that rewards with the same tower share it."""


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

    Rewards of one process share a model with the same weights and precision.

    Args:
        owner: Name of the reward, for error messages.
        path: Folder or hub id of a transformers-format `CLIPModel`, or of the open_clip `file`.
        file: Name of a file with open_clip weights. An open_clip_config.json in the same folder describes the model;
            without one it is a ViT-H-14. None: transformers format.
        processor_path: Folder or hub id of tokenizer and preprocessor_config.json. None: `path`.
        revision: Branch, tag or commit of `path`. None: the pinned commit, see `rewards.files`.
        dtype: "float32", "bfloat16" or "float16".
        fit: How images become square, see `Preprocess`.
        resize: How images are resized, see `Preprocess`.
        centre: Where images are cropped, see `Preprocess`.
        clean: Function applied to each text before tokenization.

    Raises:
        FileNotFoundError: if a file is missing or the hub cannot be reached.
        ValueError: if the folder holds another kind of model, weights are missing, or its files do not fit together.
    """
    from transformers import CLIPTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    path, source = resolve_path(path), resolve_path(processor_path or path)
    # A revision belongs to one repository, so it does not apply to another one.
    pin = _pin(source, revision if source == path else None)
    key = (path, file, revision, dtype)
    model = _models.get(key)
    if model is None:
        model = _load(owner, source, path, file, revision, getattr(torch, dtype))
    with _explain_errors(owner, path, source, source):
        processor_config, _ = ImageProcessingMixin.get_image_processor_dict(source, **pin)
        tokenizer = CLIPTokenizer.from_pretrained(source, **pin)
    vocabulary, image_size = model.config.text_config.vocab_size, model.config.vision_config.image_size
    if len(tokenizer) != vocabulary:  # transformers builds a nearly empty tokenizer if the files are missing
        raise ValueError(
            f"{owner}: the tokenizer in '{source}' must have the {vocabulary} tokens of the model in '{path}'. "
            f"Found {len(tokenizer)}. Put vocab.json and merges.txt, or tokenizer.json, of that model there."
        )
    preprocess = replace(Preprocess.from_config(processor_config, fit), resize=resize, centre=centre)
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
        config_file = weights.with_name("open_clip_config.json")
        description = json.loads(config_file.read_text())["model_cfg"] if config_file.exists() else VIT_H_14
        state = rename_weights(load_weights(owner, weights))
        try:
            loaded: Any = CLIPModel.from_pretrained(None, config=architecture(description), state_dict=state, **options)
        except RuntimeError as error:
            raise ValueError(
                f"{owner}: {weights} must hold the weights of the model that {config_file.name} in its folder describes, or "
                "of a ViT-H-14 without that file. Found weights of other shapes. Put open_clip's configuration there."
            ) from error
    else:
        with _explain_errors(owner, path, source, path):
            config, _ = PretrainedConfig.get_config_dict(path, **pin)
            if not config:  # transformers returns an empty config if the folder has no config.json
                raise OSError("there is no config.json")
        if config.get("model_type") != "clip":
            raise ValueError(
                f"{owner}: `path` must hold a CLIPModel (model_type 'clip' in config.json). Found "
                f"{config.get('model_type')!r} in '{path}'. Point it to a transformers-format CLIPModel folder."
            )
        with _explain_errors(owner, path, source, path):
            loaded = CLIPModel.from_pretrained(path, **options, **pin)
    model, report = loaded
    if report["missing_keys"]:  # transformers would keep random weights, and the model would still return scores
        raise ValueError(
            f"{owner}: the checkpoint in '{path}' must hold every weight of its CLIPModel. Found "
            f"{len(report['missing_keys'])} missing, such as {min(report['missing_keys'])}. Download it again."
        )
    model = convert_precision(model, dtype)
    check_finite(owner, model, path)
    return model


def convert_precision(model: Any, dtype: torch.dtype) -> Any:
    """Convert a `CLIPModel` to a precision, and add exp(logit_scale) as a float32 buffer `scale` for `CLIPTower`.

    Args:
        model: Model with weights in float32.
        dtype: Number format of the converted weights.
    """
    scale = model.logit_scale.detach().exp()  # half precision would round a scale of 100 to 98.9
    model.to(dtype).register_buffer("scale", scale, persistent=False)
    return model


def _pin(path: str, revision: str | None) -> dict[str, Any]:
    pinned_revision = resolve_revision(path, revision)
    return {} if pinned_revision is None else {"revision": pinned_revision}


@contextmanager
def _explain_errors(owner: str, path: str, source: str, accessed: str) -> Iterator[None]:
    """Replace a library's error by one that says what the folders must hold; `accessed` is the folder being read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{owner}: `path` must be a folder or hub id of a transformers-format CLIPModel (config.json and weights), "
            "and the processor's folder (`processor_path` if given, else `path`) must hold tokenizer files and "
            f"preprocessor_config.json. Found '{path}' and '{source}': {hub_reason(error, accessed)}."
        ) from error


def check_dtype(owner: str, dtype: str) -> str:
    """Return `dtype` if CLIP weights can be loaded in it.

    Raises:
        ValueError: if it is not "float32", "bfloat16" or "float16".
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{owner}: `dtype` must be float32, bfloat16 or float16. Found {dtype!r}. Choose one of them.")
    return dtype
