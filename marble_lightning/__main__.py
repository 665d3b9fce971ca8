"""`python -m marble_lightning` is `marble-lightning`."""

from marble_lightning.cli import main

main()
