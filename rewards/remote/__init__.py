"""Rewards served over HTTP: on another machine, in another environment, shared by several runs.

`marble-lightning-serve --reward rewards.PickScore` serves a reward of this package or a custom reward. Any other server must
answer two requests with JSON:

    GET {url}/health
        -> {"reward": name, "identity": {setting: value, ...}}

    POST {url}/score
        {"images": [PNG, ...], "prompts": [{"text": str, "source": str, "metadata": {...}}, ...]}
        -> {"scores": [number or null, ...]}

`identity` is optional: the settings that the scores depend on, without secrets. A client of several servers refuses servers
with different names or identities.

Images are 8-bit RGB PNGs in base64, all of the same size, one per prompt, without texts and colour profiles. Scores are in
the order of the images; higher is better, and null marks a missing score. Any status other than 200 is an error, described
by {"error": text}; 400, 413, 415 and 422 refuse the images or prompts of one request.
"""

from rewards.remote.client import RemoteReward
from rewards.remote.geneval2 import GenEval2
from rewards.remote.unified import UnifiedReward, UnifiedReward2
from rewards.remote.vlm import VisionLanguageReward

__all__ = ["GenEval2", "RemoteReward", "UnifiedReward", "UnifiedReward2", "VisionLanguageReward"]
