"""A file of prompts, worked through line by line: a JSON object a line, a video a line, results a line.

Each line holds ``prompt`` and, where they differ from the command's, any of the settings below. A video that is already there is not made again, so a run that was broken off goes on
where it stopped; a line that fails is recorded and the next one is tried. Worker i of n takes the lines whose number is i modulo n, which needs no scheduler: a worker per GPU,
per Slurm task or per Ray actor is one command each. Standard library only.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SETTINGS = {
    "negative_prompt": str, "width": int, "height": int, "frames": int, "fps": (int, float), "steps": int, "schedule": str, "sampler": str, "cfg": (int, float),
    "stg": (int, float), "rescale": (int, float), "seed": int, "image_crf": int,
}  # fmt: skip


class PromptFileError(ValueError):
    """A file of prompts that can't be read, with the line."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class Job:
    """One line: its number in the file (from 1), the prompt, what differs, images as ``PATH[@FRAME[:STRENGTH]]``, and where the video goes."""

    line: int
    prompt: str
    settings: dict
    images: tuple[str, ...]
    output: Path


def read(path: Path, folder: Path, suffix: str = ".mp4") -> list[Job]:
    """All lines of a file; videos go to ``folder`` under the line's ``output`` or its number. Raises PromptFileError with the line and what is wrong."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"Could not read the prompts in {path}: {error}.") from None
    jobs, taken = [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        job = _job(path, number, line, folder, suffix)
        if job.output in taken:
            raise PromptFileError(
                f'Lines {taken[job.output]} and {number} of {path} both write {job.output.name}; give one of them another "output".'
            )
        taken[job.output] = number
        jobs.append(job)
    if not jobs:
        raise PromptFileError(
            f'{path} holds no prompts; write a JSON object a line, for example {{"prompt": "waves at dusk", "seed": 7}}.'
        )
    return jobs


def _job(path: Path, number: int, line: str, folder: Path, suffix: str) -> Job:
    def wrong(what):
        return PromptFileError(f"Line {number} of {path} {what}.")

    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(f"is no JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise wrong('has no text under "prompt"; write {"prompt": "..."}')
    settings = {key: value for key, value in entry.items() if key in SETTINGS}
    unknown = sorted(set(entry) - set(SETTINGS) - {"prompt", "images", "output"})
    if unknown:
        raise wrong(f"has an unknown setting {unknown[0]!r}; known are prompt, output, images, {', '.join(SETTINGS)}")
    for key, value in settings.items():
        if not isinstance(value, SETTINGS[key]) or isinstance(value, bool):
            raise wrong(
                f"gives {key} as {value!r}, which is no {'text' if SETTINGS[key] is str else 'number'} of the right kind"
            )
    images = entry.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise wrong('gives "images" that are no list of texts')
    name = entry.get("output", f"{number:05d}{suffix}")
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise wrong(f"gives the output {name!r}; write a file name without a folder")
    return Job(number, entry["prompt"], settings, tuple(images), folder / name)


def share(jobs: list[Job], worker: int, workers: int) -> list[Job]:
    """The jobs of worker ``worker`` of ``workers``, counted from 0."""
    return jobs[worker::workers]


def work(jobs: list[Job], make: Callable[[Job], dict], results: Path) -> Iterator[dict]:
    """Make every video that is not there yet; yield and append to ``results`` a record per line: line, output, status, and what ``make`` returns or the error.

    An expected failure (ValueError, RuntimeError, OSError, MemoryError) is recorded and the next line follows.
    """
    for job in jobs:
        record = {"line": job.line, "output": str(job.output)}
        if job.output.exists():
            yield record | {"status": "already there"}
            continue
        try:
            record |= {"status": "done"} | make(job)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            record |= {"status": "failed", "error": " ".join(str(error).split()) or type(error).__name__}
        with open(results, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
        yield record
