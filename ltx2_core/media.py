"""Pictures and clips in and out: reading, fitting to a size, CRF pre-compression, video files.

Frames here are uint8 arrays (F, H, W, 3) or (H, W, 3), RGB; the VAE's pixels are float tensors (B, 3, F, H, W) in [-1, 1]. Pillow and PyAV are
imported on first use.

Sources: ltx-pipelines ``utils/media_io.py`` (resize, centre crop, CRF pre-compression of conditioning images).
"""

import functools
import io
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..quant.output import Output
from .files.text import visible

CONTAINERS = (".mp4", ".webm", ".gif")
GIF_FASTEST = 50  # frames per second; a GIF's delays are whole hundredths of a second, and viewers slow down shorter ones than two


class MediaError(ValueError):
    """A picture or clip cannot be read or written."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def read_image(path) -> np.ndarray:
    """uint8 (H, W, 3), turned as the camera's orientation tag says; transparent parts are put on black."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return np.array(image.convert("RGB"))
    except (
        Exception
    ) as error:  # Pillow's readers raise many kinds: damaged chunks, wrong lengths, pictures far too large
        raise MediaError(
            f"{path} cannot be read as a picture ({visible(error)}); use a PNG, JPEG or WebP file."
        ) from error


def read_video(path, max_frames: int | None = None) -> tuple[np.ndarray, Fraction]:
    """(uint8 (F, H, W, 3), frames per second). max_frames: stop reading there."""
    import av

    frames = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path} has no video stream; use a video file.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate or Fraction(24)
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if max_frames is not None and len(frames) >= max_frames:
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{path} cannot be read as a video ({error}); use an mp4, webm or mov file.") from error
    if not frames:
        raise MediaError(f"{path} holds no frames; use another video file.")
    return np.stack(frames), Fraction(rate)


