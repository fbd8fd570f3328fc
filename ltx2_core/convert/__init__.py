"""Writing GGUF files.

plan.py       what is kept, dropped and stored how
convert.py    doing it
importance.py how much each input of each layer counts
synthetic.py  tiny random checkpoints of the real structure
lora.py       a LoRA file under the standard spelling
"""
