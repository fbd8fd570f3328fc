"""Where the nodes sit in the menu: one root, three folders."""

ROOT = "LTX-2 GGUF"
LOADERS = f"{ROOT}/loaders"
CONDITIONING = f"{ROOT}/conditioning"
SAMPLING = f"{ROOT}/sampling"
