"""The video transformer (LTX-2 and LTX-2.3).

model.py         the network: latent, sigma and context in, velocity out
layers.py        attention, feed-forward, embeddings
config.py        version and geometry from names and shapes
connector.py     text features to the context
rope.py          rotary positions
modulation.py    modulation rows of tokens
guides.py        attention between guides and video
patchify.py      latents to tokens and back
fused.py, triton_fused.py  element-wise passes and their kernels
compute_mode.py  which layers may be multiplied in 8 bits
"""
