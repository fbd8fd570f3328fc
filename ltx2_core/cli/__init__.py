"""The command line, one file per command.

run.py                                      runs a command: errors, signals, exit codes
parser.py                                   the commands put together
inspect_file.py, convert.py, calibrate.py, strip.py, verify.py, generate.py, lora.py, make_synthetic.py, compare_reference.py   the commands
compare.py                                  numbers beside those of a reference
printing.py                                 results, progress and sentences
"""

from .generate import parse_image, parse_lora
from .run import main
