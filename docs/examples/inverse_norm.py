"""A custom balancer: each gradient in inverse proportion to its norm."""

from balancers import Balancer


class InverseNorm(Balancer):
    def weights(self, gram):  # (K, K) inner products -> (K,)
        inverse = 1 / gram.diagonal().sqrt()
        return inverse / inverse.sum()
