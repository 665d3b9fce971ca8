"""GenEval as a reward, with its rules and a detector."""

import pytest
import torch

from rewards import Detection, Detector, GenEval, Prompt, Verdict


def detection(label: str) -> Detection:
    return Detection(label, 0.95, (40, 40, 60, 60))


# Two red cats, left brighter than right; a bright left half only; nothing.
IMAGES = torch.zeros(3, 3, 8, 8)
IMAGES[0, 0], IMAGES[0, 1:] = 1.0, 0.6
IMAGES[1, 1, :, :4], IMAGES[1, (0, 2), :, :4] = 1.0, 0.8
TWO_CATS = Prompt("two red cats", "geneval", {"include": [{"class": "cat", "count": 2, "color": "red"}]})


@pytest.mark.parametrize(
    ("score", "expected"),
    # two red cats; one green cat instead of two: number 0.5, then a 0; no cat: 0, then a 0
    [("partial", [1, 0.25, 0]), ("strict", [1, 0, 0]), ("accuracy", [1, 0, 0])],
)
def test_reward_returns_the_chosen_score(BrightBlobs: type[Detector], score: str, expected: list[float]) -> None:
    reward = GenEval(BrightBlobs(), score)
    reward.setup()
    assert reward(images=IMAGES, prompts=[TWO_CATS] * 3).tolist() == expected


def test_accuracy_and_strict_differ(BrightBlobs: type[Detector]) -> None:
    one_cat = Prompt("a cat", "geneval", {"include": [{"class": "cat", "count": 1}]})
    scores = {kind: GenEval(BrightBlobs(), kind)(images=IMAGES[:1], prompts=[one_cat]).item() for kind in KINDS}
    assert scores == {"partial": 0, "strict": 0, "accuracy": 1}  # two cats instead of one


KINDS = ("partial", "strict", "accuracy")


def test_verdicts_have_all_three_scores(BrightBlobs: type[Detector]) -> None:
    verdicts = GenEval(BrightBlobs()).verdicts(images=IMAGES, prompts=[TWO_CATS] * 3)
    assert verdicts == [Verdict(True, True, 1.0), Verdict(False, False, 0.25), Verdict(False, False, 0.0)]


def test_thresholds_are_arguments(BrightBlobs: type[Detector]) -> None:
    counting = Prompt("two cats", "geneval", {"tag": "counting", "include": [{"class": "cat", "count": 2}]})
    # Both cats score about 0.73, below the 0.9 of counting.
    assert GenEval(BrightBlobs())(images=IMAGES[:1], prompts=[counting]).item() == 0
    assert GenEval(BrightBlobs(), counting_threshold=0.7)(images=IMAGES[:1], prompts=[counting]).item() == 1
    assert GenEval(BrightBlobs(), threshold=0.8)(images=IMAGES[:1], prompts=[TWO_CATS]).item() == 0
    assert GenEval(BrightBlobs(), max_objects=1)(images=IMAGES[:1], prompts=[TWO_CATS]).item() == 0.25


def test_a_threshold_below_the_detectors_min_score_is_refused(BrightBlobs: type[Detector]) -> None:
    detector = BrightBlobs()
    detector.min_score = 0.5
    GenEval(detector, threshold=0.5)
    with pytest.raises(ValueError, match=r"`threshold` must be at least the detector's `min_score`, 0\.5.* Found 0\.4"):
        GenEval(detector, threshold=0.4)


def test_detector_is_loaded_and_frozen(BrightBlobs: type[Detector]) -> None:
    class Learned(BrightBlobs):
        def setup(self) -> None:
            self.layer = torch.nn.Linear(2, 2)

    reward = GenEval(Learned())
    assert not list(reward.parameters())
    reward.setup()
    assert [parameter.requires_grad for parameter in reward.parameters()] == [False, False]


def test_a_detector_without_colours_is_refused() -> None:
    class Colourless(Detector):
        def detect(self, images):
            return [[detection("cat"), detection("cat")] for _ in images]

    with pytest.raises(ValueError, match="Colourless: .*have one. Found none on a 'cat'"):
        GenEval(Colourless())(images=IMAGES[:1], prompts=[TWO_CATS])


def test_a_detector_can_override_colours() -> None:
    class ByPixel(Detector):
        def detect(self, images):
            return [[detection("cat"), detection("cat")] for _ in images]

        def colours(self, image, detections):
            return [("red", "green", "blue")[int(image.mean(dim=(1, 2)).argmax())] for _ in detections]

    # number 1 and colour 1; number 1 and colour 0
    assert GenEval(ByPixel())(images=IMAGES[:2], prompts=[TWO_CATS] * 2).tolist() == [1, 0.5]


def test_a_detector_must_return_one_list_per_image() -> None:
    class Short(Detector):
        def detect(self, images):
            return []

    with pytest.raises(ValueError, match="`Short.detect` must return one list per image. Found 0 for 3 images"):
        GenEval(Short())(images=IMAGES, prompts=[TWO_CATS] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "exact"}, "`score` must be one of partial, strict, accuracy. Found 'exact'"),
        ({"threshold": 1.2}, r"`threshold` must be in \[0, 1\]. Found 1.2"),
        ({"counting_threshold": -0.1}, r"`counting_threshold` must be in \[0, 1\]"),
        ({"max_objects": 0}, "`max_objects` must be >= 1. Found 0"),
    ],
)
def test_arguments_are_checked(BrightBlobs: type[Detector], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenEval(BrightBlobs(), **arguments)


@pytest.mark.parametrize(
    ("clauses", "message"),
    [
        ({"include": [{"class": "dog", "count": 1}]}, "every class that prompts name. Found dog.* it knows cat"),
        ({"exclude": [{"class": "dog", "count": 1}]}, "every class that prompts name. Found dog"),
        (
            {"include": [{"class": "cat", "count": 1, "color": "Red"}]},
            "every colour that prompts name. Found Red.* blue, green",
        ),
        ({"tag": ["counting"]}, r"`tag` must be a text. Found \['counting'\]"),
    ],
)
def test_prompts_that_can_never_be_met_are_refused(BrightBlobs: type[Detector], clauses: dict, message: str) -> None:
    detector = BrightBlobs()
    detector.classes, detector.colour_names = frozenset({"cat"}), frozenset({"red", "green", "blue"})
    metadata = {"include": [{"class": "cat", "count": 1, "color": "red"}], **clauses}
    with pytest.raises(ValueError, match=message):
        GenEval(detector).check_prompt(Prompt("a cat", "geneval", metadata))
