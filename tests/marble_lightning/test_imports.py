"""Commands that train nothing do not wait for the libraries that training needs."""

import subprocess
import sys

import pytest

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
