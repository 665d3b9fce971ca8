"""`marble-lightning report`: finished runs, compared on one page."""

from __future__ import annotations

from pathlib import Path


def report(runs: list[Path], to: Path, reference: str | None = None) -> None:
    """Compare finished runs on one page, with tables in Markdown and CSV and figures as PNG beside it.

    Runs on a single reward are taken as specialists, by whose gains the others' are divided.

    Args:
        runs: Folders of runs, or folders that contain such, for example of a sweep.
        to: Folder of the report.
        reference: Method that the others are compared with; null for the first one.

    Raises:
        ValueError: There are no finished runs, they cannot be compared, or none has the reference's name.
    """
    try:
        from marble_lightning.lab.report.page import write_report  # matplotlib and pandas are slow to import
    except ImportError as error:
        raise ValueError(
            f"`report` needs {error.name}. Found none; install it: pip install marble-lightning[lab]"
        ) from error
    print(write_report(runs, to, reference))
