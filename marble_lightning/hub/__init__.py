"""Export of trained adapters: to a LoRA file, to a whole transformer, and to the model hub with a model card."""

from marble_lightning.hub.command import export

__all__ = ["export"]
