"""Running a network whose weights, or LoRAs, do not fit the device.

streamer.py  memory budget, and blocks in a double buffer
copiers.py   copies that arrive in time
pinned.py    pinned memory
upload.py    pageable memory to the device
"""
