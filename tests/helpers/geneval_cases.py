"""Detections and their GenEval scores, derived by hand."""

from rewards import Detection

LEFT, MIDDLE, RIGHT = (0, 40, 20, 60), (40, 40, 60, 60), (80, 40, 100, 60)
TOP, BOTTOM = (40, 0, 60, 20), (40, 80, 60, 100)


def det(label: str, score: float = 0.95, box: tuple = MIDDLE, colour: str | None = None) -> Detection:
    """A detection, in the middle of the image by default."""
    return Detection(label, score, box, colour=colour)


def clause_of(label: str, count: int = 1, **extra: object) -> dict:
    return {"class": label, "count": count, **extra}


def colours(detections):
    return [detection.colour for detection in detections]


RED_CAT = [clause_of("cat", color="red")]
TWO_RED_CATS = [clause_of("cat", 2, color="red")]
# "a photo of a dog right of a cat": the published files list the target first.
DOG_RIGHT_OF_CAT = [clause_of("cat"), clause_of("dog", position=["right of", 0])]
DOG_LEFT_OF_CAT = [clause_of("cat"), clause_of("dog", position=["left of", 0])]
DOG_ABOVE_CAT = [clause_of("cat"), clause_of("dog", position=["above", 0])]
DOG_BELOW_CAT = [clause_of("cat"), clause_of("dog", position=["below", 0])]
ATTRIBUTES = [clause_of("cat", color="red"), clause_of("dog", color="blue")]

