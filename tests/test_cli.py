import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from sora_fast import media
from sora_fast.cli import _parser, main
from sora_fast.generation.engine import Engine
from sora_fast.generation.options import SampleOptions
from sora_fast.media import read_media, write_media
from sora_fast.models.text import T5_TOKENS, ByteTextEncoder
from sora_fast.packing import SigmoidDrop
from sora_fast.training.beginning import compile_scope, data_workers, new_config
from sora_fast.training.config import write_config
from sora_fast.training.options import TrainOptions, VAEOptions
from sora_fast.training.run import CONFIG, LOG, Distilled, read_run
from sora_fast.training.runlog import read_log
from tests.text_encoders import save_clip

_SMALL = (
    "--dim 32 --depth 1 --heads 2 --patch 1x4x4 --capacity 256 --max-side 16 --max-frames 3 --no-compile --device cpu "
    "--workers 0"
)
SMALL = _SMALL.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "data"
    ramp = torch.linspace(-1, 1, 24)
    write_media(folder / "right.mp4", ramp.expand(3, 4, 16, 24))
    (folder / "right.txt").write_text("brighter to the right")
    write_media(folder / "left.png", ramp.flip(0).expand(3, 1, 16, 24))
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    run = folder.parent / "run"
    assert main(["train", "--data", str(folder), "--out", str(run), "--steps", "3", *SMALL]) == 0
    return run


def test_train_names_what_it_skips(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL]) == 0
    assert "empty.mp4: empty file (0 bytes)" in caplog.text


def test_sample(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "clip.mp4"
    arguments = ["sample", str(run), "--steps", "2", "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--prompt", "brighter", "--frames", "3", "--size", "12x20"]) == 0
    assert read_media(out).shape == (3, 3, 12, 20)
    said = capsys.readouterr().out
    assert "3 frames of 12x20" in said
    assert "1 video of 45 tokens, 2 steps, all guided: 180 tokens through the network" in said
    assert "first step" in said and "outside the network" in said
    assert main([*arguments, "--frames", "4", "--image", str(folder / "left.png")]) == 0
    video, image = read_media(out), read_media(folder / "left.png", max_side=16)
    assert video.shape[1] == 4
    # H.264 stores colour at half the size and rounds: close to the image, far from any other frame.
    assert (video[:, :1, : image.shape[2], : image.shape[3]] - image).abs().mean() < 0.05
    clip = str(folder / "right.mp4")
    assert main([*arguments, "--frames", "9", "--image", clip, "--end", clip]) == 0


def test_distill(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog) -> None:
    new = run.with_name("run-distilled")
    distil = ["distill", str(run), "--device", "cpu"]
    assert main([*distil, "--minutes", "0.01", "--steps", "3", "--guidance", "2", "--no-compile"]) == 0
    said = capsys.readouterr().out
    assert f"To sample: sora-fast sample {new}" in said
    config = read_run(new)
    assert config.distilled == Distilled(steps=3, guidance=2.0, guidance_given=2.0, spacing="late")
    assert config.train.lr == read_run(run).train.lr / 2 and config.train.compile is None
    assert read_run(run).distilled is None

    caplog.clear()  # of the file that is skipped
    out = tmp_path / "clip.mp4"
    sample = ["sample", str(new), "--out", str(out), "--device", "cpu", "--frames", "3"]
    assert main([*sample, "--size", "12x20"]) == 0
    assert "3/3" in capsys.readouterr().err and not caplog.text
    assert main([*sample, "--guidance", "4", "--image", str(folder / "left.png")]) == 0
    assert "the guidance asked for is not used" in caplog.text
    assert main(["sample", str(run), *sample[2:], "--sampler", "flow-map"]) == 2
    assert "needs a distilled run" in capsys.readouterr().err

    began = read_log(new / LOG)[-1]["step"]
    assert main([*distil, "--resume", "--minutes", "0.02", "--json"]) == 0
    told = capsys.readouterr()
    assert [json.loads(row) for row in told.out.splitlines()] == [r for r in read_log(new / LOG) if r["step"] > began]
    assert told.out and "going on from step" in told.err and (new / "loss.png").exists()
    for wrong, message in (
        (distil, "already holds a run"),
        ([*distil, "--resume", "--guidance", "3"], "--guidance: a run keeps what it was made with"),
        (["distill", str(new)], "distilled already"),
        (["distill", str(run), "--resume", "--out", str(run)], "was not made by `sora-fast distill`"),
        (["distill", str(tmp_path)], "holds no run"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_resume(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--resume", "--out", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "going on from step 3" in said
    assert f"at its end already. To train it for longer: sora-fast train --resume --out {run} --steps 6" in said


def test_resume_with_changes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = read_run(run)
    compiled = replace(before, train=replace(before.train, compile="inductor"))
    write_config(tmp_path / "run" / CONFIG, compiled)
    options = ["--steps", "5", "--lr", "1e-4", "--save-every", "2", "--no-compile", "--device", "cpu"]
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), *options]) == 0
    changed = replace(before.train, steps=5, lr=1e-4, save_every=2, compile=None)
    assert read_run(tmp_path / "run") == replace(before, train=changed)
    rows = read_log(tmp_path / "run" / LOG)
    assert len(rows) == 5
    assert "at its end already" not in capsys.readouterr().out
    assert rows[-1]["lr"] < 1e-4
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--minutes", "1e-9", "--device", "cpu"]) == 0
    assert (read_run(tmp_path / "run").train.steps, read_run(tmp_path / "run").train.minutes) == (None, 1e-9)


