"""Pictures and clips in and out."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ltx2_gguf.ltx2_core import media


def picture(height=48, width=64, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 4, 5), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def test_a_picture_with_alpha_is_read_on_black(tmp_path):
    from PIL import Image

    image = np.zeros((4, 6, 4), np.uint8)
    image[..., 0] = 200
    image[:2, :, 3] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    read = media.read_image(tmp_path / "a.png")
    assert read.shape == (4, 6, 3) and read.dtype == np.uint8
    assert (read[:2, :, 0] == 200).all() and (read[2:] == 0).all()


def test_a_picture_is_turned_as_its_orientation_tag_says(tmp_path):
    from PIL import Image

    image = Image.fromarray(picture(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(media.read_image(tmp_path / "a.png"), np.rot90(picture(20, 30), -1))


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(media.MediaError, match="a.png cannot be read as a picture"):
        media.read_image(tmp_path / "a.png")
    with pytest.raises(media.MediaError, match="a.png cannot be read as a video"):
        media.read_video(tmp_path / "a.png")


def test_damaged_and_monstrous_pictures_are_refused_in_a_sentence(tmp_path, monkeypatch):
    import zlib

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    (tmp_path / "bomb.png").write_bytes(head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    with pytest.raises(media.MediaError, match="bomb.png cannot be read as a picture .*exceeds limit"):
        media.read_image(tmp_path / "bomb.png")
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(40):
        data = bytearray(whole[: rng.integers(9, len(whole))] if number % 2 else whole)
        for place in rng.integers(8, len(data), 3):
            data[place] ^= rng.integers(1, 256)
        (tmp_path / "damaged.png").write_bytes(data)
        try:
            media.read_image(tmp_path / "damaged.png")
        except media.MediaError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("source", [(48, 64), (64, 48), (96, 64), (31, 57), (64, 96)])
def test_cover_keeps_the_centre_and_the_aspect(source):
    height, width = 64, 96
    rows = torch.linspace(-1, 1, source[0]).view(1, -1, 1, 1).expand(1, *source, 1)
    columns = torch.linspace(-1, 1, source[1]).view(1, 1, -1, 1).expand(1, *source, 1)
    out = media.resize_cover(torch.cat([rows, columns], dim=-1), width, height)
    assert out.shape == (1, height, width, 2)
    scale = max(height / source[0], width / source[1])
    assert abs(float(out.mean())) < 0.02  # centred
    slope = float(out[0, height // 2 + 8, 0, 0] - out[0, height // 2 - 8, 0, 0]) / 16
    assert slope == pytest.approx(2 / (source[0] - 1) / scale, rel=0.05)  # not squeezed


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture(64, 96)
    assert np.array_equal(media.resize_cover(torch.from_numpy(image)[None], 96, 64)[0].numpy(), image)


def test_pixels_are_the_frames_from_minus_one_to_one():
    frames = np.stack([picture(seed=s) for s in range(3)])
    pixels = media.to_pixels(frames)
    assert pixels.shape == (1, 3, 3, 48, 64)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(((pixels[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy(), frames)
    assert media.to_pixels(frames[0], 32, 32).shape == (1, 3, 1, 32, 32)


@pytest.mark.parametrize("crf", [0, 33])
def test_a_conditioning_picture_is_compressed_at_its_own_size_and_then_fitted(tmp_path, crf):
    from PIL import Image

    image = picture(90, 110)
    Image.fromarray(image).save(tmp_path / "a.png")
    pixels = media.prepare_image(tmp_path / "a.png", 96, 64, crf)
    assert pixels.shape == (1, 3, 1, 64, 96)
    expected = media.resize_cover(torch.from_numpy(media.crf_compress(image, crf))[None], 96, 64) / 127.5 - 1
    assert torch.equal(pixels[0, :, 0].permute(1, 2, 0), expected[0])
    assert torch.equal(media.prepare_image(image, 96, 64, crf), pixels)
    with pytest.raises(media.MediaError, match="float64 array"):
        media.prepare_image(image / 255, 96, 64)


def test_crf_0_changes_nothing_and_more_crf_loses_more():
    image = picture(49, 65)
    assert media.crf_compress(image, 0) is image
    losses = []
    for crf in (10, 33, 50):
        compressed = media.crf_compress(image, crf)
        assert compressed.shape == (48, 64, 3) and compressed.dtype == np.uint8
        losses.append(np.abs(compressed.astype(int) - image[:48, :64]).mean())
    assert 0 < losses[0] < losses[1] < losses[2] < 30


def test_crf_compression_equals_the_hosts(host):
    from comfy_extras import nodes_lt

    image = picture(48, 64)
    theirs = nodes_lt.preprocess(torch.from_numpy(image).float() / 255, 33)
    ours = torch.from_numpy(media.crf_compress(image, 33)).float() / 255
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "suffix, fps, as_floats",
    [
        (".mp4", 24, False),
        (".mp4", 23.976, True),
        (".mp4", Fraction(30000, 1001), True),
        (".webm", 12, True),
        (".gif", 12.5, False),
    ],
)
def test_a_written_clip_reads_back_with_what_was_noted(tmp_path, suffix, fps, as_floats):
    frames = np.stack([picture(seed=s) for s in range(5)])
    chunks = iter(torch.from_numpy(frames).float().div(255).split(2)) if as_floats else iter(frames)
    path = tmp_path / f"clip{suffix}"
    assert media.write_video(chunks, fps, path, metadata={"prompt": "sea \u2744", "seed": 3}) == 5
    read, rate = media.read_video(path)
    assert read.shape == frames.shape
    assert abs(float(rate) - float(fps)) < 0.01
    assert (
        np.abs(read.astype(int) - frames).mean() < 8
    )  # of saturated random colours: half resolution in yuv420p, 256 of them in a GIF
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert media.read_metadata(path) == {"prompt": "sea \u2744", "seed": 3}
    assert len(media.read_video(path, max_frames=2)[0]) == 2


def test_a_gif_keeps_its_length_although_delays_are_whole_hundredths(tmp_path):
    from PIL import Image

    media.write_video([picture(seed=s) for s in range(24)], 24, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        delays = []
        for index in range(image.n_frames):
            image.seek(index)
            delays.append(image.info["duration"])
    assert sum(delays) == 1000 and set(delays) == {40, 50}


@pytest.mark.parametrize(
    "name, fps, words",
    [("a.avi", 24, "ending in .mp4, .webm or .gif"), ("a.mp4", float("inf"), "above 0"), ("a.mp4", float("nan"), "above 0"), ("a.mp4", 0, "above 0"),
     ("a.gif", 60, "at most 50"), ("a.mp4", 1e-9, "less than")],
)  # fmt: skip
def test_a_video_that_no_container_holds_is_refused(tmp_path, name, fps, words):
    with pytest.raises(media.MediaError, match=words):
        media.write_video([picture()], fps, tmp_path / name)


def test_a_video_without_notes_has_none(tmp_path):
    for name in ("a.mp4", "a.gif"):
        media.write_video([picture()] * 2, 24, tmp_path / name)
        assert media.read_metadata(tmp_path / name) is None
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(media.MediaError, match="b.mp4 cannot be read"):
        media.read_metadata(tmp_path / "b.mp4")


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)])
def test_pure_colours_survive_the_mp4(tmp_path, colour):
    frames = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3))
    media.write_video(frames, 24, tmp_path / "a.mp4")
    read, _ = media.read_video(tmp_path / "a.mp4")
    assert np.abs(read[1].astype(int) - frames[1]).max() <= 8


def test_a_clip_that_fails_half_way_leaves_no_file(tmp_path):
    def frames():
        yield picture()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        media.write_video(frames(), 24, tmp_path / "a.mp4")
    with pytest.raises(media.MediaError, match="No frames"):
        media.write_video([], 24, tmp_path / "a.mp4")
    with pytest.raises(media.MediaError, match="shape"):
        media.write_video([np.zeros((4, 4), np.uint8)], 24, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
