"""OCR with the real engine on rendered text, and its spelling score."""

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch

from rewards import OCR, Prompt
from rewards.ocr.reward import quoted_text, spelling_score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a sign that says "Open late"', "Open late"),
        ('"first" and "second"', "first"),
        ("a “curly” sign", None),  # as published
        ('“curly” before "straight"', "straight"),
        ('a 24" monitor showing "HELLO"', "HELLO"),
        ('5" by 7"', None),
        ('a frame of 5" by 7" that says "HELLO"', "HELLO"),
        ('a sign that says "Route 66" and "67"', "Route 66"),  # a mark after a digit may close
        ('an empty "" then a "full" one', "full"),
        ('blanks "  " only', None),
        ('5" wide', None),  # a single quotation mark opens no quotation
        ("it's 'single'", None),
        ("", None),
    ],
)
def test_quoted_text(text: str, expected: str | None) -> None:
    assert quoted_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a “curly” sign", "curly"),
        ('“curly” before "straight"', "curly"),
        ('"straight" before “curly”', "straight"),
        ("“unclosed “curly”", "curly"),
        ("a 24” monitor showing “HELLO”", "HELLO"),
        ("“ ” and “full”", "full"),
        ("nothing", None),
    ],
)
def test_option_all_includes_curly_quotes(text: str, expected: str | None) -> None:
    assert quoted_text(text, "all") == expected
    assert OCR(quotes="all").supports(Prompt(text, "ocr")) == (expected is not None)
    assert OCR(quotes="all").identity != OCR().identity


def test_long_texts_are_fast() -> None:
    """A prompt with a megabyte of opening quotes, and a target of a megabyte."""
    begin = time.perf_counter()
    assert quoted_text("“" * 10**6, "all") is quoted_text('1"' * 10**6, "all") is None
    assert spelling_score("a" * 10**6, "Hello" * 20) == 0
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("target", "read", "expected"),
    [
        ("HELLO", "HELLO", 1.0),
        ("Hello", "hELLO", 1.0),  # case is dropped
        ("Open late", "open  LATE", 1.0),  # spaces are dropped
        ("Café", "CAFE\u0301", 1.0),  # composed and decomposed
        ("e\u0301te\u0301", "ÉTÉ", 1.0),
        ("ＨＥＬＬＯ", "hello", 1.0),  # full-width
        ("STRA\u1e9eE", "straße", 1.0),  # capital and small sharp s
        ("Straße", "STRASSE", 1.0),
        ("no\u00a0break", "nobreak", 1.0),
        ("été", "ete", 1 / 3),  # a missing accent is an error
        ("cat", "concatenate", 1.0),  # substring of the text
        ("HELLO", "HELPO", 0.8),  # 1 of 5 replaced
        ("HELLO", "HELO", 0.8),  # 1 of 5 missing
        ("cat", "ct", 2 / 3),
        ("cat", "dog", 0.0),  # distance 3 of 3
        ("cat", "", 0.0),
        ("cat", "xyzxyzxyz", 0.0),  # distance 9, at most 3 counts
        ("a b", "b a", 0.0),  # "ab" and "ba" are 2 apart
    ],
)
def test_spelling_score(target: str, read: str, expected: float) -> None:
    assert spelling_score(target, read) == pytest.approx(expected)


