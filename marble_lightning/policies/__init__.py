"""Flow-matching policies and LoRA files.

`FlowPolicy` is the interface that a base model implements, `PipelinePolicy` implements what pipelines of diffusers have in
common, `SD3Policy` is Stable Diffusion 3, `ZImagePolicy` is Z-Image. `ShardedBaseStrategy` is a strategy of the trainer for
bases too large for one GPU. LoRA files are read, written and exported here.
"""

from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.pipeline_policy import PipelinePolicy
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.policies.sharding import ShardedBaseStrategy
from marble_lightning.policies.z_image import ZImagePolicy

__all__ = ["Averaging", "FlowPolicy", "PipelinePolicy", "SD3Policy", "ShardedBaseStrategy", "ZImagePolicy"]