def test_a_diverged_run_goes_on_with_a_smaller_learning_rate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", str(folder), "--out", str(run), "--steps", "4", "--lr", "1e30", *SMALL]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    # The first step's gradient is finite, and its rate ruins the weights.
    assert "not finite in 3 steps in a row, 2 to 4;" in error
    assert main(["train", "--replay", "--out", str(run), "--device", "cpu"]) == 0
    assert "step 2, worker 0, pack 0: loss nan; not finite first in the " in capsys.readouterr().out
    command = error[error.index("train --resume") :].split()
    assert command == ["train", "--resume", "--out", str(run), "--lr", "3e+29"]
    assert main([*command[:-1], "1e-3", "--device", "cpu"]) == 0
    assert len(read_log(run / LOG)) == 4


def test_other_data_is_not_gone_on_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, run = tmp_path / "data", str(tmp_path / "run")
    shutil.copytree(folder, data)
    assert main(["train", "--data", str(data), "--out", run, "--steps", "1", *SMALL]) == 0
    (data / "left.txt").write_text("brighter to the left")
    assert main(["train", "--resume", "--out", run, "--device", "cpu"]) == 2
    assert "files, their sizes or their captions have changed" in capsys.readouterr().err


def test_a_run_works_from_anywhere_and_is_told_what_has_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    save_clip(here / "clip")
    shutil.copytree(folder, here / "clips")
    monkeypatch.chdir(here)
    assert main(["train", "--data", "clips", "--text-encoder", "clip", "--out", "run", "--steps", "1", *SMALL]) == 0
    monkeypatch.chdir(tmp_path)
    resume = ["train", "--resume", "--out", "here/run", "--device", "cpu"]
    sample = [
        "sample",
        "here/run",
        "--out",
        "a.png",
        "--frames",
        "1",
        "--size",
        "8x8",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*resume, "--steps", "2"]) == 0
    assert main(sample) == 0

    there.mkdir()
    for name in ("clip", "clips"):
        (here / name).rename(there / name)
    capsys.readouterr()
    assert main(resume) == 2
    assert "say where the run's data is now: --data FOLDER" in capsys.readouterr().err
    assert main([*resume, "--data", "there/clips"]) == 2
    assert "--text-encoder FOLDER" in capsys.readouterr().err
    assert main(sample) == 2
    assert "--text-encoder FOLDER" in capsys.readouterr().err
    assert main([*sample, "--text-encoder", "there/clip"]) == 0
    assert main([*resume, "--data", "there/clips", "--text-encoder", "there/clip", "--steps", "3"]) == 0
    assert main([*resume, "--steps", "4"]) == 0  # it remembers
    assert read_run(here / "run").data.folder == str(there / "clips")

    (there / "clips" / "right.txt").write_text("another caption")
    assert main([*resume, "--data", "there/clips"]) == 2
    assert "files, their sizes or their captions have changed" in capsys.readouterr().err
    tokenizer = there / "clip" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("seven", "eight"))
    assert main([*sample, "--text-encoder", "there/clip"]) == 2
    assert "holds another text encoder" in capsys.readouterr().err


