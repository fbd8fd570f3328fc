"""Which kernel takes a product with few rows of x, by format, number of rows and number of output columns.

Kernels: "one row" and "few rows" of ``kernels_triton.py`` decode to x's type; "patterns" (``skinny_triton.py``) multiplies bit patterns on
tensor cores; "words" (``words_triton.py``) works without tensor cores. What is in no list is dequantised and multiplied by the dense
product. Every entry is (kernel, tile), the tile in the terms of that kernel's launch.

Source: measured with ``benchmarks/sweep_skinny.py`` on an H100 (Triton 3.6) at 4096x4096, 16384x4096, 4096x16384 and 36864x4096; numbers
at the entries are microseconds at 36864x4096. Entries for "words" rest on instruction counts until that sweep says otherwise.
"""

#: Output columns from which programs of 32 columns fill a large GPU.
MANY_COLUMNS = 16384

ONE_ROW = ("one row", (4, 32, 4))
FEW_ROWS = ("few rows", (64, 8, 4))

# (most rows of x, choice for few output columns, choice for many)
_OTHERS = ((1, ONE_ROW, ONE_ROW), (16, FEW_ROWS, FEW_ROWS))
_ONE_ROW_ONLY = ((1, ONE_ROW, ONE_ROW),)
CHOICES = {
    "Q4_0": (  # dense product in bf16 113, dequantised first 254
        (2, ("words", (2, 4, 1)), ("words", (4, 4, 1))),  # one row: "one row" 78, with tile 8/16/4 67; "patterns" 91 to 94
        (8, ("patterns", (16, 32, 1, 8)), ("patterns", (32, 8, 0, 4))),  # 95; "few rows" 123
        (16, FEW_ROWS, ("patterns", (32, 8, 1, 4))),  # 118; "few rows" 129
    ),
    "Q8_0": (  # dequantised first 275
        (1, ("words", (2, 4, 1)), ("words", (4, 4, 1))),  # "one row" 96
        (8, ("patterns", (16, 16, 1, 4)), ("patterns", (16, 16, 0, 4))),  # 129; "few rows" 146
        (16, FEW_ROWS, FEW_ROWS),  # 143; "patterns" 167
    ),
    "Q6_K": (  # dequantised first 270
        (1, ONE_ROW, ONE_ROW),  # 107; "patterns" 123
        (8, ("patterns", (16, 32, 0, 8)), ("patterns", (16, 16, 0, 4))),  # 130; "few rows" 295
        (16, ("patterns", (16, 16, 1, 4)), ("patterns", (32, 8, 1, 4))),  # 176; "few rows" 299
    ),
    "Q3_K": _ONE_ROW_ONLY,  # one row 111; more: dequantised first 246, "few rows" 456
    "Q4_K": _ONE_ROW_ONLY,  # one row 72; more: dequantised first 250, "few rows" 323
    "Q5_K": _ONE_ROW_ONLY,  # more work per weight than Q4_K
}
# Q5_1: one row 101; more: "few rows" 228, dequantised first 260. Q2_K 68; 154, 243. IQ4_NL 91; 140, 252. IQ4_XS 94; 210, 250.


def most_rows(fmt_name: str, half: bool) -> int:
    """Rows of x up to which a product with this format is not dequantised first. half: x is float16 or bfloat16."""
    return CHOICES.get(fmt_name, _OTHERS)[-1][0] if half else 1


def choose(fmt_name: str, n_rows: int, n_out: int, half: bool) -> tuple[str, tuple[int, ...]]:
    """(kernel, tile) for at most :func:`most_rows` rows."""
    if half:
        for most, few, many in CHOICES.get(fmt_name, _OTHERS):
            if n_rows <= most:
                return many if n_out >= MANY_COLUMNS else few
    return ONE_ROW if n_rows == 1 else FEW_ROWS
