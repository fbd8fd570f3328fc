"""From a prompt to text features.

encoder.py       prompt to features
config.py        geometry of a Gemma from shapes and metadata, llama.cpp's names
gemma.py         the language models, Gemma 3 and Gemma 4
gemma_fused.py, triton_gemma.py  their element-wise operations and the kernels for them
generate.py      writing text: cache, sampling, the loop
chat.py          a chat's prompt as tokens
tokenizer.py     text to token ids (Gemma 3); tokenizer_gemma4.py (Gemma 4)
vision.py        images to rows among a text's embeddings
projection.py    hidden states to features
"""
