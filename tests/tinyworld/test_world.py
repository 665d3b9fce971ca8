"""Scenes, captions and faults, tested with the rewards that score them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from marble_lightning.tinyworld import ColourBlobs
from marble_lightning.tinyworld.captions import GENEVAL, OPENINGS, SHARES, draw_captioned, held_out, with_confetti
from marble_lightning.tinyworld.degradations import CONTENT, SHORTCUTS, TECHNICAL, change_colour, distort, miscount, wash_out
from marble_lightning.tinyworld.detector import recognise
from marble_lightning.tinyworld.recipe.images import tensor, to_unit
from marble_lightning.tinyworld.recipe.preferences import TASTES, Traits, draw_pairs
from marble_lightning.tinyworld.recipe.prompt_files import write_prompt_files
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer
from marble_lightning.tinyworld.scenes import SHAPES, SIZE, Scene, Sign, Thing, draw
from rewards import OCR, GenEval, Prompt


def render(scene: Scene) -> torch.Tensor:
    return to_unit(tensor(draw(scene)))


@pytest.mark.parametrize("source", SHARES)
def test_the_same_seed_draws_the_same_scene(source):
    one, other = (draw_captioned(random.Random(3), source) for _ in range(2))
    assert one == other
    np.testing.assert_array_equal(draw(one.scene), draw(other.scene))


def test_train_and_held_out_captions_do_not_overlap():
    rng = random.Random(0)
    assert all(held_out(draw_captioned(rng, test=True).caption) for _ in range(100))
    assert not any(held_out(draw_captioned(rng).caption) for _ in range(100))


@pytest.mark.parametrize("maker", GENEVAL, ids=lambda maker: maker.__name__)
def test_clean_scenes_satisfy_their_metadata(maker):
    """The published rules with `ColourBlobs` accept at least 57 of 60 scenes of each tag."""
    rng = random.Random(1)
    examples = [maker(rng, OPENINGS[0]) for _ in range(60)]
    assert {example.metadata["tag"] for example in examples} == {maker.__name__}
    prompts = [Prompt(example.caption, "geneval", example.metadata) for example in examples]
    images = torch.stack([render(example.scene) for example in examples])
    scores = GenEval(ColourBlobs(), score="strict")(images=images, prompts=prompts)
    assert scores.sum() >= 57


@pytest.mark.parametrize(("fault", "limit"), [(change_colour, 0.0), (distort, 0.35), (miscount, 0.6)])
def test_content_faults_lower_the_geneval_score(fault, limit):
    rng = random.Random(2)
    examples = [GENEVAL[5](rng, OPENINGS[0]) for _ in range(60)]  # color_attr: the caption names every colour
    images = torch.stack([render(fault(example, rng)) for example in examples])
    prompts = [Prompt(example.caption, "geneval", example.metadata) for example in examples]
    assert GenEval(ColourBlobs(), score="strict")(images=images, prompts=prompts).mean() <= limit


def test_washed_out_colours_are_not_detected():
    rng = random.Random(2)
    images = [to_unit(tensor(wash_out(draw(draw_captioned(rng, "geneval").scene), rng))) for _ in range(30)]
    assert sum(map(len, ColourBlobs().detect(torch.stack(images)))) <= 15


def test_signs_are_legible():
    """The mean OCR score of clean signs is at least 0.95."""
    rng = random.Random(4)
    examples = [draw_captioned(rng, "ocr") for _ in range(60)]
    ocr = OCR(upscale_to=96, detect=False)
    ocr.setup()
    images = torch.stack([render(example.scene) for example in examples])
    scores = ocr(images=images, prompts=[Prompt(example.caption, "ocr") for example in examples])
    assert scores.mean() >= 0.95


def test_confetti_costs_counting_and_spelling():
    """Forty-eight pieces: what one reward may like costs two others."""
    rng = random.Random(6)

    def scores(reward, examples, confetti):
        scenes = [replace(example.scene, confetti=confetti, seed=seed) for seed, example in enumerate(examples)]
        prompts = [Prompt(example.caption, example.source, example.metadata) for example in examples]
        return reward(images=torch.stack([render(scene) for scene in scenes]), prompts=prompts).mean()

    ocr, geneval = OCR(upscale_to=96, detect=False), GenEval(ColourBlobs(), score="strict")
    ocr.setup()
    signs = [draw_captioned(rng, "ocr") for _ in range(30)]
    counts = [GENEVAL[2](rng, OPENINGS[0]) for _ in range(30)]
    assert scores(ocr, signs, 0) - scores(ocr, signs, 48) > 0.15
    assert scores(geneval, counts, 0) - scores(geneval, counts, 48) > 0.4


def test_pieces_of_confetti_are_no_things():
    assert ColourBlobs().detect(render(Scene("mist", confetti=8, seed=3))[None]) == [[]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [14, 22, 30])
def test_shapes_are_recognised_at_every_size(shape, side):
    scene = Scene("mist", (Thing(shape, "red", 32.2, 31.7, side, side),))
    (detection,) = ColourBlobs().detect(render(scene)[None])[0]
    assert (detection.label, detection.colour) == (shape, "red")
    assert detection.score > 0.9
    assert abs((detection.box[0] + detection.box[2]) / 2 - 32.2) < 1
    assert detection.mask.sum() > 60


def test_a_long_bar_is_not_a_square():
    assert recognise(np.ones((4, 20), dtype=bool))[1] < 0.3


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="must be one of circle, square, triangle, star. Found 'blob'"):
        draw(Scene("mist", (Thing("blob", "red", 16, 16, 9, 9),)))


def test_an_unknown_class_is_refused():
    prompt = Prompt("a photo of a bench", "geneval", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]})
    with pytest.raises(ValueError, match=r"Found bench, which ColourBlobs does not: it knows circle, square"):
        GenEval(ColourBlobs())(images=torch.zeros(1, 3, 32, 32), prompts=[prompt])


@pytest.mark.parametrize("source", ["ocr", "pickscore"])
@pytest.mark.parametrize("fault", [*CONTENT, *SHORTCUTS, *TECHNICAL], ids=lambda fault: fault.__name__)
def test_a_fault_changes_the_image(fault, source):
    rng = random.Random(5)
    for _ in range(10):
        example = draw_captioned(rng, source)
        clean = draw(example.scene)
        spoiled = fault(clean, rng) if fault in TECHNICAL else draw(fault(example, rng))
        assert spoiled.shape == (SIZE, SIZE, 3)
        assert (spoiled != clean).any()


def test_confetti_is_on_the_whole_image():
    rng = random.Random(7)
    example = draw_captioned(rng, "ocr")
    changed = draw(with_confetti(example.scene, rng)) != draw(example.scene)
    assert isinstance(example.scene.sign, Sign)
    assert changed[14:50].any()
    assert changed[:14].any()


def test_shares_of_people_follow_the_difference_of_traits():
    pairs = draw_pairs(20, seed=0)
    taste = Traits(content=-3.0, technical=-1.0, shortcut=-2.0, ornament=0.5)
    for index in range(20):
        sums = [sum(a * b for a, b in zip(traits[index].tolist(), taste, strict=True))
                for traits in (pairs.first_traits, pairs.second_traits)]  # fmt: skip
        assert pairs.log_odds(taste)[index] == pytest.approx(sums[0] - sums[1], abs=1e-5)


def test_tastes_disagree_about_ornament_and_agree_about_shortcuts():
    assert TASTES["hpsv2"].ornament > 0 > TASTES["pickscore"].ornament
    assert all(taste.shortcut <= min(taste) for taste in TASTES.values())


def test_prompt_files_are_the_bundled_ones(tmp_path):
    from marble_lightning.tinyworld import PROMPTS
    from marble_lightning.tinyworld.train import PROMPT_SEED

    write_prompt_files(tmp_path, PROMPT_SEED)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(files) == 6
    assert all((tmp_path / file).read_text() == (PROMPTS / file).read_text() for file in files)


def test_the_vocabulary_is_the_same_every_time(tmp_path):
    """So a recipe that resumes reads the token numbers that it has trained with, and a word of the captions is one token."""
    one, other = (train_tokenizer(tmp_path / name, seed=0) for name in "ab")
    assert one.get_vocab() == other.get_vocab()
    assert one.tokenize("a photo of a red circle") == [f"{word}</w>" for word in ("a", "photo", "of", "a", "red", "circle")]
