"""The causal video VAE.

model.py         encoder and decoder
blocks.py        the layers, each able to take a clip in chunks
diffusion_decoder.py, neighborhood.py  the decoder of LTX-2.5 and its attention
config.py        geometry from metadata or names
streaming.py     running by plan, through time
tiling.py        memory of a decode, and how to cut it up
triton_norm.py   norm and SiLU in one kernel
"""