def test_spelling_score_agrees_with_textbook_levenshtein() -> None:
    def distance(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            above, row = row, [i]
            for j, y in enumerate(b, 1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        return row[-1]

    source, cases = random.Random(0), [(200, 150)]
    for longest, number in ((40, 200), (400, 5)):
        cases += [(source.randint(1, longest), source.randint(0, longest)) for _ in range(number)]
    for length, read_length in cases:
        target = "".join(source.choices("abc", k=length))
        read = "".join(source.choices("abc", k=read_length))
        d = 0 if target in read else min(distance(target, read), len(target))
        assert spelling_score(target, read) == pytest.approx(1 - d / len(target))


def test_blank_target_is_refused() -> None:
    with pytest.raises(ValueError, match="`target` must hold at least one letter"):
        spelling_score("  ", "text")


Render = Callable[..., torch.Tensor]


@pytest.fixture(scope="module", params=[True, False], ids=["detect", "line"])
def ocr(request: pytest.FixtureRequest) -> OCR:
    reward = OCR(detect=request.param)
    reward.setup()
    return reward


def test_quotes_of_other_sources_are_ignored() -> None:
    quoted, elsewhere = Prompt('"HELLO"', "ocr"), Prompt('a still of "The Handshake"', "pickscore")
    assert [OCR().supports(prompt) for prompt in (quoted, elsewhere)] == [True, True]
    assert [OCR(sources=["ocr"]).supports(prompt) for prompt in (quoted, elsewhere)] == [True, False]
    assert not OCR(sources=["ocr"]).supports(Prompt("a sign", "ocr"))
    for wrong in ([], "ocr_hard"):
        with pytest.raises(ValueError, match="OCR: `sources` must be a list that names a prompt set"):
            OCR(sources=wrong)
    assert OCR().identity != OCR(sources=["ocr"]).identity


def test_rendered_words(ocr: OCR, render: Render) -> None:
    sign = Prompt('a sign that says "HELLO"', "ocr")
    images = torch.stack([render("HELLO"), render("HELPO"), render(""), render("HELLO")])
    scores = ocr(images=images, prompts=[sign, sign, sign, Prompt("a sign that says HELLO", "ocr")])
    # correct, one letter of five wrong, no text, no quoted target
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.8, 0.0, torch.nan]), equal_nan=True)
    assert ocr.missing == 0


