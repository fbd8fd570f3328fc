"""Kernels on packed bytes, one file per device and purpose.

cpu.py                 decoding, and products in tiles
metal.py               decoding on Apple GPUs
triton_decode.py       one decoder per format, shared by the kernels
triton_dequantize.py   a matrix of numbers from a matrix of blocks
triton_gemv.py         matrix-vector products straight from the blocks
triton_eight_bit.py    weights and activations with one scale per row
triton_int8.py         the int8 product
triton_launch.py       launching with little work per call
"""
