"""Locks on files and folders, by which processes that do not know each other keep out of each other's way."""

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(handle: int, wait: bool = False) -> bool | None:
    """Locks an open file or folder until it is closed: True, or False if another process has it and wait is not set.

    None where nothing can be locked: on Windows, and on some network file systems.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
