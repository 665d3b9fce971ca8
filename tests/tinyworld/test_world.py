"""Scenes, captions and faults, held against the judges that read them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from marble_lightning.tinyworld import ColourBlobs
from marble_lightning.tinyworld.captions import GENEVAL, OPENINGS, SHARES, captioned, held_out
from marble_lightning.tinyworld.degradations import CONTENT, TECHNICAL, spoil, wrong_colour
from marble_lightning.tinyworld.detector import recognise
from marble_lightning.tinyworld.recipe.images import tensor, to_unit
from marble_lightning.tinyworld.recipe.prompt_files import write_prompt_files
from marble_lightning.tinyworld.scenes import SHAPES, Scene, Sign, Thing, draw
from rewards import OCR, GenEval, Prompt


def picture(scene: Scene) -> torch.Tensor:
    return to_unit(tensor(draw(scene)))


@pytest.mark.parametrize("source", SHARES)
def test_the_same_seed_draws_the_same_scene(source):
    one, other = (captioned(random.Random(3), source) for _ in range(2))
    assert one == other
    np.testing.assert_array_equal(draw(one.scene), draw(other.scene))


def test_train_and_held_out_captions_never_meet():
    rng = random.Random(0)
    assert all(held_out(captioned(rng, test=True).caption) for _ in range(100))
    assert not any(held_out(captioned(rng).caption) for _ in range(100))


@pytest.mark.parametrize("maker", GENEVAL, ids=lambda maker: maker.__name__)
def test_clean_scenes_satisfy_their_own_metadata(maker):
    """The published rules over the colour blobs accept what was drawn: at least 57 of 60 of each tag."""
    rng = random.Random(1)
    shown = [maker(rng, OPENINGS[0]) for _ in range(60)]
    assert {each.metadata["tag"] for each in shown} == {maker.__name__}
    prompts = [Prompt(each.caption, "geneval", each.metadata) for each in shown]
    scores = GenEval(ColourBlobs(), score="strict")(
        images=torch.stack([picture(each.scene) for each in shown]), prompts=prompts
    )
    assert scores.sum() >= 57


@pytest.mark.parametrize(("fault", "most"), [(wrong_colour, 0.0), (CONTENT[1], 0.35), (TECHNICAL[2], 0.2)])
def test_faults_are_seen_by_the_detector(fault, most):
    rng = random.Random(2)
    shown = [GENEVAL[5](rng, OPENINGS[0]) for _ in range(60)]  # color_attr names every colour
    images = torch.stack([to_unit(tensor(spoil(each, rng, [fault]))) for each in shown])
    prompts = [Prompt(each.caption, "geneval", each.metadata) for each in shown]
    assert GenEval(ColourBlobs(), score="strict")(images=images, prompts=prompts).mean() <= most


def test_signs_are_legible():
    """The real engine reads the real scenes: mean score at least 0.95."""
    rng = random.Random(4)
    shown = [captioned(rng, "ocr") for _ in range(60)]
    engine = OCR(upscale_to=96, detect=False)
    engine.setup()
    scores = engine(
        images=torch.stack([picture(each.scene) for each in shown]), prompts=[Prompt(s.caption, "ocr") for s in shown]
    )
    assert scores.mean() >= 0.95


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [9, 13, 18])
def test_shapes_are_recognised_at_every_size(shape, side):
    scene = Scene("grey", (Thing(shape, "red", 16.2, 15.7, side, side),))
    (found,) = ColourBlobs().detect(picture(scene)[None])[0]
    assert (found.label, found.colour) == (shape, "red")
    assert found.score > 0.9
    assert abs((found.box[0] + found.box[2]) / 2 - 16.2) < 1
    assert found.mask.sum() > 20


def test_a_long_bar_is_no_square():
    assert recognise(np.ones((4, 20), dtype=bool))[1] < 0.3


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="must be one of circle, square, triangle, cross. Found 'blob'"):
        draw(Scene("grey", (Thing("blob", "red", 16, 16, 9, 9),)))


def test_a_class_it_does_not_know_is_refused_not_scored_zero():
    prompt = Prompt("a photo of a bench", "geneval", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]})
    with pytest.raises(ValueError, match=r"Found bench, which ColourBlobs does not: it knows circle, cross"):
        GenEval(ColourBlobs())(images=torch.zeros(1, 3, 32, 32), prompts=[prompt])


def test_a_fault_changes_the_picture():
    rng = random.Random(5)
    sign = captioned(rng, "ocr")
    assert isinstance(sign.scene.sign, Sign)
    for shown in (sign, captioned(rng, "pickscore")):
        for fault in (*TECHNICAL, *CONTENT):
            assert (fault(shown.scene, rng) != draw(shown.scene)).any(), fault.__name__


def test_prompt_files_are_the_bundled_ones(tmp_path):
    from marble_lightning.tinyworld import PROMPTS
    from marble_lightning.tinyworld.train import PROMPT_SEED

    write_prompt_files(tmp_path, PROMPT_SEED)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(files) == 6
    assert all((tmp_path / file).read_text() == (PROMPTS / file).read_text() for file in files)
