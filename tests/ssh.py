"""Two machines that reach one another by ssh with a key, as DeepSpeed's hostfile launcher needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.machines import Machine, two_machines, wait_until, with_sbin

# Program → Debian package.
PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "pkill": "procps"}
SERVER = """
ListenAddress {address}
HostKey {host_key}
AuthorizedKeysFile {key}.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
"""
CLIENT = """
IdentityFile {key}
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
BatchMode yes
LogLevel ERROR
"""


@contextmanager
def ssh_machines(folder: Path) -> Iterator[tuple[tuple[Machine, Machine], dict[str, str]]]:
    """Starts two machines with an ssh server each, for the duration of the block.

    Args:
        folder: a new one, for keys, settings and logs.

    Yields:
        The machines, and the environment in which pdsh finds the keys.
    """
    folder.mkdir()
    key = _new_key(folder / "key")
    settings = folder / "ssh_config"
    settings.write_text(CLIENT.format(key=key, folder=folder))
    with two_machines(folder) as machines:
        for machine in machines:
            host_key = _new_key(machine.folder / "host_key")
            with (folder / "known_hosts").open("a") as known:
                known.write(f"{machine.name} {Path(f'{host_key}.pub').read_text()}")
            config = machine.folder / "sshd_config"
            config.write_text(SERVER.format(address=machine.address, host_key=host_key, key=key))
            machine.run("mkdir", "/run/sshd")  # in which sshd confines its unprivileged process
            sshd = shutil.which("sshd", path=with_sbin(os.environ)["PATH"])  # it restarts itself by its path
            assert sshd
            machine.serve("sshd", sshd, "-D", "-e", "-f", str(config))
        for machine in machines:
            wait_until(partial(_listens, machine), machine.logs)
        yield machines, {"PDSH_SSH_ARGS_APPEND": f"-F {settings}"}


def _listens(machine: Machine) -> bool:
    return "Server listening" in machine.logs()


def _new_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    return path
