"""The command line, one file per command.

parser.py        the commands and their options
generate.py      prompt to video
inspect_file.py  what a file is
compare.py       numbers beside those of a reference
output.py        what is printed, and where
"""

from .parser import build_parser, main, parse_image, parse_lora  # noqa: F401
