"""Specifics of each method, and its configuration."""

import re

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import balancers
from balancers import MARBLE, Balancer, FixedWeights, PCGrad, WeightedSum, min_norm_weights
from balancers.options import GradientOptions
from tests.helpers import ROOT

NAMES = ("clip", "ocr", "pick")
CONFIGS = ROOT / "configs" / "balancers"
METHOD_CONFIGS = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "cadence_marble.yaml"})


def bound(balancer, names=NAMES):
    balancer.bind(names)
    return balancer


def test_weighted_sum_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, torch.nan, 4.0], [1.0, 2.0, 4.0], [torch.nan, 0.0, torch.inf]])
    applies = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1]], dtype=torch.bool)
    balancer = bound(WeightedSum({"pick": 3.0}))
    merged = balancer.merge_rewards(rewards, applies)
    expected = torch.tensor([[(1 + 2 + 12) / 5], [13 / 4], [13 / 4], [torch.nan]])
    torch.testing.assert_close(merged, expected, equal_nan=True)
    assert balancer.names == ("sum",)
    assert balancer.reward_names == NAMES
    assert balancer.loss_weights.tolist() == [1.0]


def test_plain_sum_counts_rewards_that_do_not_apply_as_zero():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, torch.nan, 4.0], [1.0, torch.nan, 4.0], [5.0, 2.0, torch.inf]])
    applies = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    merged = bound(WeightedSum({"pick": 3.0}, reduction="sum")).merge_rewards(rewards, applies)
    expected = torch.tensor([[1 + 2 + 12.0], [torch.nan], [1 + 12.0], [torch.nan]])  # the second has a failed reward
    torch.testing.assert_close(merged, expected, equal_nan=True)
    with pytest.raises(ValueError, match="'mean' or 'sum'. Found 'max'"):
        WeightedSum(reduction="max")


def test_fixed_weights_are_constant_and_sum_to_one():
    balancer = bound(FixedWeights(weights={"ocr": 2.0}))
    assert not balancer.needs_gradients
    assert balancer.loss_weights.tolist() == [0.25, 0.5, 0.25]
    assert bound(FixedWeights()).loss_weights.tolist() == pytest.approx([1 / 3] * 3)


def test_normalized_fixed_weights_with_an_inactive_reward():
    balancer = bound(FixedWeights(weights={"ocr": 2.0}, normalize=True))
    balancer.begin_step(1)
    balancer.add_gradients(torch.diag(torch.tensor([1.0, 3.0, 0.0])))
    merged = balancer.solve(lambda x: x)
    torch.testing.assert_close(merged, torch.tensor([0.25 * 2, 0.5 * 2, 0.0]))
    torch.testing.assert_close(balancer.loss_weights, torch.tensor([0.25 * 2, 0.5 * 2 / 3, 0.25]))


@pytest.mark.parametrize("method", [WeightedSum, FixedWeights])
def test_weights_by_name_errors(method):
    with pytest.raises(ValueError, match=r"must use the names of the rewards: clip, ocr, pick. Found typo"):
        method(weights={"typo": 1.0}).bind(NAMES)
    for wrong in (-1.0, 0.0, float("nan"), 1e300, 1e-300):  # the last two are infinite and zero in float32
        shown = re.escape(str({"ocr": wrong}))
        with pytest.raises(ValueError, match=rf"must be finite and > 0 in float32. Found {shown}. .* to `metrics`"):
            method(weights={"ocr": wrong}).bind(NAMES)