# name: tag, include, exclude, detections, correct, strict, partial
CASES = {
    # single_object: thresholds are exclusive, so 0.3 is not enough.
    "there": ("single_object", [clause_of("cat")], [], [det("cat")], True, True, 1.0),
    "not there": ("single_object", [clause_of("cat")], [], [], False, False, 0.0),
    "other class": ("single_object", [clause_of("cat")], [], [det("dog")], False, False, 0.0),
    "at the threshold": ("single_object", [clause_of("cat")], [], [det("cat", 0.3)], False, False, 0.0),
    "above the threshold": ("single_object", [clause_of("cat")], [], [det("cat", 0.31)], True, True, 1.0),
    # At least one is correct, exactly one is strict: 1 - |1 - 2| / 1 = 0.
    "one too many": ("single_object", [clause_of("cat")], [], [det("cat"), det("cat")], True, False, 0.0),
    # 1 - |1 - 4| / 1 = -2: surplus objects make it negative.
    "three too many": ("single_object", [clause_of("cat")], [], [det("cat")] * 4, True, False, -2.0),
    # 20 candidates are cut to 16: 1 - 15 = -14.
    "at most sixteen": ("single_object", [clause_of("cat")], [], [det("cat")] * 20, True, False, -14.0),
    # 1 - 14 and 1 - 15: the seventeenth is the first that is dropped.
    "fifteen": ("single_object", [clause_of("cat")], [], [det("cat")] * 15, True, False, -13.0),
    "sixteen": ("single_object", [clause_of("cat")], [], [det("cat")] * 16, True, False, -14.0),
    "seventeen": ("single_object", [clause_of("cat")], [], [det("cat")] * 17, True, False, -14.0),
    # two_object: mean over two clauses.
    "both": ("two_object", [clause_of("cat"), clause_of("dog")], [], [det("cat"), det("dog")], True, True, 1.0),
    "one of both": ("two_object", [clause_of("cat"), clause_of("dog")], [], [det("dog")], False, False, 0.5),
    "neither of both": ("two_object", [clause_of("cat"), clause_of("dog")], [], [det("cow")], False, False, 0.0),
    # cats 1 - |1 - 2| / 1 = 0, dogs 1.
    "one of both twice": (
        "two_object",
        [clause_of("cat"), clause_of("dog")],
        [],
        [det("cat")] * 2 + [det("dog")],
        True,
        False,
        0.5,
    ),
    "unsure of one": (
        "two_object",
        [clause_of("cat"), clause_of("dog")],
        [],
        [det("cat"), det("dog", 0.3)],
        False,
        False,
        0.5,
    ),
    # counting: threshold 0.9, and the file excludes count + 1.
    "two": ("counting", [clause_of("cat", 2)], [clause_of("cat", 3)], [det("cat")] * 2, True, True, 1.0),
    "one of two": ("counting", [clause_of("cat", 2)], [clause_of("cat", 3)], [det("cat")], False, False, 0.5),
    # Three are at least two, but the exclusion fails accuracy; strict fails on the number; 1 - 1/2.
    "three for two": ("counting", [clause_of("cat", 2)], [clause_of("cat", 3)], [det("cat")] * 3, False, False, 0.5),
    # The second is below 0.9, so only one counts.
    "unsure second": (
        "counting",
        [clause_of("cat", 2)],
        [clause_of("cat", 3)],
        [det("cat"), det("cat", 0.9)],
        False,
        False,
        0.5,
    ),
    "unsure third": ("counting", [clause_of("cat", 2)], [], [det("cat")] * 2 + [det("cat", 0.8)], True, True, 1.0),
    "sure enough": ("counting", [clause_of("cat", 2)], [clause_of("cat", 3)], [det("cat", 0.91)] * 2, True, True, 1.0),
    "sure third": ("counting", [clause_of("cat", 2)], [clause_of("cat", 3)], [det("cat", 0.91)] * 3, False, False, 0.5),
    # Of four: 1 - 1/4 for three and for five, 1 - 4/4 for none, 1 - 5/4 for nine.
    "four": ("counting", [clause_of("cat", 4)], [clause_of("cat", 5)], [det("cat")] * 4, True, True, 1.0),
    "three of four": ("counting", [clause_of("cat", 4)], [clause_of("cat", 5)], [det("cat")] * 3, False, False, 0.75),
    "five for four": ("counting", [clause_of("cat", 4)], [clause_of("cat", 5)], [det("cat")] * 5, False, False, 0.75),
    "none of four": ("counting", [clause_of("cat", 4)], [clause_of("cat", 5)], [], False, False, 0.0),
    "nine for four": ("counting", [clause_of("cat", 4)], [clause_of("cat", 5)], [det("cat")] * 9, False, False, -0.25),
    # Without the tag the third one counts.
    "third without tag": ("colors", [clause_of("cat", 2)], [], [det("cat")] * 2 + [det("cat", 0.8)], True, False, 0.5),
    # A detected class of `exclude`: accuracy fails; strict and partial use `include` only.
    "excluded": ("two_object", [clause_of("cat")], [clause_of("dog", 1)], [det("cat"), det("dog")], False, True, 1.0),
    "fewer than excluded": (
        "two_object",
        [clause_of("cat")],
        [clause_of("dog", 2)],
        [det("cat"), det("dog")],
        True,
        True,
        1.0,
    ),
    # colors: parts are number and colour.
    "right colour": ("colors", RED_CAT, [], [det("cat", colour="red")], True, True, 1.0),
    "wrong colour": ("colors", RED_CAT, [], [det("cat", colour="blue")], False, False, 0.5),
    "colour of nothing": ("colors", RED_CAT, [], [], False, False, 0.0),
    # Only the best `count` have their colour checked: the better one is red, so accurate; the number is wrong: 0 and 0.
    "best is red": (
        "colors",
        RED_CAT,
        [],
        [det("cat", 0.5, colour="blue"), det("cat", 0.6, colour="red")],
        True,
        False,
        0.0,
    ),
    "best is blue": (
        "colors",
        RED_CAT,
        [],
        [det("cat", 0.5, colour="red"), det("cat", 0.6, colour="blue")],
        False,
        False,
        0.0,
    ),
    # Number 1, colour 1 - |2 - 1| / 2 = 0.5: mean 0.75.
    "one of two red": (
        "colors",
        TWO_RED_CATS,
        [],
        [det("cat", colour="red"), det("cat", colour="blue")],
        False,
        False,
        0.75,
    ),
    # Number 0.5 and a single 0 for the colour: mean 0.25.
    "one red for two": ("colors", TWO_RED_CATS, [], [det("cat", colour="red")], False, False, 0.25),
    # The best two are red. Number 1 - 1/2 and one 0 for the colour.
    "three red for two": ("colors", TWO_RED_CATS, [], [det("cat", colour="red")] * 3, True, False, 0.25),
    # Number 1 - 1/1 and one 0.
    "two red for one": ("colors", RED_CAT, [], [det("cat", colour="red")] * 2, True, False, 0.0),
    "unsure red": ("colors", RED_CAT, [], [det("cat", 0.3, colour="red")], False, False, 0.0),
    # Number 1, colour 1 - |2 - 0| / 2.
    "none of two red": ("colors", TWO_RED_CATS, [], [det("cat", colour="blue")] * 2, False, False, 0.5),
    # color_attr: (1 + 1 + 1 + 1) / 4 and (1 + 0 + 1 + 1) / 4.
    "attributes": (
        "color_attr",
        ATTRIBUTES,
        [],
        [det("cat", colour="red"), det("dog", colour="blue")],
        True,
        True,
        1.0,
    ),
    "swapped attributes": (
        "color_attr",
        ATTRIBUTES,
        [],
        [det("cat", colour="blue"), det("dog", colour="red")],
        False,
        False,
        0.5,
    ),
    "one attribute": (
        "color_attr",
        ATTRIBUTES,
        [],
        [det("cat", colour="pink"), det("dog", colour="blue")],
        False,
        False,
        0.75,
    ),
    # The cat's number and colour, the dog's number and one 0: (1 + 1 + 0 + 0) / 4.
    "no second attribute": ("color_attr", ATTRIBUTES, [], [det("cat", colour="red")], False, False, 0.5),
    # Cats 1 - 1/1 and one 0, the dog 1 and 1.
    "attribute twice": (
        "color_attr",
        ATTRIBUTES,
        [],
        [det("cat", colour="red")] * 2 + [det("dog", colour="blue")],
        True,
        False,
        0.5,
    ),
    # position: parts are number of cats, number of dogs, relation.
    "right of": ("position", DOG_RIGHT_OF_CAT, [], [det("cat", box=LEFT), det("dog", box=RIGHT)], True, True, 1.0),
    "left of": ("position", DOG_LEFT_OF_CAT, [], [det("cat", box=RIGHT), det("dog", box=LEFT)], True, True, 1.0),
    "above": ("position", DOG_ABOVE_CAT, [], [det("cat", box=BOTTOM), det("dog", box=TOP)], True, True, 1.0),
    "below": ("position", DOG_BELOW_CAT, [], [det("cat", box=TOP), det("dog", box=BOTTOM)], True, True, 1.0),
    "above instead": ("position", DOG_BELOW_CAT, [], [det("cat", box=BOTTOM), det("dog", box=TOP)], False, False, 2 / 3),
    # Centres 8 apart leave 8 - 4 = 4, which is half of 8 and not more; 9 apart leave 5.
    "hardly right of": (
        "position",
        DOG_RIGHT_OF_CAT,
        [],
        [det("cat"), det("dog", box=(48, 40, 68, 60))],
        False,
        False,
        2 / 3,
    ),
    "just right of": ("position", DOG_RIGHT_OF_CAT, [], [det("cat"), det("dog", box=(49, 40, 69, 60))], True, True, 1.0),
    # Below and right of it.
    "diagonal": ("position", DOG_RIGHT_OF_CAT, [], [det("cat"), det("dog", box=(80, 80, 100, 100))], True, True, 1.0),
    # The better dog is on the right. Cats 1, dogs 1 - 1/1, one 0.
    "dog on either side": (
        "position",
        DOG_RIGHT_OF_CAT,
        [],
        [det("cat"), det("dog", 0.9, RIGHT), det("dog", 0.8, LEFT)],
        True,
        False,
        1 / 3,
    ),
    # The cat does not count: cats 0, dogs 1, relation 0.
    "unsure target": ("position", DOG_RIGHT_OF_CAT, [], [det("cat", 0.3), det("dog", box=RIGHT)], False, False, 1 / 3),
    # A failed relation is one 0, not a 0 and a 1: (1 + 1 + 0) / 3.
    "left instead": (
        "position",
        DOG_RIGHT_OF_CAT,
        [],
        [det("cat", box=RIGHT), det("dog", box=LEFT)],
        False,
        False,
        2 / 3,
    ),
    "same place": ("position", DOG_RIGHT_OF_CAT, [], [det("cat"), det("dog")], False, False, 2 / 3),
    # No cat: its number is 0, the dog's 1, and there is nothing to be right of: (0 + 1 + 0) / 3.
    "no target": ("position", DOG_RIGHT_OF_CAT, [], [det("dog", box=RIGHT)], False, False, 1 / 3),
    # No dog: cat 1, dog 0, and one more 0 for the position.
    "nothing to place": ("position", DOG_RIGHT_OF_CAT, [], [det("cat", box=LEFT)], False, False, 1 / 3),
    # Two cats, the better one on the left. Accuracy keeps only that one, so it holds. With strict, the cat clause fails, so
    # the dog has no target: cats 1 - 1/1 = 0, dog 1, relation 0.
    "two targets": (
        "position",
        DOG_RIGHT_OF_CAT,
        [],
        [det("cat", 0.9, LEFT), det("cat", 0.5, RIGHT), det("dog", box=MIDDLE)],
        True,
        False,
        1 / 3,
    ),
    # Each dog must be right of each cat; the second dog is not. cats 1, dogs 1, relation 0.
    "relation to all": (
        "position",
        [clause_of("cat"), clause_of("dog", 2, position=["right of", 0])],
        [],
        [det("cat", box=MIDDLE), det("dog", box=RIGHT), det("dog", box=LEFT)],
        False,
        False,
        2 / 3,
    ),
    # The target has the wrong colour, so it is no target: number 1, colour 0, dog 1, relation 0.
    "target of wrong colour": (
        "position",
        [clause_of("cat", color="red"), clause_of("dog", position=["right of", 0])],
        [],
        [det("cat", box=LEFT, colour="blue"), det("dog", box=RIGHT)],
        False,
        False,
        0.5,
    ),
    # Colour and place in one clause: cat 1, dog 1, colour 0, relation 1.
    "colour and place": (
        "position",
        [clause_of("cat"), clause_of("dog", color="red", position=["above", 0])],
        [],
        [det("cat", box=BOTTOM), det("dog", box=TOP, colour="blue")],
        False,
        False,
        0.75,
    ),
    # Wrong number with colour and place: cat 1, dog 0, and one 0 for both together: 1/3.
    "missing with colour and place": (
        "position",
        [clause_of("cat"), clause_of("dog", color="red", position=["above", 0])],
        [],
        [det("cat", box=BOTTOM)],
        False,
        False,
        1 / 3,
    ),
}
