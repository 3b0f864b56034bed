from dataclasses import replace

import pytest
import torch

from sora_fast.generation.engine import Engine
from sora_fast.generation.tasks import text_to_video
from sora_fast.training import codec
from sora_fast.training.codec import CodecConfig
from sora_fast.training.run import Networks
from tests.models.codecs.means import Means
from tests.training.test_trainer import tiny


def test_pieces_are_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codec.KINDS, "means", codec.Kind(lambda folder: Means(), lambda folder: "the same"))
    torch.manual_seed(0)
    engine = Engine(Networks(replace(tiny(), codec=CodecConfig("means", "/somewhere", "the same"))), compile=False)
    requests = [text_to_video("", 11, (9, 6)), text_to_video("", 1, (8, 8))]
    videos = engine.generate(requests, steps=2)
    for made, video in zip(engine.make(requests, steps=2), videos, strict=True):
        pieces = list(made.pieces())
        assert [piece.shape[1] for piece in pieces] == ([1, 4, 4, 2] if video.shape[1] == 11 else [1])
        assert torch.equal(torch.cat(pieces, dim=1), video) and torch.equal(made.video(), video)