def test_marble_is_min_norm_with_the_options_of_the_paper():
    balancer = bound(MARBLE())
    assert (balancer.options.refresh_every, balancer.options.ema_decay, balancer.options.normalize, balancer.floor) == (
        10,
        0.7,
        True,
        0.0,
    )
    gram = torch.tensor([[1.0, -0.5, 0.1], [-0.5, 1.0, 0.2], [0.1, 0.2, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(balancer.weights(gram), min_norm_weights(gram))
    assert (bound(MARBLE(floor=0.3)).weights(gram) >= 0.3 - 1e-12).all()


def test_marble_floor_is_checked_before_training():
    with pytest.raises(ValueError, match=r"`floor` must be in \[0, 1 / number of rewards or groups\]. Found 1.5"):
        MARBLE(floor=1.5)
    with pytest.raises(ValueError, match=r"at most 1 / 3 for 3 rewards. Found 0.5"):
        MARBLE(floor=0.5).bind(NAMES)


def command_line() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", action="config")
    parser.add_subclass_arguments(Balancer, "balancer", required=True)
    return parser


@pytest.mark.parametrize("config", METHOD_CONFIGS, ids=lambda path: path.stem)
def test_balancers_of_configs_can_be_bound(config):
    assert config.read_text().startswith("# ")
    settings = yaml.safe_load(config.read_text())
    assert settings.keys() <= {"balancer", "model"}
    parser = command_line()
    balancer = parser.instantiate(parser.parse_object({"balancer": settings["balancer"]})).balancer
    assert bound(balancer).loss_weights.sum().item() == pytest.approx(1)


def test_there_is_a_config_for_every_method():
    configured = {yaml.safe_load(path.read_text())["balancer"]["class_path"] for path in METHOD_CONFIGS}
    classes = {name for name in balancers.__all__ if isinstance(getattr(balancers, name), type)}
    methods = {name for name in classes if issubclass(getattr(balancers, name), Balancer)} - {"Balancer"}
    assert configured == {f"balancers.{name}" for name in methods}


OTHER_OPTIONS = {"refresh_every": 7, "ema_decay": 0.5, "normalize": True, "refresh_alpha": "fresh"}
OTHER_OPTIONS |= {"estimate_share": 0.05, "uniform_after_step": 3, "gram": "split", "gram_decay": 0.5}


@pytest.mark.parametrize("config", METHOD_CONFIGS, ids=lambda path: path.stem)
def test_a_config_overrides_all_options_of_the_file_below(config, tmp_path):
    """Options that two classes share survive a change of the class, so a file has to set all of them."""
    below = tmp_path / "below.yaml"
    below.write_text(
        yaml.safe_dump({"balancer": {"class_path": "balancers.MARBLE", "init_args": {**OTHER_OPTIONS, "floor": 0.1}}})
    )
    method = tmp_path / "method.yaml"
    method.write_text(yaml.safe_dump({"balancer": yaml.safe_load(config.read_text())["balancer"]}))
    parser = command_line()
    over, alone = (
        bound(parser.instantiate(parser.parse_args([part for file in files for part in ("-c", str(file))])).balancer)
        for files in ((below, method), (method,))
    )
    assert over.cadence == alone.cadence
    assert over.options.uniform_after_step is None
    if config.stem in ("pcgrad", "cagrad", "mgda", "torchjd", "gem"):
        assert over.cadence == GradientOptions().cadence
        assert over.options == GradientOptions()


def test_the_cadence_of_marble_for_another_method():
    parser = command_line()
    files = (CONFIGS / f"{name}.yaml" for name in ("pcgrad", "cadence_marble"))
    balancer = bound(parser.instantiate(parser.parse_args([part for file in files for part in ("-c", str(file))])).balancer)
    marble = bound(MARBLE()).cadence
    assert isinstance(balancer, PCGrad)
    assert balancer.cadence == {**marble, "normalize": False}
    assert bound(FixedWeights()).cadence == bound(WeightedSum()).cadence == {}


def test_the_config_of_the_paper():
    settings = yaml.safe_load((CONFIGS / "marble_paper.yaml").read_text())["balancer"]["init_args"]
    balancer = bound(MARBLE(**settings))
    assert balancer.cadence == {**bound(MARBLE()).cadence, "refresh_alpha": "fresh", "estimate_share": 0.0}
    balancer.begin_step(192)
    assert balancer._sum.wanted == 1


def test_short_names_and_single_options_on_the_command_line():
    parser = command_line()
    arguments = [
        "--balancer",
        "MARBLE",
        "--balancer.refresh_every",
        "5",
        "--balancer.gram",
        "split",
        "--balancer.gram_decay",
        "0.9",
        "--balancer.floor=0.1",
    ]
    balancer = parser.instantiate(parser.parse_args(arguments)).balancer
    assert isinstance(balancer, MARBLE)
    assert (balancer.options.refresh_every, balancer.options.gram, balancer.floor, balancer.options.ema_decay) == (
        5,
        "split",
        0.1,
        0.7,
    )
    arguments = ["--balancer", "FixedWeights", "--balancer.weights", "{ocr: 2}", "--balancer.uniform_after_step", "7"]
    balancer = parser.instantiate(parser.parse_args(arguments)).balancer
    assert (balancer.named_weights, balancer.options.uniform_after_step) == ({"ocr": 2.0}, 7)


def test_help_explains_every_option(capsys):
    parser = ArgumentParser()
    parser.add_subclass_arguments(Balancer, "balancer", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--balancer.help", "MARBLE"])
    text = capsys.readouterr().out.split("Help for", 1)[1]
    for option in (
        "floor",
        "refresh_every",
        "ema_decay",
        "normalize",
        "refresh_alpha",
        "estimate_share",
        "uniform_after_step",
        "measure_signal",
        "gram",
        "gram_decay",
        "gram_shrinkage",
        "signal_floor",
    ):
        line = text.split(f"--balancer.{option} ", 1)[1].split("--balancer.", 1)[0]
        assert len(line.split()) > 12, f"no help for {option}: {line}"
