"""Serves a reward over HTTP to `rewards.RemoteReward`: `marble-lightning-serve --reward rewards.PickScore`.

The server is `rewards.remote.server`.
"""

from __future__ import annotations

from collections.abc import Sequence

from marble_lightning.parsers import import_classes, run_command
from rewards.remote.server import serve


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    import_classes()
    run_command(serve, args, "marble-lightning-serve")


if __name__ == "__main__":
    main()