def test_captions_and_prompts_that_are_cut_are_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    (data / "left.txt").write_text("l" * 300)
    assert main(["train", "--data", str(data), "--out", str(run), "--steps", "3", *SMALL]) == 0
    assert "2 files to train on, 2 with a caption and 0 without; 1 skipped" in capsys.readouterr().out
    cut = "cut to the 255 bytes that the text encoder takes: a text of"
    assert [message for message in caplog.messages if "cut" in message] == [f"{cut} 300, '{'l' * 39}…'"]
    caplog.clear()
    sample = ["sample", str(run), "--out", str(tmp_path / "a.png"), "--frames", "1", "--size", "8x8", "--steps", "1"]
    assert main([*sample, "--device", "cpu", "--prompt", "p" * 256]) == 0
    assert caplog.messages == [f"{cut} 256, '{'p' * 39}…'"]


def _clip(path: Path, fps: float) -> Path:
    """Four frames that are written by PyAV alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for level in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 60 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _frame_rate(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate)


@pytest.fixture(scope="module")
def run_at_30(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    (folder / "data").mkdir()
    for name, fps in {"a.mp4": 30, "b.mp4": 60, "c.mp4": 30}.items():
        _clip(folder / "data" / name, fps)
    arguments = ["train", "--data", str(folder / "data"), "--out", str(folder / "run"), "--steps", "1", *SMALL]
    assert main(arguments) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("image", "end", "options", "fps", "said"),
    [
        (None, None, "", 30, None),
        (30, None, "", 30, None),
        (60, None, "", 60, "--image 60, the run's videos 30; the result has 60"),
        (None, 12, "", 12, "--end 12, the run's videos 30; the result has 12"),
        (30, 60, "", 30, "--image 30, --end 60, the run's videos 30; the result has 30"),
        (60, None, "--fps 24", 24, "--image 60, the run's videos 30; the result has 24"),
        (None, None, "--fps 24", 24, None),
    ],
)
def test_what_is_made_is_as_fast_as_the_data_or_the_given_clip(
    image: int | None,
    end: int | None,
    options: str,
    fps: int,
    said: str | None,
    run_at_30: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out.mp4"
    command = ["sample", str(run_at_30), "--frames", "9", "--size", "16x16", "--steps", "1", "--out", str(out)]
    for option, rate in {"--image": image, "--end": end}.items():
        if rate is not None:
            command += [option, str(_clip(tmp_path / f"{option}.mp4", rate))]
    assert main([*command, *options.split(), "--device", "cpu"]) == 0
    assert _frame_rate(out) == fps
    messages = [message for message in caplog.messages if "frames per second" in message]
    assert messages == ([] if said is None else [f"not the same frames per second: {said}"])


@pytest.mark.parametrize(
    ("clips", "options", "fps", "data_fps", "said"),
    [
        ({"a": 25}, "", 25, 25, "the videos run at 25 frames per second; what is made will run at 25"),
        ({"a": 25, "b": 50}, "--fps 5", 5, 5, "the videos run at 5 frames per second; what is made will run at 5"),
        (
            {"a": 50, "b": 25, "c": 25},
            "",
            25,
            25,
            "the videos run at different rates, 2 at 25, 1 at 50 frames per second; what is made will run at 25",
        ),
        ({}, "", 8, None, None),
        ({}, "--fps 5", 5, None, None),
    ],
)
def test_the_rate_of_a_run_is_that_of_its_data(
    clips: dict[str, int],
    options: str,
    fps: float,
    data_fps: float | None,
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    write_media(tmp_path / "data" / "still.png", torch.zeros(3, 1, 16, 16))
    for name, rate in clips.items():
        _clip(tmp_path / "data" / f"{name}.mp4", rate)
    command = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL]
    assert main([*command, *options.split()]) == 0
    config = read_run(tmp_path / "run")
    assert (config.fps, config.data_fps) == (fps, data_fps)
    lines = [line for line in capsys.readouterr().out.splitlines() if "frames per second" in line]
    assert lines == ([] if said is None else [said])


def test_runs_from_before_rates_were_known_keep_theirs(run_at_30: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.mp4"
    shutil.copytree(run_at_30, run)
    values = json.loads((run / CONFIG).read_text())
    del values["data_fps"]
    (run / CONFIG).write_text(json.dumps(values | {"fps": 8.0}))
    command = ["sample", str(run), "--frames", "5", "--size", "16x16", "--steps", "1", "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    assert _frame_rate(out) == 8
    assert main([*command, "--device", "cpu", "--image", str(_clip(tmp_path / "given.mp4", 30))]) == 0
    assert _frame_rate(out) == 30


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_names_what_the_text_encoders_take(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{ByteTextEncoder(8).max_bytes} bytes" in said
    assert "77" in said
    assert f"{T5_TOKENS}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --out {tmp}/new", "needs --data FOLDER"),
        ("train --data {tmp} --resume --out {run}", "no usable video or image"),
        ("train --data {tmp}/absent --resume --out {run}", "absent is no folder; say where the run's data is now"),
        ("train --text-encoder {tmp} --resume --out {run}", "the run has no text encoder from a folder"),
        ("sample {run} --out {tmp}/a.mp4 --text-encoder {tmp}", "the run has no text encoder from a folder"),
        ("train --resume --out {run} --seed 0 --dim 32", "--dim, --seed: a run keeps what it was made with"),
        ("train --resume --out {run} --steps 5 --minutes 1 --device cpu", "exactly one"),
        ("train --data {tmp}/absent --out {tmp}/new --steps 1 --minutes 1", "exactly one"),
        ("train --data {tmp}/absent --out {tmp}/new --heads 5 --device cpu", "--heads 5: it must divide --dim 192"),
        ("train --data {tmp}/absent --out {tmp}/new --heads 2 --dim 6", "--heads 2: it must divide --dim 6"),
        ("train --data {tmp}/absent --out {run}", "already holds a run"),
        ("train --data {tmp}/absent --out {data}/left.png/new", "left.png: Not a directory"),
        ("train --data {tmp}/absent --out /proc/new", "nothing can be written to /proc"),
        ("train --data {tmp}/absent --out {tmp}/new", "is not a folder"),
        ("train --data {tmp} --out {tmp}/new", "no usable video or image"),
        ("train --data {data} --out {tmp}/new --capacity 9 --max-side 24 --patch 1x4x4", "left.png has 24 tokens"),
        ("train --data {tmp}/absent --out {tmp}/new --device mps", "--device mps: it must be cpu, cuda"),
        ("train --data {tmp}/absent --out {tmp}/new --device gpu", "--device gpu: it must be cpu, cuda"),
        ("train --data {tmp}/absent --out {tmp}/new --device cuda:99", "--device cuda:99: there "),
        ("train --resume --out {tmp}", "holds no run"),
        ("sample {tmp} --out {tmp}/a.mp4", "holds no run"),
        ("sample {run} --out {tmp}/a.mp4 --image {data}/empty.mp4", "empty file"),
        ("sample {run} --out {tmp}/a.mp4 --image {data}/absent.mp4", "absent.mp4: No such file or directory"),
        ("sample {run} --out {tmp}/a.png --frames 1 --size 99999999x99999999 --device cpu", "out of memory"),
        ("report {tmp}/absent.json", "absent.json: No such file or directory"),
        ("sample {run} --out {tmp}/a.mp4 --image {data}/left.png --size 8x8", "must agree"),
        ("sample {run} --out {tmp}/a.mp4 --sampler rk4", "must be one of euler"),
        ("sample {run} --out {tmp}/a.mp4 --frames 1 --image {data}/left.png", "there must be more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    command = arguments.format(tmp=tmp_path, data=folder, run=run).split()
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sora-fast: error: ")
    assert message in error
    assert not (tmp_path / "new").exists()


# What the output can fail on takes the place of no other error: the run is a good one, and its weights are not touched.
BAD_OUTPUTS = [
    ("--out {tmp}/a.txt", "a.txt: it must end in .mp4, .gif, .png"),
    ("--out {tmp}/a.png --frames 2", "a .png holds one frame"),
    ("--out {tmp}/folder.mp4", "folder.mp4: it is a folder"),
    ("--out {data}/left.png/a.mp4", "left.png: Not a directory"),
    ("--out /proc/a.mp4", "nothing can be written to /proc"),
    ("--out {tmp}/%s.mp4" % ("a" * 252), "File name too long"),
    ("--out {tmp}/a.mp4 --fps 1e30", "1e+30 frames per second: an .mp4 holds rates from 0.0001"),
    ("--out {tmp}/a.mp4 --fps 0.00001", "1e-05 frames per second: an .mp4 holds rates from 0.0001"),
    (
        "--out {tmp}/a.gif --fps 0.0001",
        "0.0001 frames per second: a .gif shows no frame for longer than 655.35 seconds",
    ),
    ("--out {tmp}/a.mp4 --size 16386x16", "H.264 takes no frames of 16386x16 pixels"),
    ("--out {tmp}/a.mp4 --size 1000x16 --scale 17", "H.264 takes no frames of 17000x272 pixels"),
    ("--out {tmp}/a.mp4 --size 99999999x99999999", "H.264 takes no frames"),
    ("--out {tmp}/a.gif --size 4x65536", "a .gif has no side of more than 65535 pixels"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OUTPUTS)
def test_a_bad_output_is_refused_before_the_work(
    arguments: str,
    message: str,
    run: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("the work has begun"))
    options = arguments.format(tmp=tmp_path, data=folder).split()
    assert main(["sample", str(run), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"sora-fast: error: --out {options[1]}: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_out_of_memory_while_sampling_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(media, "check_output", lambda *_, fps, **__: fps)
    arguments = ["--out", str(tmp_path / "a.mp4"), "--size", "99999999x99999999", "--device", "cpu"]
    assert main(["sample", str(run), *arguments]) == 2
    assert "out of memory" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["take:2.mp4", os.fsdecode(b"caf\xe9.mp4"), "new/take.gif"])
def test_results_of_any_name(
    run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--frames", "2", "--size", "16x16", "--steps", "1", "--device", "cpu"]
    assert main(["sample", str(run), "--out", name, *options]) == 0
    assert read_media(name).shape == (3, 2, 16, 16)
    shown = name.encode(errors="backslashreplace").decode()
    assert f"{shown}: 2 frames of 16x16, 8 a second\n" in capsys.readouterr().out


def test_the_rate_that_will_be_played_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--frames", "2", "--size", "16x16", "--steps", "1", "--fps", "61", "--device", "cpu"]
    for name, played in [("a.gif", 50), ("a.mp4", 61)]:
        assert main(["sample", str(run), "--out", str(tmp_path / name), *options]) == 0
        assert f"{name}: 2 frames of 16x16, {played} a second\n" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == [
        "61 frames per second are asked for; a .gif plays at 50"
    ]


def test_what_cannot_be_written_after_all_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run's")

    def full(path: Path, *_: object, **__: object) -> None:
        raise media.UnwritableMedia(path, "cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(media, "write_frames", full)
        arguments = ["--out", str(tmp_path / "it's.gif"), "--frames", "3", "--size", "12x16", "--fps", "25"]
        assert main(["sample", str(tmp_path / "run's"), "--steps", "1", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"--out {tmp_path}/it's.gif: cannot be written: No space left on device; kept in {tmp_path}/run's/un" in error
    )
    command = shlex.split(error[error.index("python -c ") :])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert read_media(tmp_path / "it's.gif", fps=25).shape == (3, 3, 12, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "", "--out", "{tmp}/new"],
        ["train", "--data", "{tmp}", "--out", ""],
        ["train", "--data", "{tmp}", "--out", "{tmp}/new", "--text-encoder", ""],
        ["sample", "", "--out", "{tmp}/a.mp4"],
        ["sample", "{tmp}", "--out", ""],
        ["sample", "{tmp}", "--out", "{tmp}/a.mp4", "--image", ""],
        ["sample", "{tmp}", "--out", "{tmp}/a.mp4", "--end", ""],
        ["report", ""],
        ["report", "{tmp}/a.json", "--out", ""],
        ["demo", "--out", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert stop.value.code == 2
    assert "'' is no file or folder; the current folder is ." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["paint"], ["sample", "run", "--out", "a.mp4", "--size", "12"]])
def test_argparse_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("sample --scale", "0 -1 2.5"),
        ("sample --cache", "-0.1 1 nan"),
        ("sample --steps", "0"),
        ("sample --frames", "0"),
        ("sample --fps", "0 -8 inf nan fast"),
        ("sample --guidance", "nan"),
        ("sample --seed", "-1 9223372036854775808"),
        ("train --dim", "0"),
        ("train --depth", "0"),
        ("train --heads", "0"),
        ("train --capacity", "0"),
        ("train --max-frames", "0"),
        ("train --lr", "0"),
        ("train --ema-decay", "1"),
        ("train --caption-dropout", "1.1"),
        ("train --seed", "-1"),
    ],
)
def test_numbers_out_of_range_are_named(option: str, values: str, capsys: pytest.CaptureFixture) -> None:
    command, name = option.split()
    arguments = {"sample": ["run", "--out", "a.mp4"], "train": ["--data", "absent", "--out", "run"]}[command]
    for value in values.split():
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments, name, value])
        assert stop.value.code == 2
        assert f"argument {name}: '{value}' is not a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ("train --data a --out b --patch 4x4", "3 positive whole numbers with an x between, like 1x4x4"),
        *(
            (f"sample a --out b.mp4 --guidance-interval {given}", "with a colon between, like 0.2:0.8")
            for given in ("1", "0.5:0.2", "0:2", "a:b", "0:nan")
        ),
        ("sample a --out b.mp4 --size 0x0", "2 positive whole numbers with an x between, like 64x48"),
    ],
)
def test_sizes_are_shown_by_example(arguments: str, example: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert example in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["sample"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys; from sora_fast.cli import _parser; _parser().format_help(); "
        "print([m for m in ('av', 'transformers', 'sora_fast.models') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("sora-fast 0.")


def test_what_a_run_tells_meanwhile(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    line = ["train", "--data", str(folder), "--out", str(run), "--steps", "4", "--json", "--sample-every", "2", *SMALL]
    assert main(line) == 0
    told = capsys.readouterr()
    rows = [json.loads(row) for row in told.out.splitlines()]
    assert rows == read_log(run / LOG) and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 and 0 <= row["waiting"] <= 1 for row in rows)
    assert "files to train on" in told.err and "Done: 4 steps" in told.err
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert (run / "loss.png").exists()
    plain = ["train", "--data", str(folder), "--out", str(tmp_path / "other"), "--steps", "4", *SMALL]
    assert main(plain) == 0
    losses = [[row["loss"] for row in read_log(folder / LOG)] for folder in (run, tmp_path / "other")]
    assert losses[0] == losses[1], "sampling meanwhile changes nothing"


@pytest.mark.parametrize("options", [[], ["--precision", "float32"]], ids=["auto", "float32"])
def test_a_precision_that_was_not_asked_for_is_said(
    options: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sora_fast.training.beginning.fitting_precision", lambda device: ("bfloat16", 2.0))
    line = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL, *options]
    assert main(line) == 0
    said = "computing in bfloat16, measured to be faster here" in capsys.readouterr().out
    assert said == (read_run(tmp_path / "run").train.precision == "bfloat16") == (not options)


@pytest.mark.parametrize(
    ("line", "options"),
    [("train --out a", TrainOptions), ("train-vae --out a", VAEOptions), ("sample a --out b.png", SampleOptions)],
)
def test_every_option_can_be_said_and_has_one_default(line: str, options: type) -> None:
    """What is parsed is what the dataclass takes, so that neither can be forgotten."""
    actions = _parser()._subparsers._group_actions[0].choices[line.split()[0]]._actions
    assert {action.dest for action in actions} - {"help"} == {field.name for field in fields(options)} - {"given"}
    said = {k: v for k, v in vars(_parser().parse_args(line.split())).items() if k != "command"}
    needed = {field.name: said[field.name] for field in fields(options) if field.default is MISSING}
    assert options(**said) == options(**needed)


def test_data_options_reach_the_run_and_the_workers_may_change(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["train", "--out", str(tmp_path / "run")]
    sizes = [*SMALL, "--steps", "2"]
    options = ["--workers", "2", "--drop", "decreasing:0.6-0.2", "--seed", "3"]
    assert main([*line, "--data", str(folder), *sizes, *options]) == 0
    config = read_run(tmp_path / "run")
    assert config.train.workers == 2
    assert config.train.batch.drop == SigmoidDrop(2, 0.6, 0.2)
    assert config.data.clips == "anywhere"
    assert main([*line, "--resume", "--steps", "4", "--workers", "0"]) == 0
    assert read_run(tmp_path / "run").train.workers == 0
    assert [row["step"] for row in read_log(tmp_path / "run" / LOG)] == [1, 2, 3, 4]
    capsys.readouterr()
    assert main([*line, "--resume", "--steps", "6", "--clips", "first"]) == 2
    assert "--clips: a run keeps what it was made with" in capsys.readouterr().err


def test_options_of_the_step_reach_the_run_and_some_may_change(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["train", "--out", str(tmp_path / "run")]
    options = "--accumulate 2 --recompute block --compile model --drop decreasing:0.6-0.2 --workers 0 --steps 2"
    assert main([*line, "--data", str(folder), *SMALL, *options.split()]) == 0
    train = read_run(tmp_path / "run").train
    assert (train.accumulate, train.recompute, train.compile, train.compile_scope) == (2, "block", None, "model")
    assert train.batch.drop == SigmoidDrop(4, 0.6, 0.2), "of four batches"
    assert main([*line, "--resume", "--steps", "3", "--recompute", "selective"]) == 0
    assert read_run(tmp_path / "run").train.recompute == "selective"
    capsys.readouterr()
    assert main([*line, "--resume", "--accumulate", "3"]) == 2
    assert "--accumulate: a run keeps what it was made with" in capsys.readouterr().err
    assert main([*line, "--replay"]) == 2
    assert "no step is kept there for a replay" in capsys.readouterr().err


def test_a_run_from_before_there_was_a_choice_goes_on_with_first_frames(folder: Path, tmp_path: Path) -> None:
    line = ["train", "--out", str(tmp_path / "run")]
    assert main([*line, "--data", str(folder), *SMALL, "--steps", "2", "--clips", "first"]) == 0
    place = tmp_path / "run" / CONFIG
    content = json.loads(place.read_text())
    for part, name in ((content["data"], "clips"), (content["train"], "workers"), (content["train"]["batch"], "drop")):
        del part[name]  # as it was written then
    place.write_text(json.dumps(content))
    assert main([*line, "--resume", "--steps", "3"]) == 0
    config = read_run(tmp_path / "run")
    assert (config.data.clips, config.train.workers, config.train.batch.drop) == ("first", 0, None)


@pytest.mark.parametrize(
    ("cores", "local", "workers"), [(1, "1", 1), (2, "1", 1), (8, "1", 7), (96, "8", 8), (64, "1", 8)]
)
def test_as_many_data_workers_as_suit_the_machine(
    cores: int, local: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU none, where they would take a core from the step."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert data_workers(None, "cuda:0") == workers and data_workers(3, "cuda:0") == 3
    assert new_config(TrainOptions(tmp_path / "run", data="clips"), "cpu").train.workers == 0
    assert new_config(TrainOptions(tmp_path / "run", data="clips", workers=3), "cpu").train.workers == 3


def test_the_whole_model_is_compiled_where_a_run_is_long_enough(tmp_path: Path) -> None:
    def scope(**options: Any) -> str:
        o = TrainOptions(tmp_path / "run", data="clips", **options)
        return new_config(o, "cpu").train.compile_scope

    assert scope() == "model", "half an hour"
    assert [scope(minutes=minutes) for minutes in (3.9, 4)] == ["blocks", "model"]
    assert [scope(steps=steps, depth=2) for steps in (499, 500)] == ["blocks", "model"]
    assert [scope(minutes=1, compile="model"), scope(compile="blocks")] == ["model", "blocks"]
    assert compile_scope("auto", "cuda", 4, steps=10**6, minutes=None) == "blocks"


def test_an_autoencoder_and_a_model_of_its_latents(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vae, run = str(tmp_path / "vae"), str(tmp_path / "run")
    line = ["train-vae", "--out", vae, "--max-side", "32", "--crop", "16", "--max-frames", "5", "--workers", "0"]
    assert main([*line, "--data", str(folder), "--steps", "2", "--channels", "3"]) == 0
    assert "Done: 2 steps. To use it: sora-fast train --data" in capsys.readouterr().out
    assert main(["train-vae", "--out", vae, "--resume", "--steps", "3"]) == 0
    assert [row["step"] for row in read_log(tmp_path / "vae" / LOG)] == [1, 2, 3]
    assert main(["train-vae", "--out", vae, "--resume", "--kl", "1"]) == 2
    assert "--kl: a run keeps what it was made with" in capsys.readouterr().err
    assert (
        main(["train", "--data", str(folder), "--codec", vae, "--out", run, "--steps", "1", *SMALL[:6], *SMALL[8:]])
        == 0
    )
    model = read_run(tmp_path / "run").model
    assert (model.in_channels, model.patch_size) == (3, (1, 2, 2))
    out = tmp_path / "clip.mp4"
    capsys.readouterr()
    assert main(["sample", run, "--frames", "6", "--size", "18x22", "--steps", "1", "--out", str(out)]) == 0
    assert media.read_clip(out).video.shape == (3, 6, 18, 22)
    assert main(["sample", vae, "--out", str(out)]) == 2
    assert "is not a valid RunConfig" in capsys.readouterr().err
