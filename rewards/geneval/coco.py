"""COCO's 80 classes under GenEval's names, and the other names that checkpoints use."""

from collections.abc import Mapping

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""GenEval's names of COCO's classes, in COCO's order."""

OTHER_NAMES = {
    # COCO's names, too short for a prompt
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Pascal VOC's names, used in transformers' converted checkpoints
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Other names of the classes, mapped to GenEval's names."""


def coco_names(owner: str, id2label: Mapping[str, str], source: str) -> list[str]:
    """Return GenEval's class name for each output of a model.

    Args:
        owner: Name of the detector, for error messages.
        id2label: Class names in the model's config.json, by the output's number as text.
        source: Folder or hub id, for error messages.

    Raises:
        ValueError: if the classes are not COCO's 80 classes.
    """
    labels = [id2label.get(str(index)) for index in range(len(id2label))]
    names = [OTHER_NAMES.get(name, name) for name in labels if name is not None]
    if len(names) != len(COCO_CLASSES) or set(names) != set(COCO_CLASSES):
        unknown = next((name for name in names if name not in COCO_CLASSES), None)
        raise ValueError(
            f"{owner}: `id2label` in config.json of '{source}' must name the {len(COCO_CLASSES)} classes of COCO instances. "
            f"Found {len(id2label)} classes{'' if unknown is None else f', one of them {unknown!r}'}. Use a model trained "
            "on COCO instance segmentation, not on panoptic COCO, Cityscapes or ADE20K."
        )
    return names
