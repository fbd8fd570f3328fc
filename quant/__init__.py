"""GGUF weights for torch: block formats, the container file, packed tensors and the matrix products on them.

This package knows no model and no host. Import the module you need; nothing is imported here, so that reading the format
table (``quant.formats``, standard library only) costs nothing.

    formats      the table of block formats
    reference    decode and encode blocks in plain torch: the truth the kernels are tested against
    gguf_file    read (memory-mapped) and write the container
    tensor       packed weights as ``comfy_kitchen`` quantised tensors
    linear       products on packed weights, dequantised on the fly
    backends     which implementation runs where, and why
    output       files that appear whole or not at all
"""
