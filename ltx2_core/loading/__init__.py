"""From files to modules: what a file is, and one loader per part.

identify.py      what a file is, from its header
assign.py        tensors of a file become the parameters of a module
transformer.py   the transformer and its connectors
text_encoder.py  Gemma with projection and tokenizer
vae.py           the video VAE
audio.py         the audio VAE with its vocoder
lora.py          LoRA files
"""