def resize_cover(frames: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Scale (F, H, W, C) until it covers width x height, then cut out the centre; float32, same value range.

    Bilinear without antialiasing, as in the official pipelines.
    """
    source_height, source_width = frames.shape[1:3]
    x = frames.float().movedim(-1, 1)  # (F, C, H, W)
    if (source_height, source_width) != (height, width):
        if (
            height * source_width >= width * source_height
        ):  # height decides; sizes in whole numbers, so that no rounding falls short
            size = height, -(-source_width * height // source_height)
        else:
            size = -(-source_height * width // source_width), width
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        x = x[:, :, top : top + height, left : left + width]
    return x.movedim(1, -1)


def to_pixels(frames, width: int | None = None, height: int | None = None) -> torch.Tensor:
    """uint8 frames (F, H, W, 3) or (H, W, 3) -> VAE pixels (1, 3, F, height, width) in [-1, 1], covering the size if one is given."""
    x = frames if isinstance(frames, torch.Tensor) else torch.tensor(np.asarray(frames))
    x = x[None] if x.ndim == 3 else x
    x = x.float() if width is None else resize_cover(x, width, height)
    return (x / 127.5 - 1).permute(3, 0, 1, 2)[None]


def prepare_image(image, width: int, height: int, crf: int = 33) -> torch.Tensor:
    """A conditioning picture -> VAE pixels (1, 3, 1, height, width): compressed at its own size, then scaled to cover and cropped.

    image: a path or a uint8 array (H, W, 3).
    """
    image = read_image(image) if isinstance(image, (str, os.PathLike)) else np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise MediaError(
            f"The picture is a {image.dtype} array of shape {image.shape}; give a path or a uint8 array (H, W, 3)."
        )
    return to_pixels(prepare_frames(torch.tensor(image)[None], width, height, crf))


def prepare_frames(frames: torch.Tensor, width: int, height: int, crf: int) -> torch.Tensor:
    """Conditioning frames (F, h, w, 3 or more) -> float32 (F, height, width, 3): compressed at their own size, then scaled to cover and cropped.

    frames: uint8, or float in [0, 1]; the value range stays. Channels beyond three (alpha) are dropped.
    """
    frames = frames[..., :3]
    if crf:
        full = 255.0 if frames.is_floating_point() else 1.0
        whole = (frames * full).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        frames = torch.stack([torch.from_numpy(crf_compress(frame, crf)) for frame in whole]).float() / full
    return resize_cover(frames, width, height)


def crf_compress(image: np.ndarray, crf: int) -> np.ndarray:
    """image (uint8 (H, W, 3)) as it looks after H.264 at the given CRF; an odd last row or column is cut off. crf 0 returns the image unchanged.

    The model was trained on compressed video and holds a clean still too still; this gives a conditioning picture the look of a video frame.
    """
    if crf == 0:
        return image
    import av

    image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
    if min(image.shape[:2]) < 2:
        raise MediaError(
            f"A picture of {image.shape[1]}x{image.shape[0]} pixels is too small to compress; use at least 2x2 or crf 0."
        )
    packed = io.BytesIO()
    with av.open(packed, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    packed.seek(0)
    with av.open(packed) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def _frames_one_by_one(chunks):
    """uint8 (H, W, 3) arrays from frames or stacks of frames; floats are taken as [0, 1]."""
    for chunk in chunks:
        x = chunk.detach() if isinstance(chunk, torch.Tensor) else torch.tensor(np.asarray(chunk))
        if x.is_floating_point():
            x = (x.float() * 255).round_().clamp_(0, 255).to(torch.uint8)
        x = x[None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[3] != 3:
            raise MediaError(f"Frames have shape {tuple(x.shape)}; (H, W, 3) or (F, H, W, 3) is needed.")
        yield from x.cpu().numpy()


def write_video(
    chunks, fps, path, crf: int | None = None, metadata: dict | None = None, overwrite: bool = True, sound=None
) -> int:
    """Write frames to a video file as they arrive; returns how many. The name's ending decides: H.264 .mp4, VP9 .webm, or .gif.

    chunks: iterable of uint8, or float in [0, 1], of shape (H, W, 3) or (F, H, W, 3). fps: number or Fraction. crf: quality (default 17 in mp4, 24 in
    webm; lower is better and larger). metadata: anything JSON can hold, written as the file's comment; ``read_metadata`` gives it back. The
    file appears under its name only when it is complete. Sizes that are odd lose a row or column in mp4 and webm, whose colours are
    stored at half resolution (yuv420p, BT.709). sound: function that gives (waveform float32 [2, N], samples per second) or None; it is asked
    once, after the first frame has come. It becomes AAC in mp4 and Opus in webm; a GIF has none. Raises MediaError, OutputError or OSError.
    """
    path = Path(path)
    rate = check_video(path, fps)
    comment = None if metadata is None else json.dumps(metadata)
    encode = _encode_gif if path.suffix.lower() == ".gif" else functools.partial(_encode_video, sound=sound)
    with Output(path, overwrite) as output:
        try:
            count = encode(output.partial, path.suffix.lower(), _frames_one_by_one(chunks), rate, crf, comment)
        except OSError as error:  # a full disk, told by the encoder's library without a name
            raise OSError(error.errno, error.strerror, str(path)) from error
        if count == 0:
            raise MediaError(f"No frames were given for {path}.")
    return count


def check_video(path, fps) -> Fraction:
    """The frame rate as a fraction. Raises MediaError for a name or a rate that ``write_video`` cannot write."""
    suffix = Path(path).suffix.lower()
    if suffix not in CONTAINERS:
        raise MediaError(
            f"{Path(path).name}: give the video a name ending in {', '.join(CONTAINERS[:-1])} or {CONTAINERS[-1]}."
        )
    if not math.isfinite(fps) or fps <= 0:
        raise MediaError(f"The frame rate is {fps}; it must be a number above 0.")
    if suffix == ".gif" and fps > GIF_FASTEST:
        raise MediaError(
            f"The frame rate is {fps}; a GIF shows at most {GIF_FASTEST} frames per second, so lower it or write an .mp4."
        )
    rate = Fraction(fps).limit_denominator(1001 * 30)
    if rate <= 0:
        raise MediaError(f"The frame rate is {fps}, which is less than a video file can state; raise it.")
    return rate


def read_metadata(path) -> dict | None:
    """What ``write_video`` wrote beside the frames, None where there is nothing of that kind. Raises MediaError for no video."""
    if Path(path).suffix.lower() == ".gif":
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                comment = image.info.get("comment", b"").decode("utf-8", "replace")
        except (OSError, UnidentifiedImageError) as error:
            raise MediaError(f"{path} cannot be read as a GIF ({error}).") from error
    else:
        import av

        try:
            with av.open(str(path)) as container:
                tags = {name.lower(): value for name, value in container.metadata.items()}
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{path} cannot be read as a video ({error}).") from error
        comment = tags.get("comment", "")
    try:
        found = json.loads(comment)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _encode_video(path, suffix, frames, rate, crf, comment, sound=None):
    import av

    if suffix == ".mp4":
        name, codec, crf, flags = "mp4", "libx264", 17 if crf is None else crf, {"movflags": "faststart"}
        options = {"crf": str(crf), "preset": "medium"}
    else:
        name, codec, crf, flags = "webm", "libvpx-vp9", 24 if crf is None else crf, {}
        options = {
            "crf": str(crf),
            "b": "0",
            "deadline": "good",
            "cpu-used": "4",
            "row-mt": "1",
        }  # b 0: the quality alone decides
    reformatter = av.video.reformatter
    count = 0
    with av.open(str(path), "w", format=name, options=flags) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = None
        for image in frames:
            image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
                context = stream.codec_context
                # 1 is BT.709 in every one of these tables, and limited range in the last
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
                heard = sound() if sound is not None else None
                audio_stream = (
                    None
                    if heard is None
                    else container.add_stream(
                        "aac" if suffix == ".mp4" else "libopus", layout="stereo", **_rate(suffix, heard[1])
                    )
                )
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=reformatter.Colorspace.ITU709,
                dst_color_range=reformatter.ColorRange.MPEG,
            )
            frame.pts, frame.time_base = count, 1 / rate
            for packet in stream.encode(frame):
                container.mux(packet)
            count += 1
        if stream is not None:
            for packet in stream.encode():
                container.mux(packet)
            if audio_stream is not None:
                _encode_audio(container, audio_stream, *heard)
    return count


def _rate(suffix, rate):
    """The encoder's rate: Opus knows few, 48000 among them."""
    return {"rate": rate if suffix == ".mp4" else 48000}


def _encode_audio(container, stream, waveform, rate):
    import av

    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(waveform.numpy(), dtype=np.float32), format="fltp", layout="stereo"
    )
    frame.sample_rate, frame.pts = rate, 0
    context = stream.codec_context
    resampler = av.AudioResampler(
        format=context.format, layout="stereo", rate=context.sample_rate, frame_size=context.frame_size or None
    )
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def _encode_gif(path, _suffix, frames, rate, _crf, comment):
    from PIL import Image

    count = 0

    def pictures():
        nonlocal count
        for image in frames:
            picture = Image.fromarray(image).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
            # Each delay is the difference of two rounded times, so that the whole clip keeps its length.
            picture.info["duration"] = 10 * (round((count + 1) * 100 / rate) - round(count * 100 / rate))
            count += 1
            yield picture

    stream = pictures()
    first = next(stream, None)
    if first is None:
        return 0
    options = {} if comment is None else {"comment": comment.encode()}
    first.save(path, format="GIF", save_all=True, append_images=stream, loop=0, optimize=False, **options)
    return count
