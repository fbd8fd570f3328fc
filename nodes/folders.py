"""Where model files are found: the host's own folders, listed under keys of this pack.

``.gguf`` is not among the host's extensions and its sets are shared by every model folder, so they are left alone: each key below
lists the folders of existing keys with its own extensions. Folders that the user adds to the host's keys (extra_model_paths.yaml) are seen too.
"""

import os

import folder_paths

EXTENSIONS = {".gguf", ".safetensors", ".sft"}

# our key -> the host's keys whose folders it lists, in order of preference
KEYS = {
    "ltx2_gguf_models": ("diffusion_models", "checkpoints"),
    "ltx2_gguf_text_encoders": ("text_encoders",),
    "ltx2_gguf_projections": ("text_encoders", "diffusion_models", "checkpoints"),
    "ltx2_gguf_connectors": ("text_encoders", "diffusion_models", "checkpoints"),
    "ltx2_gguf_vaes": ("vae", "diffusion_models", "checkpoints"),
    "ltx2_gguf_audio_vaes": ("vae", "checkpoints", "diffusion_models"),
}

AUTO = "auto"


def register():
    """Bring the pack's keys up to date with the host's folders. Safe to call again."""
    for key, sources in KEYS.items():
        folders = []
        for source in sources:
            if source in folder_paths.folder_names_and_paths:
                folders += [folder for folder in folder_paths.get_folder_paths(source) if folder not in folders]
        known = folder_paths.folder_names_and_paths.get(key)
        if known is None or known[0] != folders:
            folder_paths.folder_names_and_paths[key] = (folders, set(EXTENSIONS))
            folder_paths.filename_list_cache.pop(key, None)


def files(key):
    """Names of the files under ``key``, sorted, relative to their folder."""
    register()
    return folder_paths.get_filename_list(key)


def loras():
    """Names of the LoRA files in the host's own folders that can be read without unpickling."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith((".safetensors", ".sft"))]


def choices(key):
    """What a combo over ``key`` offers: ``auto``, then every file."""
    return [AUTO, *files(key)]


def path(key, name):
    """Absolute path of the file ``name`` under ``key``. Raises FileNotFoundError saying where it was looked for."""
    register()
    found = folder_paths.get_full_path(key, name)
    if found is None:
        raise FileNotFoundError(
            f"'{name}' is in none of the folders {', '.join(folder_paths.get_folder_paths(key))}; refresh the page and choose the file again."
        )
    return found


def stamp(path):
    """(size, modification time) of a file."""
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns
