"""Two small rounds without the command line: `python docs/examples/in_python.py`."""

from lightning.pytorch import Trainer

from balancers import MARBLE
from marble_lightning import DiffusionNFT, PromptDataModule, Sampling, SD3Policy
from rewards import JPEGCompressibility, PickScore

WEIGHTS = "package:tinyworld/weights"


def train(folder: str = "runs/in_python") -> DiffusionNFT:
    module = DiffusionNFT(
        policy=SD3Policy(f"{WEIGHTS}/sd3", resolution=32, rank=4, alpha=8, text_length=4, dtype="float32"),
        rewards={
            "pickscore": PickScore(f"{WEIGHTS}/pickscore", processor_path=None),
            "jpeg": JPEGCompressibility(),
        },
        sampling=Sampling(steps=4, times_per_image=2),
        micro_batch_size=8,
    )
    data = PromptDataModule("package:tinyworld/prompts", ["pickscore"], prompts_per_round=2, images_per_prompt=4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,  # rounds
        callbacks=[MARBLE(refresh_every=1)],
        limit_val_batches=0,  # no held-out prompts
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return module


if __name__ == "__main__":
    train()
