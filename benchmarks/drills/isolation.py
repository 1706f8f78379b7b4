"""Gives a worker its own mount and network namespaces: mounts that end with it, and a network with only loopback.

Parallel workers can then use the same paths and ports without conflict. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def isolate() -> None:
    """Moves this process to new namespaces.

    Raises:
        OSError: the kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    _run_mount("--make-rprivate", "/")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def can_isolate() -> bool:
    """Returns whether this user may create such namespaces and mount in them. A child process tries it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            isolate()
            mount_small(Path("/tmp"), 1 << 20)  # noqa: S108 - in the child's own namespace
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def bind(source: Path, mountpoint: Path) -> None:
    """Mounts a folder at another path, for this process and those that it starts."""
    _run_mount("--bind", str(source), str(mountpoint))


def mount_small(mountpoint: Path, size: int) -> None:
    """Mounts an empty file system of `size` bytes."""
    _run_mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mountpoint))


def resize(mountpoint: Path, size: int) -> None:
    """Changes the size of a file system from `mount_small` to `size` bytes."""
    _run_mount("-o", f"remount,size={size}", str(mountpoint))


def unmount(mountpoint: Path) -> None:
    """Detaches a mount at once; processes that use it keep it."""
    subprocess.run(["umount", "--lazy", str(mountpoint)], check=True, capture_output=True)


def _run_mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"mount {' '.join(arguments)} failed: {done.stderr.strip()}")
