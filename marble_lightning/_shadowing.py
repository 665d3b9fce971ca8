"""Refuses a module that shadows `rewards` or `balancers`, before anything imports either."""

from importlib.util import find_spec
from pathlib import Path


def check_packages() -> None:
    """Check that `rewards` and `balancers` are the packages that are installed with this one.

    Raises:
        ImportError: A file or folder of that name comes first on the path.
    """
    for name in ("balancers", "rewards"):
        spec = find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        if spec and not any(Path(folder, "base.py").is_file() for folder in folders):
            raise ImportError(
                f"`{name}` must be the package that is installed with MARBLE Lightning. Found {spec.origin or folders[0]}, "
                "which comes first on the Python path. Rename it, or run in another folder."
            )


check_packages()
