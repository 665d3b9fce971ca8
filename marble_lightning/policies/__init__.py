"""Flow-matching policies: what a base model has to offer, Stable Diffusion 3, its adapters and files."""
