#!/usr/bin/env python3
"""From nothing to videos with one command: ``python scripts/demo.py``.

Sets up an environment of its own (ComfyUI included), starts the server on this machine alone, runs the shipped text-to-video and image-to-video
workflows through it, and prints where the videos are. The model is the small one that ships with the pack, so it runs on two CPU cores.
``--models DIR`` runs the same with your own LTX-2 files: every weight file below DIR is recognised by its content.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import environment


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__.split("\n\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--models",
        metavar="DIR",
        help="folder with your own LTX-2 / LTX-2.3 files and a Gemma-3 (searched recursively)",
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="use a tiny random checkpoint instead of the trained small model (proves the plumbing only)",
    )
    parser.add_argument("--prompt", help="what the text-to-video clip shows (default: a prompt that suits the model)")
    parser.add_argument("--image", metavar="FILE", help="the picture that image-to-video starts from")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--output", metavar="DIR", default=str(environment.home() / "videos"), help="where the videos are copied to"
    )
    parser.add_argument(
        "--host", metavar="FOLDER", help="another ComfyUI source tree to run in (default: the pinned version, fetched)"
    )
    parser.add_argument(
        "--keep-running", action="store_true", help="leave the server up afterwards and print its address"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="let the host use the GPU (default: CPU for the shipped model, GPU for --models where there is one)",
    )
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)  # --help and wrong options end here, before anything is installed
    python, variables = environment.ensure(host=args.host)
    env = {**os.environ, **variables}
    script = Path(__file__).with_name("demo_run.py")
    return subprocess.run([str(python), str(script), *argv], env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
