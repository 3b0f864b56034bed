"""What `sora-fast train` does where nothing is said: sizes that suit the device, and a recipe that learns quickly.
Imports nothing heavy.

The recipe is the demo's, and was measured on three real clips (16 frames of 64 × 48, 4 minutes on one core of an AMD
EPYC, PSNR of what each caption gives to its own clip): 25 to 28 dB. Taking one thing back at a time: cross-attention to
the captions' tokens beside their pooled vector 21 to 23 (a third fewer steps in that time); with it, the velocity in
place of the clean data 18 to 19, AdamW in place of Muon 19 to 22.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes of a new run.

    dim, depth, patch, capacity: of the model and its batches. Heads have HEAD_DIM channels.
    ema_decay: a run of a few thousand steps is averaged over fewer of them.
    reads_text: whether the blocks attend the captions' tokens, or only their pooled vector is added to the noise level.
    text_dim, text_layers: of the small text encoder.
    """

    dim: int
    depth: int
    patch: tuple[int, int, int]
    capacity: int
    ema_decay: float
    reads_text: bool
    text_dim: int
    text_layers: int


HEAD_DIM = 64
CPU = Recipe(
    dim=192,
    depth=4,
    patch=(1, 8, 8),
    capacity=2048,
    ema_decay=0.995,
    reads_text=False,
    text_dim=64,
    text_layers=0,
)
GPU = Recipe(
    dim=256,
    depth=6,
    patch=(1, 4, 4),
    capacity=8192,
    ema_decay=0.999,
    reads_text=True,
    text_dim=128,
    text_layers=3,
)

# Of latents: as many pixels a token as the CPU's own patch has with a codec of 4×4×4, but of four frames. Not tuned.
LATENT_PATCH = (1, 2, 2)

# Peak learning rate of each optimizer, and Muon's as a multiple of it. AdamW alone was better at a third of the rate.
LR = {"muon": 3e-3, "adamw": 1e-3}
MUON_RATIO = 3.0
WARMUP = 50
CLEAN_SHARE = 0.3
# Clean data have far fewer degrees of freedom than the noise in large patches. What all frames share is decided at high
# noise levels, which the shift by `base_tokens` gives more weight.
PREDICTION, BASE_TOKENS = "clean", 4
# Rotary positions know no edges of the frame: a small model learns sooner where things are if it is told, and what is
# near if it begins with it.
POSITION, POSITION_BIAS = "rope+sincos3d", 1.0


# Of `train-vae`. The demo's digits, PSNR: 25.5 dB after 15 minutes on one core (benchmarks/results/cpu/vae.json). After
# four, of 100 frames a step, 24.2 dB with Muon at twice 2e-3, and 22.4 dB with AdamW at 4e-3, half of the loss absolute
# errors; 18.5 dB with AdamW at 2e-3, of those alone and 200 frames. One run each: not tuned.
VAE_LR, VAE_MUON_RATIO, VAE_WARMUP = 3e-3, 2.0, 100


def recipe_for(device: str) -> Recipe:
    """Of a device's name, "cpu" or "cuda…"."""
    return CPU if device.startswith("cpu") else GPU


def rope_theta(longest: int) -> float:
    """For token grids of so many places along their longest side: the slowest pair turns by about a third there."""
    return 100.0 if longest <= 32 else 10_000.0
