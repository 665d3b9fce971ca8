"""The rules of the GenEval benchmark as pure functions of detections: correctness, strictness and a partial score.

Source: Ghosh, Hajishirzi, Schmidt, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment",
2023, section 3. The partial score is that of Flow-GRPO (2025), without its double count of failed relations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.geneval.detectors import Detection
from rewards.texts import excerpt

Box = tuple[float, float, float, float]

RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
OVERLAP_SHARE = 0.1
"""Minimum distance of two box centres for a relation, as a share of the summed box sizes."""


@dataclass(frozen=True)
class Verdict:
    """The scores of one image.

    Args:
        correct: The benchmark's accuracy: enough objects, the best ones with the right colour and position, none excluded.
        strict: Exactly the requested number of objects, all with the right colour and position; exclusions are ignored.
        partial: Mean over the parts of the request, 1 if all are met. Each surplus object costs 1 / count, so many surplus
            objects make the score negative.
    """

    correct: bool
    strict: bool
    partial: float


def keep(detections: Sequence[Detection], threshold: float, max_objects: int = MAX_OBJECTS) -> dict[str, list[Detection]]:
    """Group detections with score > `threshold` by label, best first, at most `max_objects` per label.

    >>> [d.score for d in keep([Detection("cat", s, (0, 0, 1, 1)) for s in (0.3, 0.4, 0.9)], 0.3)["cat"]]
    [0.9, 0.4]
    """
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        group = kept.setdefault(detection.label, []) if detection.score > threshold else []
        if len(group) < max_objects:
            group.append(detection)
    return kept


def relations(box: Box, other: Box) -> set[str]:
    """Return the relations of `box` to `other`: any of left of, right of, above, below.

    With off = centre(box) - centre(other), kept = sign(off) * max(|off| - 0.1 (size + other size), 0) per axis. If both
    |kept| are below 1e-3, there is no relation. Otherwise a relation holds if |kept| of its axis exceeds half of the
    Euclidean distance |off|.

    >>> relations((0, 0, 10, 10), (50, 0, 60, 10))
    {'left of'}
    """

    def kept_offset(axis: int) -> tuple[float, float]:
        offset = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        sizes = abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis])
        return offset, math.copysign(max(abs(offset) - OVERLAP_SHARE * sizes, 0.0), offset)

    (off_x, kept_x), (off_y, kept_y) = kept_offset(0), kept_offset(1)
    if abs(kept_x) < 1e-3 and abs(kept_y) < 1e-3:
        return set()
    distance = math.hypot(off_x, off_y)
    dx, dy = kept_x / distance, kept_y / distance
    conditions = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in conditions.items() if holds}


def evaluate(
    metadata: Mapping[str, Any],
    detections: Sequence[Detection],
    colours_fn: Callable[[Sequence[Detection]], list[str]],
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    max_objects: int = MAX_OBJECTS,
) -> Verdict:
    """Evaluate one image from its detections.

    The partial score is the mean of these terms. Every clause of `include` adds 1 - |count - found| / count. If the number
    is wrong, a clause that also specifies a colour or a position adds one 0. If the number is right, a colour adds
    1 - |count - matches| / count and a position adds 1 or 0.

    Args:
        metadata: `include` = [{class, count, color?, position? = [relation, index of an earlier clause]}], optionally
            `exclude` = [{class, count}] and `tag`; spelled as in the benchmark's files.
        detections: All candidates of the image, without a threshold.
        colours_fn: Returns the colour names of detections of one class. It is called only if a clause specifies a colour and
            enough objects are detected.
        threshold: Score above which a detection counts, in [0, 1].
        counting_threshold: The same if `tag` is "counting".
        max_objects: Maximum number of objects kept per class.

    Raises:
        ValueError: if `include` is empty or not a list, a clause has no class or no count >= 1, or a position is not one of
            the four relations to an earlier clause.
    """
    check(metadata)
    objects = keep(detections, counting_threshold if metadata.get("tag") == "counting" else threshold, max_objects)
    # Objects of each clause, or None if the clause was not met: later clauses may specify a position relative to them.
    matched: list[list[Detection] | None] = []
    strictly_matched: list[list[Detection] | None] = []
    parts: list[float] = []
    for clause in metadata["include"]:
        count, candidates = clause["count"], objects.get(clause["class"], [])
        best = candidates[:count]
        enough, exact = len(candidates) >= count, len(candidates) == count
        matches = colours_fn(best).count(clause["color"]) if "color" in clause and enough else count
        correct_position = strict_position = True
        if "position" in clause:
            relation, target = clause["position"]
            correct_position = relation_holds(best, relation, matched[target])
            strict_position = relation_holds(best, relation, strictly_matched[target])
        matched.append(best if enough and matches == count and correct_position else None)
        strictly_matched.append(best if exact and matches == count and strict_position else None)

        parts.append(1 - abs(count - len(candidates)) / count)
        if not exact:
            parts += [0.0] if "color" in clause or "position" in clause else []
            continue
        if "color" in clause:
            parts.append(1 - abs(count - matches) / count)
        if "position" in clause:
            parts.append(float(strict_position))
    excluded = any(len(objects.get(clause["class"], [])) >= clause["count"] for clause in metadata.get("exclude", []))
    return Verdict(
        correct=None not in matched and not excluded,
        strict=None not in strictly_matched,
        partial=sum(parts) / len(parts),
    )


def relation_holds(objects: Sequence[Detection], relation: str, targets: Sequence[Detection] | None) -> bool:
    """Whether each object has `relation` to each target; False if the clause of the targets was not met (None)."""
    if targets is None:
        return False
    return all(relation in relations(one.box, target.box) for one in objects for target in targets)


def check(metadata: Mapping[str, Any]) -> None:
    """Reject metadata that the rules cannot evaluate.

    Raises:
        ValueError: as `evaluate`.
    """
    if not metadata.get("include"):
        raise ValueError(
            f"GenEval: metadata must list at least one object under `include`. Found {excerpt(dict(metadata))}. "
            "Add a clause such as {'class': 'cat', 'count': 1}."
        )
    if not isinstance(metadata.get("tag", ""), str):
        raise ValueError(f"GenEval: `tag` must be a text. Found {excerpt(metadata['tag'])}. Correct the prompt file.")
    for name in ("include", "exclude"):
        if not isinstance(clauses := metadata.get(name, []), Sequence) or isinstance(clauses, str):
            raise ValueError(
                f"GenEval: `{name}` must be a list of clauses. Found {excerpt(clauses)}. Correct the prompt file."
            )
        for clause in clauses:
            _check_clause(clause)
    for index, clause in enumerate(metadata["include"]):
        if "position" not in clause:
            continue
        match clause["position"]:
            case [str(relation), int(target)] if relation in RELATIONS:
                if not 0 <= target < index:
                    raise ValueError(
                        f"GenEval: the position of clause {index} must refer to an earlier clause. "
                        f"Found {excerpt(clause['position'])}. List the object it is relative to first."
                    )
            case position:
                raise ValueError(
                    f"GenEval: the position of clause {index} must be a pair of one of {', '.join(RELATIONS)} and the index "
                    f"of an earlier clause. Found {excerpt(position)}. Correct the prompt file."
                )


def _check_clause(clause: Any) -> None:
    has_class = isinstance(clause, Mapping) and isinstance(clause.get("class"), str)
    if not has_class or not isinstance(clause.get("count"), int) or clause["count"] < 1:
        raise ValueError(
            f"GenEval: each clause must have a `class` and a `count` >= 1. Found {excerpt(clause)}. Correct the prompt file."
        )
    if not isinstance(clause.get("color", ""), str):
        raise ValueError(
            f"GenEval: `color` must be the name of a colour. Found {excerpt(clause['color'])} in {excerpt(clause)}. "
            "Correct the prompt file."
        )
