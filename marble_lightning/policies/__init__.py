"""Flow-matching policies and LoRA files.

`FlowPolicy` is the interface that a base model implements, `SD3Policy` is Stable Diffusion 3. LoRA files are read, written
and exported here.
"""

from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.sd3 import SD3Policy

__all__ = ["Averaging", "FlowPolicy", "SD3Policy"]
