import json
from pathlib import Path

import pytest
import torch

from benchmarks.own_clips import main, psnr
from sora_fast.media import write_media


def test_psnr_is_of_the_range_of_two() -> None:
    video = torch.zeros(3, 2, 4, 4)
    assert psnr(video + 0.2, video) == 20.0
    assert psnr(video + 0.2, torch.zeros(3, 1, 8, 8)) == 20.0


@pytest.mark.slow
def test_a_folder_is_trained_on_and_judged(tmp_path: Path) -> None:
    for name, value in (("dark", -0.5), ("bright", 0.5)):
        write_media(tmp_path / f"{name}.png", torch.full((3, 1, 16, 16), value))
        (tmp_path / f"{name}.txt").write_text(name)
    assert main([str(tmp_path), "--minutes", "0.02", "--out", str(tmp_path / "new" / "found.json")]) == 0
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["captions"] == ["bright", "dark"] and len(found["psnr_to_its_own"]) == 2
    assert 0 <= found["nearest_is_its_own"] <= 2 and found["training"]["steps"] >= 1
