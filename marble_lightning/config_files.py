"""Look-up of configurations by name: `-c tiny` is `configs/tiny.yaml` of a checkout or of the installed package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent


def folder() -> Path:
    """Folder of the configurations: inside an installed package, or beside the package in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def configurations() -> dict[str, Path]:
    """Files of the configurations by name, such as `tiny` and `balancers/pcgrad`: complete runs first, then overlays."""
    files = {file.relative_to(folder()).with_suffix("").as_posix(): file for file in folder().rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def locate(config: str) -> str:
    """Resolve the value of `-c` to a path: of a file, or else of the configuration with that name.

    Text with a colon is YAML or a URL, and is returned unchanged.

    Raises:
        ValueError: There is no such file or configuration; the message lists the names.
    """
    if ":" in config or Path(config).expanduser().is_file():
        return config
    return str(locate_named(config, "`-c`", "a file, or "))


def locate_named(name: str, setting: str, otherwise: str = "") -> Path:
    """The file of a configuration.

    Args:
        name: Name of the configuration, such as `tiny`.
        setting: The setting that has the name, for the error message.
        otherwise: Other values that the setting may have, for the error message.

    Raises:
        ValueError: There is no configuration with that name; the message lists the names.
    """
    files = configurations()
    if name not in files:
        raise ValueError(
            f"{setting} must be {otherwise}the name of a configuration: {', '.join(files)}. "
            f"Found {name!r}{f', and no such file from {Path.cwd()}' if otherwise else ''}."
        )
    return files[name]


def configs(copy: str | None = None, to: str | None = None) -> None:
    """List the configurations that `-c` knows by name, or copy one to edit it.

    Args:
        copy: Name of a configuration to copy, e.g. `tiny`; null lists all.
        to: File that the copy is written to; null for the same name in the working folder.

    Raises:
        ValueError: The file exists already, or there is nothing to copy.
    """
    if copy is None:
        if to is not None:
            raise ValueError(f"`to` must be null if nothing is copied. Found {to}; add --copy NAME.")
        print("\n".join(listing()))
        return
    source = locate_named(copy, "`copy`")
    file = Path(source.name if to is None else to).expanduser()
    if file.exists():
        raise ValueError(f"`to` must be a file that does not exist yet. Found {file.resolve()}; choose another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, file)
    print(f"{file}\nUse it: -c {file}")


def listing() -> Iterator[str]:
    """A line for each configuration: its name and the first line of its file."""
    files = configurations()
    width = max(map(len, files))
    for name, file in files.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        yield f"{name:{width}}  {first.removeprefix('#').strip()}"
