"""Map a file into memory: written once for every container."""

import logging
import mmap
import os
import sys

log = logging.getLogger(__name__)


def map_file(path: str | os.PathLike) -> memoryview:
    """The whole file, mapped privately, copy on write: pages stay shared with the file cache, nothing is ever written back.

    The pages are writable because torch warns about read-only buffers and the CUDA driver refuses to pin read-only pages. Where the system will not
    promise memory for a writable view of that size, the view is read-only. What is made from the memoryview keeps the map alive:
    torch.frombuffer keeps the object it is given alive, but not a closed map's memory. Raises OSError, or ValueError for an empty file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if hasattr(mmap, "MAP_PRIVATE"):
                # NORESERVE: a file larger than RAM must still map. Python names the flag since 3.11; its value is Linux's.
                noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform.startswith("linux") else 0
                mapped = mmap.mmap(
                    file.fileno(), size, flags=mmap.MAP_PRIVATE | noreserve, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            else:
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            log.info(
                "%s: mapped read-only, because a copy-on-write view of %.1f GB was refused (%s)",
                path,
                size / 1e9,
                error,
            )
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return memoryview(mapped)
