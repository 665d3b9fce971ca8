"""Any reward behind HTTP: on another machine, in another environment, shared by several runs.

`marble-lightning-serve --reward rewards.PickScore` serves a reward of this package or your own. A server of another kind has
to answer two requests, both with JSON:

    GET {url}/health
        -> {"reward": name}

    POST {url}/score
        {"images": [PNG, ...], "prompts": [{"text": str, "source": str, "metadata": {...}}, ...]}
        -> {"scores": [number or null, ...]}

Images are 8-bit RGB PNGs in base64, all of one size, one for each prompt. Scores come in the order of the images, higher is
better; null is a score that could not be had. An answer of another status than 200 is an error; {"error": text} says which.
"""

from rewards.remote.client import RemoteReward
from rewards.remote.unified import UnifiedReward

__all__ = ["RemoteReward", "UnifiedReward"]
