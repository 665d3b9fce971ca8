"""Configurations by name: `-c tiny` is `configs/tiny.yaml` of a checkout, or of the installed package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent


def folder() -> Path:
    """Where the configurations are: within an installed package, beside the package in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def known() -> dict[str, Path]:
    """The configurations' files by name, such as `tiny` and `balancers/pcgrad`; whole runs first, then overlays."""
    files = {file.relative_to(folder()).with_suffix("").as_posix(): file for file in folder().rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def located(config: str) -> str:
    """The path that `-c` means: that of a file, or else of the configuration of that name.

    Text with a colon is YAML or a URL, and is left as it is.

    Raises:
        ValueError: There is neither; with the names that there are.
    """
    if ":" in config or Path(config).expanduser().is_file():
        return config
    return str(named(config, "`-c`", "a file, or "))


def named(name: str, setting: str, otherwise: str = "") -> Path:
    """The file of a configuration.

    Args:
        name: Such as `tiny`.
        setting: What names it, for the error message.
        otherwise: What the setting may be instead.

    Raises:
        ValueError: There is none of that name; with those that there are.
    """
    files = known()
    if name not in files:
        raise ValueError(
            f"{setting} must be {otherwise}the name of a configuration: {', '.join(files)}. "
            f"Found {name!r}{f', and no such file from {Path.cwd()}' if otherwise else ''}."
        )
    return files[name]


def configs(copy: str | None = None, to: str | None = None) -> None:
    """List the configurations that `-c` knows by name, or copy one to make it your own.

    Args:
        copy: Name of a configuration to copy, e.g. `tiny`; null lists all.
        to: File that the copy is written to; null for its own name in the working folder.

    Raises:
        ValueError: There is such a file already, or nothing to copy.
    """
    if copy is None:
        if to is not None:
            raise ValueError(f"`to` must be null where nothing is copied. Found {to}; add --copy NAME.")
        print("\n".join(listing()))
        return
    source = named(copy, "`copy`")
    file = Path(source.name if to is None else to).expanduser()
    if file.exists():
        raise ValueError(f"`to` must be a file that is not there yet. Found {file.resolve()}; choose another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, file)
    print(f"{file}\nUse it: -c {file}")


def listing() -> Iterator[str]:
    """A line for each configuration: its name, and what its file says of itself first."""
    files = known()
    width = max(map(len, files))
    for name, file in files.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        yield f"{name:{width}}  {first.removeprefix('#').strip()}"
