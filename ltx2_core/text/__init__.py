"""From a prompt to text features.

encoder.py       prompt to features
gemma.py         the language model
gemma_fused.py, triton_gemma.py  its element-wise passes and their kernels
tokenizer.py     text to token ids
projection.py    hidden states to features
"""
