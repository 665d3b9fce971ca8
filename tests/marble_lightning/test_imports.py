"""Commands that train nothing do not wait for the libraries that training needs."""

import gc
import subprocess
import sys

import pytest

from marble_lightning.cli import imported

LISTS_NAMES = "from marble_lightning.cli import main; main(['configs'])"
READS_RUNS = "import marble_lightning.lab.report.page"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("code", "libraries"),
    [(LISTS_NAMES, ["torch", "lightning"]), (READS_RUNS, ["lightning", "diffusers", "transformers", "peft"])],
)
def test_slow_libraries_are_not_imported(code, libraries):
    found = f"import sys; {code}; sys.exit(str([name for name in {libraries} if name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", found], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert ended.stderr.splitlines()[-1] == "[]"


def test_garbage_is_collected_after_an_import_and_what_was_imported_is_left_out():
    with pytest.raises(ModuleNotFoundError, match="absent"):
        imported("marble_lightning.absent")
    assert gc.isenabled()
    kept = gc.get_freeze_count()
    assert kept > 0
    assert imported("marble_lightning.cli") is sys.modules["marble_lightning.cli"]
    assert gc.get_freeze_count() == kept  # objects of an earlier command would never be freed
