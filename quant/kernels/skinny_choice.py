"""Which kernel takes a product with few rows of x, by format, number of rows and number of output columns.

Kernels: "one row" and "few rows" of ``kernels/triton_matmul.py`` decode to x's type; "patterns" (``kernels/triton_skinny.py``) multiplies bit patterns on
tensor cores; "words" (``kernels/triton_words.py``) works without tensor cores; "fragments" (``kernels/triton_fragments.py``) builds the tensor cores'
operands in registers and runs on NVIDIA GPUs only. What is in no list is dequantised and multiplied by the dense product. Every entry is
(kernel, tile), the tile in the terms of that kernel's launch.

Source: measured with ``benchmarks/sweep_skinny.py`` on an H100 (Triton 3.6), mostly at 4096x4096 and 36864x4096; numbers at the entries are
microseconds at 36864x4096, where the dense product in bf16 takes 112 and a weight that is dequantised first about 255.
"""

#: Output columns from which programs of 32 columns fill a large GPU.
MANY_COLUMNS = 16384

ONE_ROW = ("one row", (4, 32, 4))
ONE_ROW_FEW_COLUMNS = ("one row", (1, 128, 4))
FEW_ROWS = ("few rows", (64, 8, 4))
_PATTERNS = (8, ("patterns", (16, 16, 0, 4)), ("patterns", (32, 8, 0, 4)))

# (most rows of x, choice for few output columns, choice for many)
_OTHERS = ((1, ONE_ROW_FEW_COLUMNS, ONE_ROW), (16, FEW_ROWS, FEW_ROWS))
CHOICES = {
    "Q4_0": (
        (1, ("words", (4, 4, 4)), ("words", (2, 4, 1))),  # 39; "one row" 67, "patterns" 91
        (8, ("fragments", (2, 16, 1)), ("fragments", (2, 16, 2))),  # 42 with 2 rows, 44 with 8; below
        (16, ("fragments", (1, 8, 2)), ("fragments", (1, 8, 2))),  # 54; below
    ),
    "Q8_0": (
        (1, ("words", (2, 4, 1)), ("words", (4, 4, 4))),  # 64; "one row" 96
        (4, ("patterns", (16, 16, 1, 4)), ("words", (4, 2, 1))),  # 93 with 4 rows; "patterns" 125
        (8, ("patterns", (16, 16, 1, 4)), ("patterns", (16, 16, 0, 4))),  # 129; "few rows" 146
        (16, FEW_ROWS, FEW_ROWS),  # 143; "patterns" 167
    ),
    "Q6_K": (
        (1, ONE_ROW_FEW_COLUMNS, ("one row", (8, 16, 4))),  # 86; "patterns" 123
        (8, ("patterns", (16, 32, 0, 8)), ("patterns", (32, 8, 1, 4))),  # 121; "few rows" 295
        (16, ("patterns", (16, 16, 1, 4)), ("patterns", (32, 8, 1, 4))),  # 176; "few rows" 299
    ),
    "Q4_K": ((1, ONE_ROW_FEW_COLUMNS, ONE_ROW), _PATTERNS, (16, ("patterns", (16, 16, 0, 4)), ("patterns", (32, 8, 1, 4)))),  # 72; 85; 121; "few rows" 323
    "Q5_K": ((1, ONE_ROW_FEW_COLUMNS, ONE_ROW), _PATTERNS, (16, ("patterns", (16, 16, 0, 4)), ("patterns", (32, 8, 0, 4)))),  # 104 with 8 rows, 128 with 16
    "Q5_1": (
        (1, ONE_ROW_FEW_COLUMNS, ONE_ROW_FEW_COLUMNS),  # 92
        (8, ("patterns", (16, 16, 0, 4)), ("patterns", (32, 8, 1, 4))),  # 179; "few rows" 231
        (16, FEW_ROWS, ("patterns", (32, 8, 1, 4))),  # 199; "few rows" 230
    ),
    "Q3_K": ((1, ONE_ROW_FEW_COLUMNS, ONE_ROW_FEW_COLUMNS),),  # 93; "few rows" 456
}
# Where "fragments" does not run: other GPUs, widths that are no multiple of 256, addresses that are none of 16.
WITHOUT_FRAGMENTS = {
    "Q4_0": (
        (2, ("words", (4, 2, 4)), ("words", (4, 2, 1))),  # 51
        (4, ("words", (4, 2, 1)), ("words", (4, 2, 1))),  # 74; "patterns" 91
        (8, ("patterns", (16, 32, 1, 8)), ("patterns", (32, 8, 0, 4))),  # 93; "few rows" 123
        (16, FEW_ROWS, ("patterns", (32, 8, 1, 4))),  # 114; "few rows" 126
    ),
}
# The others with one row and up to sixteen: Q2_K 68, 154. IQ4_NL 86, 140. IQ4_XS 91, 210.


def most_rows(fmt_name: str, half: bool) -> int:
    """Rows of x up to which a product with this format is not dequantised first. half: x is float16 or bfloat16."""
    return CHOICES.get(fmt_name, _OTHERS)[-1][0] if half else 1


def choose(fmt_name: str, n_rows: int, n_out: int, half: bool, fragments: bool = True) -> tuple[str, tuple[int, ...]]:
    """(kernel, tile) for at most :func:`most_rows` rows. fragments: False where that kernel was chosen and does not run."""
    if half:
        for most, few, many in CHOICES.get(fmt_name, _OTHERS) if fragments else WITHOUT_FRAGMENTS[fmt_name]:
            if n_rows <= most:
                return many if n_out >= MANY_COLUMNS else few
    return ONE_ROW if n_rows == 1 else FEW_ROWS
