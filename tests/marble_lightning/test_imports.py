"""Commands that train nothing do not wait for the libraries that training needs, nor does the package of rewards."""

import gc
import subprocess
import sys

import pytest

from marble_lightning.cli import imported

LISTS_NAMES = "from marble_lightning.cli import main; main(['configs'])"
IMPORTS_REWARDS = "import rewards"
READS_RUNS = "import marble_lightning.lab.report.page"
ENGINES = ["transformers", "rapidocr", "onnxruntime", "cv2", "torchmetrics", "marble_lightning"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([(LISTS_NAMES, ["torch", "lightning"])], id="lists names"),
        # one process for both, since both import torch; the rewards come first, since they may not import the other package
        pytest.param(
            [(IMPORTS_REWARDS, ENGINES), (READS_RUNS, ["lightning", "diffusers", "transformers", "peft"])],
            id="imports rewards, reads runs",
        ),
    ],
)
def test_slow_libraries_are_not_imported(steps):
    """After each step, none of its libraries is there."""
    found = "; ".join(f"{code}; found.append([name for name in {names} if name in sys.modules])" for code, names in steps)
    code = f"import sys; found = []; {found}; sys.exit(str(found))"
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert ended.stderr.splitlines()[-1] == str([[] for _ in steps]), ended.stderr


def test_garbage_is_collected_after_an_import_and_what_was_imported_is_left_out():
    with pytest.raises(ModuleNotFoundError, match="absent"):
        imported("marble_lightning.absent")
    assert gc.isenabled()
    kept = gc.get_freeze_count()
    assert kept > 0
    assert imported("marble_lightning.cli") is sys.modules["marble_lightning.cli"]
    assert gc.get_freeze_count() == kept  # objects of an earlier command would never be freed
