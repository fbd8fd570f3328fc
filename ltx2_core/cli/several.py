"""Options of ``generate`` for several GPUs and for files of prompts, and the runs they describe."""

import json
import os
import re
import secrets
import sys
from pathlib import Path

from .printing import note, print_out


def options(command) -> None:
    """Add the options to the command's parser."""
    group = command.add_argument_group("several GPUs, several prompts")
    group.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="one process per GPU: one clip faster, or the lines of --prompts shared out",
    )
    group.add_argument("--explain", action="store_true", help="say how --gpus would be used, and make nothing")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help='JSON lines, a video each: {"prompt": ..., "seed": 7, ...}'
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where the videos of --prompts go; those that are there are not made again",
    )
    group.add_argument(
        "--worker", metavar="I/N", help="take every N-th line of --prompts, from line I on (counted from 0)"
    )


def check(args) -> None:
    """Refuse what does not fit together (usage errors end the command)."""
    if (args.prompt is None) == (args.prompts is None):
        args.usage_error("name what to make with --prompt, or a file of prompts with --prompts")
    if args.prompts is not None and (args.output_dir is None or args.output is not None):
        args.usage_error("--prompts writes to --output-dir, not to -o")
    if args.gpus is not None and args.gpus < 1:
        args.usage_error(f"--gpus is {args.gpus}; it must be 1 or more")
    if args.explain and args.gpus is None:
        args.usage_error("--explain tells how --gpus N would be used; name N")
    if args.worker is not None:
        worker_of(args.worker)


def worker_of(text: str) -> tuple[int, int]:
    """``I/N`` -> (I, N). Raises ValueError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"The worker {text!r} is no I/N with I from 0 to N - 1; write for example 0/8.")
    return int(found[1]), int(found[2])


def launch(args) -> int:
    """Start a process per GPU that runs this command without ``--gpus``."""
    from ..parallel import launch as launcher

    arguments = list(args.arguments)
    at = next(i for i, argument in enumerate(arguments) if argument == "--gpus" or argument.startswith("--gpus="))
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    launcher.launch(launcher.own_command(__package__, arguments), args.gpus, together=args.prompts is None)
    return 0


def ranks(args):
    """The processes that make this clip together, when this is one of several; else None."""
    from ..parallel import group

    if not group.started_by_torchrun():
        return None
    import torch

    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ValueError(
            f"Several processes work on cuda devices or on the CPU, not on {kind!r}; leave --device out, or pass cuda or cpu."
        )
    return group.Ranks(kind)


def common_seed(seed: int | None, together) -> int:
    """The seed, or a random one: the same on all ranks."""
    if seed is not None:
        return seed
    drawn = secrets.randbits(32)
    if together is None:
        return drawn
    import torch

    return int(together.from_first(torch.tensor(drawn, dtype=torch.int64)))


def explain(pipeline, run, gpus: int) -> int:
    """Print how so many GPUs would make this clip."""
    from ..parallel.plan import plan, work_of
    from ..sampling.conditioning import latent_shape

    frames, height, width = latent_shape(run.width, run.height, run.frames)
    print_out(plan(work_of(pipeline.dit, frames * height * width), run.guidance.passes, gpus).text())
    return 0


def read_jobs(args) -> list:
    """The lines of ``--prompts`` that fall to this worker. Raises PromptFileError, before anything is loaded."""
    from ..parallel import prompts

    worker, workers = (
        worker_of(args.worker)
        if args.worker
        else (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.results = args.output_dir / f"results-{worker}.jsonl"
    return prompts.share(prompts.read(args.prompts, args.output_dir), worker, workers)


def make_all(args, jobs: list, make) -> int:
    """Work through the lines; ``make(job)`` makes one video and returns what to record. Returns 1 when a line failed."""
    from ..parallel import prompts

    failed = 0
    for record in prompts.work(jobs, make, args.results):
        failed += record["status"] == "failed"
        if args.json:
            print_out(json.dumps(record, ensure_ascii=False))
        else:
            note(f"line {record['line']}: {record['status']}{': ' + record['error'] if 'error' in record else ''}")
    if failed:
        print(f"{failed} of {len(jobs)} lines failed; {args.results} has their errors.", file=sys.stderr)
    return 1 if failed else 0


def own_device(args):
    """The device of a worker that was started beside others: its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if args.prompts is None or local is None or args.device not in (None, "cuda"):
        return args.device
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else args.device
