"""Video with sound without a host: a prompt to an mp4 with AAC, a given soundtrack, and the refusals."""

import numpy as np
import pytest
import torch

import wild_files
from ltx2_gguf.ltx2_core import sound
from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfigError
from ltx2_gguf.ltx2_core.audio.model import AudioError
from ltx2_gguf.ltx2_core.cli.__main__ import main
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline
from ltx2_gguf.ltx2_core.transformer.config import ConfigError

QUICK = {"width": 64, "height": 64, "frames": 9, "steps": 2, "cfg": 1.0, "stg": 0.0, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    geometry = wild_files.geometry("2.3", num_layers=2)
    synthetic.make(folder / "joint.gguf", geometry, type="q8_0", audio=True)
    synthetic.make(folder / "video.gguf", geometry, type="q8_0")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return LTX2Pipeline.from_files(folder / "joint.gguf", folder / "gemma.gguf", sound=True)


def heard(path):
    track = sound.read_soundtrack(path)
    return track.waveform, track.rate


def test_an_mp4_has_the_sound_that_was_made(pipe, tmp_path):
    frames = pipe.generate("a red kite", **QUICK)
    assert frames.shape == (9, 64, 64, 3) and pipe.soundtrack.rate == 48000
    assert pipe.soundtrack.waveform.shape == (
        2,
        33 * 480,
    )  # 9 latent frames of 9 pictures at 24 fps: 4 * 9 - 3 hundredths of a second
    assert pipe.save(frames, tmp_path / "kite.mp4") == 9
    waveform, rate = heard(tmp_path / "kite.mp4")
    assert (
        rate == 48000
        and abs(waveform.shape[1] - pipe.soundtrack.waveform.shape[1]) <= 2048
        and waveform.abs().max() > 0
    )
    again = pipe.generate("a red kite", **QUICK)
    assert torch.equal(frames, again)
    guided = pipe.generate("a red kite", **{**QUICK, "cfg": 3.0, "stg": 1.0, "steps": 1})
    assert torch.isfinite(guided).all() and torch.isfinite(pipe.soundtrack.waveform).all()


def test_a_budget_changes_nothing(folder, pipe):
    frames = pipe.generate("a red kite", **QUICK)
    waveform = pipe.soundtrack.waveform
    streamed = LTX2Pipeline.from_files(folder / "joint.gguf", folder / "gemma.gguf", sound=True, memory_budget=4)
    assert (streamed.generate("a red kite", **QUICK) - frames).abs().max() < 1e-4
    assert (streamed.soundtrack.waveform - waveform).norm() / waveform.norm() < 1e-3


def test_the_picture_follows_a_given_soundtrack(pipe, tmp_path):
    time = np.arange(22050) / 22050
    tone = torch.from_numpy(np.stack([np.sin(time * 2764), np.sin(time * 4000)]).astype(np.float32)) * 0.3
    given = pipe.generate("a singer", audio=sound.Soundtrack(tone, 22050), **QUICK)
    assert pipe.soundtrack.rate == 22050 and torch.equal(pipe.soundtrack.waveform, tone[:, : round(9 / 24 * 22050)])
    pipe.save(given, tmp_path / "tone.webm")
    waveform, rate = heard(tmp_path / "tone.webm")
    assert rate == 48000 and 0.15 < waveform[:, 4000:12000].std() < 0.3
    other = pipe.generate("a singer", audio=sound.Soundtrack(tone * 0, 22050), **QUICK)
    assert not torch.equal(given, other)


def test_from_the_command_line(folder, tmp_path, capsys):
    output = tmp_path / "a.mp4"
    arguments = [
        "generate",
        "--model",
        str(folder / "joint.gguf"),
        "--text-encoder",
        str(folder / "gemma.gguf"),
        "--prompt",
        "x",
        "-o",
        str(output),
        "-q",
    ]
    sizes = [
        "--width",
        "64",
        "--height",
        "64",
        "--frames",
        "9",
        "--steps",
        "1",
        "--cfg",
        "1",
        "--stg",
        "0",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*arguments, *sizes, "--sound"]) == 0
    assert heard(output)[1] == 48000
    assert main([*arguments[:-2], str(tmp_path / "b.mp4"), "-q", *sizes, "--audio", str(output)]) == 0
    assert heard(tmp_path / "b.mp4")[1] == 48000


def test_refusals(folder, pipe, tmp_path):
    with pytest.raises(AudioVAEConfigError, match="video.gguf: No audio VAE"):
        LTX2Pipeline.from_files(folder / "video.gguf", folder / "gemma.gguf", sound=True)
    with pytest.raises(ConfigError, match="holds the video model alone"):
        LTX2Pipeline.from_files(
            folder / "video.gguf", folder / "gemma.gguf", sound=True, audio_vae=folder / "joint.gguf"
        )
    video = LTX2Pipeline.from_files(folder / "video.gguf", folder / "gemma.gguf")
    with pytest.raises(ValueError, match="sound=True"):
        video.generate("x", audio=tmp_path / "song.mp3", **QUICK)
    with pytest.raises(AudioError, match="does not exist"):
        pipe.generate("x", audio=tmp_path / "song.mp3", **QUICK)
    (tmp_path / "text.mp3").write_text("no sound")
    with pytest.raises(AudioError, match="cannot be read as sound|holds no sound"):
        pipe.generate("x", audio=tmp_path / "text.mp3", **QUICK)
