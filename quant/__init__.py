"""GGUF weights for torch: block formats, the container file, packed tensors and the matrix products on them.

This package knows no model and no host. Import the module you need; nothing is imported here, so that reading the format
table (``quant.formats``, standard library only) costs nothing.

formats.py                table of block formats
decode.py, encode.py      blocks in plain torch: what the kernels are tested against, and what the converter writes
gguf/                     reading (memory-mapped) and writing the container
tensor.py, layouts.py     packed weights as ``comfy_kitchen`` quantised tensors
matmul.py                 products on packed weights: THE place where the way to a product is chosen
low_rank.py               products with a low-rank change of the weight
eight_bit.py              fast mode: products on 8-bit tensor cores
backends.py               which kernel runs where, and why
scratch.py, tracing.py    memory for decoded weights; telling ordinary calls from traced ones
output.py                 files that appear whole or not at all
kernels/                  decoding and products on each device
"""