def test_rendered_words_of_every_size(render: Render) -> None:
    reward = OCR(upscale_to=128)
    reward.setup()
    sign = Prompt('a sign that says "HELLO"', "ocr")
    for size in (512, 256, 64):
        images = torch.stack([render(word, size, size // 4) for word in ("HELLO", "HELPO", "")])
        assert reward(images=images, prompts=[sign] * 3).tolist() == pytest.approx([1.0, 0.8, 0.0]), size


@pytest.fixture(scope="module")
def three(render: Render) -> torch.Tensor:
    """Three images: of two workers, one reads two."""
    return torch.stack([render(word) for word in ("HELLO", "HELPO", "")])


@pytest.fixture(scope="module")
def read_by_one(ocr: OCR, three: torch.Tensor) -> list[str | None]:
    """What one engine reads in them."""
    return ocr.read(three)


def check_workers(kind: str, detect: bool, three: torch.Tensor, read_by_one: list[str | None]) -> OCR:
    shared = OCR(detect=detect, workers=2, worker_kind=kind)
    shared.setup()
    assert shared.read(three) == read_by_one
    prompts = [Prompt('"HELLO"', "ocr")] * 3
    assert shared(images=three, prompts=prompts).tolist() == pytest.approx([1.0, 0.8, 0.0])
    assert shared.state_dict() == {}
    return shared


def test_worker_threads_agree_with_one_engine(ocr: OCR, three: torch.Tensor, read_by_one: list[str | None]) -> None:
    check_workers("thread", ocr.detect, three, read_by_one)


@pytest.mark.integration
@pytest.mark.parametrize("ocr", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["detect", "line"], indirect=True)
def test_worker_processes_agree_with_one_engine(
    ocr: OCR, three: torch.Tensor, read_by_one: list[str | None], caplog: pytest.LogCaptureFixture
) -> None:
    """They also do after one of them was killed."""
    shared = check_workers("process", ocr.detect, three, read_by_one)
    os.kill(next(iter(shared._engine.pool._processes)), signal.SIGKILL)
    assert shared.read(three) == read_by_one
    assert caplog.text.count("OCR: a worker ended") == 1


def test_two_lines_are_read_in_order(render: Render) -> None:
    reward = OCR()
    reward.setup()
    image = torch.cat([render("OPEN", 256)[:, 64:192], render("LATE", 256)[:, 64:192]], dim=1)
    prompt = Prompt('a shop sign: "Open late"', "ocr")
    assert reward(images=image[None], prompts=[prompt]).item() == 1


def test_colour_order_reaches_the_engine_as_bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = OCR(detect=False)
    reward.setup()
    pixels = []
    recognise = reward._engine.engine.recognize_txt
    monkeypatch.setattr(reward._engine.engine, "recognize_txt", lambda images: (pixels.extend(images), recognise(images))[1])
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    reward(images=red, prompts=[Prompt('"red"', "ocr")])
    assert pixels[0].shape == (32, 32, 3)
    assert pixels[0][0, 0].tolist() == [0, 0, 255]


def test_small_images_are_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = OCR(detect=False, upscale_to=96)
    reward.setup()
    shapes = []
    recognise = reward._engine.engine.recognize_txt
    monkeypatch.setattr(
        reward._engine.engine,
        "recognize_txt",
        lambda images: (shapes.extend(image.shape for image in images), recognise(images))[1],
    )
    for height, width in ((32, 32), (32, 64), (128, 100)):
        reward(images=torch.ones(1, 3, height, width), prompts=[Prompt('"x"', "ocr")])
    assert shapes == [(96, 96, 3), (96, 192, 3), (128, 100, 3)]


def test_words_of_a_tiny_image(render: Render) -> None:
    reward = OCR(detect=False, upscale_to=96)
    reward.setup()
    words = ["cat", "dog", "sun", "tree"]
    small = torch.nn.functional.interpolate(
        torch.stack([render(word, 128, 46) for word in words]), size=(32, 32), mode="bicubic", antialias=True
    ).clamp(0, 1)
    scores = reward(images=small, prompts=[Prompt(f'the word "{word}"', "ocr") for word in words])
    assert scores.tolist() == [1, 1, 1, 1]


def test_images_the_engine_fails_on_are_missing(
    ocr: OCR, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, render: Render
) -> None:
    images = torch.stack([render("HELLO"), render("BAD"), render("HELPO")])
    bad = int((images[1] * 255).sum())
    engine = ocr._engine.engine

    class SometimesFails:
        def fail_on_bad(self, pixels: list) -> None:
            if any(int(image.sum()) == bad for image in pixels):
                raise RuntimeError("engine trouble")

        def __call__(self, image, **kwargs):
            self.fail_on_bad([image])
            return engine(image, **kwargs)

        def recognize_txt(self, pixels):
            self.fail_on_bad(pixels)
            return engine.recognize_txt(pixels)

    monkeypatch.setattr(ocr._engine, "engine", SometimesFails())
    before = ocr.missing
    scores = ocr(images=images, prompts=[Prompt('"HELLO"', "ocr")] * 3)
    torch.testing.assert_close(scores, torch.tensor([1.0, torch.nan, 0.8]), equal_nan=True)
    assert ocr.missing == before + 1
    assert "engine trouble" in caplog.text


def test_the_engine_is_not_in_checkpoints(ocr: OCR) -> None:
    assert ocr.state_dict() == {}
    assert list(ocr.children()) == []


def test_the_engine_is_silent(ocr: OCR, capfd: pytest.CaptureFixture[str], render: Render) -> None:
    ocr(images=render("")[None], prompts=[Prompt('"HELLO"', "ocr")])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale_to": 0}, "`upscale_to` must be >= 1 or None. Found 0"),
        ({"threads": 0}, "`threads` must be >= 1"),
        ({"workers": 0}, "`workers` must be >= 1"),
        ({"quotes": "curly"}, "`quotes` must be 'straight' or 'all'. Found 'curly'"),
        ({"worker_kind": "fibre"}, "`worker_kind` must be 'thread' or 'process'. Found 'fibre'"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OCR(**arguments)
