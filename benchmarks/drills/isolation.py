"""Namespaces of a worker's own: mounts that vanish with it, and a network that is loopback alone.

Two workers then run the same checkout at the same path and use the same ports without meeting. Needs root.
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
    """Moves this process to namespaces of its own.

    Raises:
        OSError: this is not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    _mount("--make-rprivate", "/")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def can_isolate() -> bool:
    """Whether this user may make such namespaces and mount in them; tried in a child process."""
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


def bind(source: Path, place: Path) -> None:
    """Shows a folder at another place, to this process and those that it starts."""
    _mount("--bind", str(source), str(place))


def mount_small(place: Path, size: int) -> None:
    """Mounts an empty file system of `size` bytes."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))


def resize(place: Path, size: int) -> None:
    """Changes the size of such a file system, in bytes."""
    _mount("-o", f"remount,size={size}", str(place))


def unmount(place: Path) -> None:
    """Takes a mount away, at once for those who look anew."""
    subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"mount {' '.join(arguments)} failed: {done.stderr.strip()}")
