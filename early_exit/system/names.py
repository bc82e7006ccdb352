"""Names of files and folders that no user made."""

import os

# Files and folders that systems and tools make in folders of others, in lower case, because some
# file systems change the case. Words that may be a class, such as "recycled", are not among them.
SYSTEM_NAMES = frozenset(
    name.lower().encode()
    for name in (
        "lost+found",  # of ext4
        "__pycache__",
        # macOS; the second is in zip files, the others on network volumes
        ".DS_Store",
        "__MACOSX",
        "Icon\r",
        "Network Trash Folder",
        "Temporary Items",
        "TheFindByContentFolder",
        "TheVolumeSettingsFolder",
        # Windows
        "$RECYCLE.BIN",
        "System Volume Information",
        "FOUND.000",
        "Thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        # network storage of Synology, QNAP and NetApp
        "@eaDir",
        "@tmp",
        "@sharebin",
        "#recycle",
        "#snapshot",
        "@Recycle",
        "@Recently-Snapshot",
        "@__thumb",
        "@Transcode",
        "~snapshot",
    )
)
COMPANION = b"._"  # what macOS stores beside a file where the file system has no place for it
DOWNLOADED = b":zone.identifier"  # where Windows notes the source of a file, seen from Linux


def is_system_name(name: str | bytes) -> bool:
    """Whether a system made the file or folder of this name, such as `.DS_Store`, `._photo.jpg`,
    `@eaDir` and `Thumbs.db`."""
    name = os.fsencode(name).lower()
    return name in SYSTEM_NAMES or name.startswith(COMPANION) or name.endswith(DOWNLOADED)


def is_hidden(name: str | bytes) -> bool:
    """Whether a file or folder of this name is hidden or a system's. `.ipynb_checkpoints` and
    `.git` are the first."""
    return os.fsencode(name).startswith(b".") or is_system_name(name)
