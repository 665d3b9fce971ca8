"""DiffusionNFT (arXiv 2509.16117): advantages, loss, rollout and per-reward gradients."""
