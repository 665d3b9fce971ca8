"""The examples of the pages run, their commands are parsed, and the files they name exist."""

from __future__ import annotations

import re
import shlex
from functools import wraps
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import balancers
import rewards
from marble_lightning.cli import main
from rewards import Prompt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in [*TOP, *DOCS.rglob("*.md")]}
PATH = re.compile(r"(?<=[ `=])(?:balancers|benchmarks|configs|docs|marble_lightning|notebooks|rewards|tests)/[\w./]*\w")


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "examples")


def test_rewards():
    from darkness import Darkness
    from warmth import Warmth

    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    images[0, 0] = 1.0
    prompts = [Prompt("a red night", "a"), Prompt("a white day", "b")]
    assert Warmth()(images=images, prompts=prompts).tolist() == [1.0, 0.0]
    scores = Darkness()(images=images, prompts=prompts)
    assert scores[0] == pytest.approx(2 / 3) and scores[1].isnan()
    assert Darkness(sources=["b"])(images=images, prompts=prompts).isnan().all()


def test_a_reward_with_weights(tmp_path):
    from probe import Probe

    head = torch.nn.Linear(3, 1)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    reward, other = Probe(str(tmp_path / "head.pt")), Probe("elsewhere.pt")
    for _ in range(2):
        reward.setup()
    images = torch.rand(2, 3, 4, 4)
    expected = head(images.mean((2, 3)))[:, 0].detach()
    torch.testing.assert_close(reward(images=images, prompts=[Prompt("a", "b")] * 2), expected)
    assert reward.identity != other.identity


def test_balancers():
    from inverse_norm import InverseNorm
    from worst_advantage import WorstAdvantage

    assert InverseNorm().weights(torch.diag(torch.tensor([1.0, 9.0]))).tolist() == pytest.approx([0.75, 0.25])
    advantages = torch.tensor([[1.0, -2.0], [torch.nan, 3.0], [torch.nan, torch.nan]])
    assert WorstAdvantage().merge_advantages(advantages).nan_to_num(9).tolist() == [[-2.0], [3.0], [9.0]]


@pytest.mark.integration
@pytest.mark.parametrize("balancer", ["inverse_norm.InverseNorm", "worst_advantage.WorstAdvantage"])
def test_all_of_them_train_together(small, tmp_path, balancer):
    pairs = list(zip(small[::2], small[1::2], strict=True))
    options = [part for name, value in pairs if not name.startswith("--model.policy") for part in (name, value)]
    main(
        [
            "fit", *options, "--model.policy", "toy_flow.ToyFlow", "--model.rewards.warmth", "warmth.Warmth",
            "--model.rewards.darkness", "darkness.Darkness", "--model.averaging", "schedule.Halfway",
            "--balancer", balancer, "--model.rewards.ocr", "null", "--model.metrics", "{}",
        ]
    )  # fmt: skip
    saved = torch.load(tmp_path / "tiny/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert max(tensor.abs().max() for name, tensor in saved.items() if ".lora_B.trained" in name) > 0


@pytest.mark.integration
@pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)  # which the command line silences
def test_a_run_without_the_command_line(tmp_path):
    from in_python import train

    module = train(str(tmp_path))
    assert module.trainer.global_step == 2


def commands(*names: str) -> list[list[str]]:
    """What follows `marble-lightning` in the commands of all pages that begin with one of the names, each once."""
    blocks = [block for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "marble-lightning " in line]
    found = [tuple(shlex.split(line, comments=True)) for line in lines]
    found = [words[words.index("marble-lightning") + 1 :] for words in found if "marble-lightning" in words]
    return [list(words) for words in dict.fromkeys(found) if words[0] in names]


@pytest.mark.integration
@pytest.mark.parametrize("arguments", commands("fit", "validate", "test", "predict"), ids=" ".join)
def test_commands_are_accepted(arguments, tmp_path, monkeypatch, capsys):
    """Those that begin a run of the tiny world, up to its first round; the others are parsed: their files are not here."""
    monkeypatch.chdir(tmp_path)
    main(["configs", "--copy", "tiny", "--to", "mine.yaml"])
    if arguments[0] == "fit" and "tiny" in arguments and "--ckpt_path" not in arguments:
        begun = []
        monkeypatch.setattr(Trainer, "fit", wraps(Trainer.fit)(lambda *_, **__: begun.append(True)))
        main(arguments)
        assert begun
        return
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--print_config"])
    assert not ended.value.code, capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize("arguments", commands("export", "configs"), ids=" ".join)
def test_options_of_other_commands_exist(arguments, capsys):
    with pytest.raises(SystemExit):
        main([arguments[0], "--help"])
    shown = capsys.readouterr().out
    options = [f"--{argument[2:].replace('-', '_')}" for argument in arguments if argument.startswith("--")]
    assert all(option in shown for option in options)


def exists(path: str) -> bool:
    """Whether a path is in the repository, or is the name of a configuration, or is built, or stands for any name."""
    known = (ROOT / path).exists() or (ROOT / "configs" / f"{path}.yaml").exists()
    return known or path.startswith("docs/_build") or "NAME" in path


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    modules = [f"benchmarks/{name}.py" for name in re.findall(r"-m benchmarks\.(\w+)", PAGES[page])]
    assert not [path for path in [*PATH.findall(PAGES[page]), *modules] if not exists(path)]


@pytest.mark.parametrize("page", PAGES)
def test_yaml_can_be_read(page):
    for block in re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL):
        assert isinstance(yaml.safe_load(block), dict)


@pytest.mark.parametrize("file", TOP, ids=lambda file: file.name)
def test_links_exist(file):  # Sphinx checks those of the other pages
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_balancer_and_reward_is_documented():
    documented = re.findall(r"(?:auto|py:)(?:class|function|data):: (?:balancers|rewards)\.(\w+)", "".join(PAGES.values()))
    assert sorted(documented) == sorted([*balancers.__all__, *rewards.__all__])


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
