"""The overnight runs of Medium fit the GPUs that the first lines of their configurations name, by the estimate.

The networks have their full size on torch's device `meta`, and every phase is counted: a minute or two of a core.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.memory import arguments, module_on_a_gpu
from marble_lightning.cli import main
from marble_lightning.memory import estimate_memory
from marble_lightning.memory.report import CUDA_CONTEXT, GIB
from tests.helpers import ROOT

NOT_PUBLIC = 0.5 * GIB
"""More that the text encoders have with the public vocabularies, in place of the tiny world's."""


def settings_of(name: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """All settings of `-c sd35m -c NAME`."""
    with pytest.raises(SystemExit):
        main(["fit", "-c", "sd35m", "-c", name, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def module_of(config: dict, folder: Path):
    """The module of a configuration as `fit` sets it up, without weights."""
    model, data, options = config["model"], config["data"], arguments().parse_args([])
    policy, sampling, scoring = model["policy"]["init_args"], model["sampling"], model["scoring"]
    options.ranks = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    options.prompts, options.images = data["prompts_per_round"], data["images_per_prompt"]
    options.held_out, options.micro = data["held_out_batch_size"], model["micro_batch_size"]
    options.steps, options.sampling, options.times = (sampling[key] for key in ("steps", "batch_size", "times_per_image"))
    options.reward_dtype = model["rewards"]["pickscore"]["init_args"]["dtype"]
    options.checkpointing, options.frugal = policy["gradient_checkpointing"], policy["vae_slicing"]
    module = module_on_a_gpu(folder, options)
    chosen = {key: scoring[key] for key in ("offload", "overlap", "devices")}
    module.scorer.settings = replace(module.scorer.settings, **chosen)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd35m_1gpu", "sd35m_8gpu"])
def test_a_run_fits_the_gpus_that_its_configuration_names(tmp_path, capsys, name):
    first = (ROOT / f"configs/{name}.yaml").read_text().partition("\n")[0]
    (gigabytes,) = re.findall(r"(\d+) GB", first)
    module = module_of(settings_of(name, capsys), tmp_path)
    estimate = estimate_memory(module, module.trainer.world_size)
    needed = {phase: estimate.total(phase) + CUDA_CONTEXT + NOT_PUBLIC for phase in estimate.phases}
    print(name, {phase: f"{size / GIB:.1f} GiB" for phase, size in needed.items()})
    assert max(needed.values()) < int(gigabytes) * 1e9, needed
