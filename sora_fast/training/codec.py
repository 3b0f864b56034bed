"""Which codec a run has: by kind, as its configuration names it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sora_fast.models.codecs import Codec, IdentityCodec

PIXELS = "pixels"


@dataclass(frozen=True)
class CodecConfig:
    """A codec by its kind.

    kind: "pixels", none but the identity; of those in a folder "vae", what `sora-fast train-vae` made, or "diffusers",
        somebody else's.
    fingerprint: of the weights in the folder; None: not known yet. A run's config.json always has it.
    """

    kind: str = PIXELS
    folder: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (PIXELS, *KINDS):
            raise ValueError(f"codec.kind: {self.kind!r}; it must be one of {', '.join((PIXELS, *KINDS))}")
        if (self.kind == PIXELS) != (self.folder is None):
            raise ValueError(f"codec.folder: {self.folder}; every kind but {PIXELS!r} has one")

    @staticmethod
    def of_folder(folder: Path | str) -> "CodecConfig":
        """What is there. ValueError if that is none."""
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise ValueError(f"{folder} holds no codec: there is no config.json in it")
        values = json.loads(config.read_text(encoding="utf-8"))
        return CodecConfig("diffusers" if "_class_name" in values else "vae", str(folder)).located()

    def located(self) -> "CodecConfig":
        """With an absolute folder and its fingerprint. ValueError if it holds another codec, or none."""
        if self.folder is None:
            return self
        folder = Path(self.folder).resolve()
        found = KINDS[self.kind].fingerprint(folder)
        if self.fingerprint not in (None, found):
            raise ValueError(
                f"codec.folder: {folder} holds another codec ({found}) than the one that the run was begun with "
                f"({self.fingerprint}), or that one, trained further; say where it is now (--codec FOLDER)"
            )
        return replace(self, folder=str(folder), fingerprint=found)

    def anywhere(self) -> "CodecConfig":
        """Without what its folder may differ in."""
        return self if self.folder is None else replace(self, folder="", fingerprint=None)

    def load(self) -> Codec:
        """What is in the folder. ValueError if it is another one now."""
        return KINDS[self.kind].load(Path(self.located().folder))

    def build(self, channels: int, patch_size: tuple[int, int, int]) -> Codec:
        """That of a model of so many channels. ValueError if its latents have others, or as `load`."""
        codec = IdentityCodec.for_patches(channels, patch_size) if self.folder is None else self.load()
        if codec.spec.channels != channels:
            raise ValueError(f"model.in_channels: {channels}; latents of this codec have {codec.spec.channels}")
        return codec


class Kind(NamedTuple):
    """How a codec is loaded from its folder, and a hash of all that it depends on there."""

    load: Callable[[Path], Codec]
    fingerprint: Callable[[Path], str]


def _vae(folder: Path) -> Codec:
    from sora_fast.training.vae_run import load_vae  # whose own configuration is made of what a run's is

    return load_vae(folder)


def _of_vae(folder: Path) -> str:
    from sora_fast.training.vae_run import fingerprint

    return fingerprint(folder)


def _diffusers(folder: Path) -> Codec:
    from sora_fast.models.codecs.diffusers import DiffusersCodec

    return DiffusersCodec.load(folder)


def _of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]


KINDS: dict[str, Kind] = {"vae": Kind(_vae, _of_vae), "diffusers": Kind(_diffusers, _of_files)}
