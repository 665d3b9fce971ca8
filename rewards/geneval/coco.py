"""COCO's 80 classes under the names that GenEval's prompts use, whatever a checkpoint calls them."""

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
"""In COCO's order."""

OTHER_NAMES = {
    # COCO's own, too short to paint an image from
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Pascal VOC's, which transformers' converted checkpoints have
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""What else the classes are called."""


def coco_names(owner: str, id2label: Mapping[str, str], source: str) -> list[str]:
    """GenEval's name of each of a model's outputs.

    Args:
        owner: name of the detector, for error messages.
        id2label: of the model's config.json, from the number of an output, as text, to the name of its class.
        source: folder or hub id, for error messages.

    Raises:
        ValueError: if these are not COCO's 80 classes.
    """
    found = [id2label.get(str(index)) for index in range(len(id2label))]
    names = [OTHER_NAMES.get(name, name) for name in found if name is not None]
    if len(names) != len(COCO_CLASSES) or set(names) != set(COCO_CLASSES):
        odd = next((name for name in names if name not in COCO_CLASSES), None)
        raise ValueError(
            f"{owner}: `id2label` in config.json of '{source}' must name the {len(COCO_CLASSES)} classes of COCO instances. "
            f"Found {len(id2label)} classes{'' if odd is None else f', one of them {odd!r}'}. Use a model trained on COCO "
            "instance segmentation, not on panoptic COCO, Cityscapes or ADE20K."
        )
    return names
