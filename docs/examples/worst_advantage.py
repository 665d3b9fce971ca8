"""A custom balancer at the level of advantages: an image is as good as its worst reward says."""

import torch

from balancers import Balancer


class WorstAdvantage(Balancer):
    merged_name = "worst"  # the name of the one column that is left

    def merge_advantages(self, advantages):  # (N, K), NaN where a reward does not apply -> (N, 1)
        worst = torch.where(advantages.isnan(), torch.inf, advantages).amin(1, keepdim=True)
        return torch.where(worst.isinf(), torch.nan, worst)
