"""`fit --trainer.fast_dev_run true`: a rehearsal, two small rounds that do all that a run does, and the hours of the run.

The configured sizes are kept, then the round is made as small as its groups and micro-batches allow (`sizes`). A callback
measures the phases and prints a table (`callback`), with the hours of the whole run (`duration`).
"""

from marble_lightning.rehearsal.callback import Rehearsal, begin_rehearsal

__all__ = ["Rehearsal", "begin_rehearsal"]
