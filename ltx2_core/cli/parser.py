"""The commands put together: one module each, with ``NAME``, ``HELP``, ``EXAMPLES``, ``options(parser)`` and ``run(args)``."""

import argparse

from .. import __version__
from . import (
    calibrate,
    compare_reference,
    convert,
    generate,
    inspect_file,
    lora,
    make_synthetic,
    strip,
    swap_loaders,
    verify,
)
from .printing import PROG

COMMANDS = (
    inspect_file,
    convert,
    calibrate,
    strip,
    verify,
    generate,
    lora,
    swap_loaders,
    make_synthetic,
    compare_reference,
)

_EXAMPLES = f"""examples:
  {PROG} inspect ltx-2.3-22b-dev-Q4_K_M.gguf
  {PROG} convert ltx-2.3-22b-dev.safetensors ltx-2.3-q4_0.gguf --type q4_0
  {PROG} generate --model ltx-2.3-q4_0.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf --prompt "waves at dusk" -o waves.mp4
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks, and adds default values to what is said about options."""

    def _get_help_string(self, action):
        text = action.help or ""
        if "default" in text or action.default in (None, False, [], argparse.SUPPRESS):
            return text
        return f"{text} (default: %(default)s)".strip()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.run`` is the function to call."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="LTX-2 and LTX-2.3 video from GGUF weights.", formatter_class=Help, epilog=_EXAMPLES
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for module in COMMANDS:
        sentence = module.HELP[0].upper() + module.HELP[1:] + "."
        command = commands.add_parser(
            module.NAME, help=module.HELP, description=sentence, formatter_class=Help, epilog=module.EXAMPLES
        )
        command.add_argument("-v", "--verbose", action="store_true", help="log what is done, and full errors")
        module.options(command)
        command.set_defaults(run=module.run, help_text=command.format_help)
    parser.set_defaults(help_text=parser.format_help)
    return parser
