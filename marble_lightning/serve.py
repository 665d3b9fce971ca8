"""Serves a reward over HTTP to `rewards.RemoteReward`: `marble-lightning-serve --reward rewards.PickScore`.

The server is `rewards.remote.server`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import auto_cli

from marble_lightning.parsers import Parser, import_classes
from rewards.remote.server import serve


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    import_classes()
    words = args if args is None else list(args)
    auto_cli(serve, args=words, as_positional=False, prog="marble-lightning-serve", parser_class=Parser)


if __name__ == "__main__":
    main()
