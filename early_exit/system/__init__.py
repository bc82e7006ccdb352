"""The machine and the operating system: devices, signals, files, processes, versions."""
