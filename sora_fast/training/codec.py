"""Which codec a run has: by kind, as its configuration names it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sora_fast.models.codecs import Codec, IdentityCodec

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class CodecConfig:
    """A codec by its kind.

    kind: "pixels", none but the identity, or "vae", what `sora-fast train-vae` made in `folder`.
    fingerprint: of the weights there; None: not known yet. A run's config.json always has it.
    """

    kind: str = "pixels"
    folder: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"codec.kind: {self.kind!r}; it must be one of {', '.join(KINDS)}")

    def located(self) -> "CodecConfig":
        """With an absolute folder and its fingerprint. ValueError if it holds another codec, or none."""
        if self.folder is None:
            return self
        from sora_fast.training.vae_run import fingerprint

        folder = Path(self.folder).resolve()
        found = fingerprint(folder)
        if self.fingerprint not in (None, found):
            raise ValueError(
                f"codec.folder: {folder} holds another codec ({found}) than the one that the run was begun with "
                f"({self.fingerprint}), or that one, trained further; say where it is now (--codec FOLDER)"
            )
        return replace(self, folder=str(folder), fingerprint=found)

    def anywhere(self) -> "CodecConfig":
        """Without what its folder may differ in."""
        return self if self.folder is None else replace(self, folder="", fingerprint=None)

    def build(self, channels: int, patch_size: Patch) -> Codec:
        """That of a model of so many channels. ValueError if its latents have others, or it is another one now."""
        codec = KINDS[self.kind](self, patch_size, channels)
        if codec.spec.channels != channels:
            raise ValueError(f"model.in_channels: {channels}; latents of this codec have {codec.spec.channels}")
        return codec


def _pixels(config: CodecConfig, patch_size: Patch, channels: int) -> Codec:
    return IdentityCodec.for_patches(channels, patch_size)


def _vae(config: CodecConfig, patch_size: Patch, channels: int) -> Codec:
    from sora_fast.training.vae_run import load_vae  # whose own configuration is made of what a run's is

    return load_vae(config.located().folder)


KINDS: dict[str, Callable[[CodecConfig, Patch, int], Codec]] = {"pixels": _pixels, "vae": _vae}
