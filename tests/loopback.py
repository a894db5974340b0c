"""An ssh server on the loopback address, and what a board behind it has."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
# What a board has, by module and by the name of its package where that differs.
NUMPY = ("numpy", "numpy.libs")
RUNTIME = ("onnxruntime", "flatbuffers", "packaging", "google")


@dataclasses.dataclass
class Server:
    """An ssh server on a free port of the loopback address, with keys, home folder and cache of its own."""

    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "edgecompile"

    @property
    def options(self) -> list[str]:
        return ["-F", str(self.folder / "config")]

    def start(self) -> None:
        assert SSHD is not None
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=log)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def drop_connections(self) -> int:
        """End every process that the server has started for a connection; returns how many there were."""
        assert self.process is not None
        dropped = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, parent = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
                    dropped += 1
        return dropped

    def url(self, python: str = "") -> str:
        return f"ssh://board{python}"


def board_python(
    path: Path, modules: tuple[str, ...] = (*NUMPY, *RUNTIME), before: str = "", more: Sequence[Path] = ()
) -> Path:
    """A Python without site packages that finds the given modules only, and what lies in the folders ``more``."""
    packages = path.with_name(f"{path.name}-packages")
    packages.mkdir(parents=True)
    for module in modules:
        spec = importlib.util.find_spec("numpy" if module == "numpy.libs" else module)
        assert spec is not None
        (place,) = spec.submodule_search_locations or ()
        source = Path(place).with_name(module)
        if source.exists():
            (packages / module).symlink_to(source)
    for name in {"numpy", "onnxruntime"} & set(modules):
        info = Path(str(importlib.metadata.distribution(name)._path))  # pyright: ignore[reportAttributeAccessIssue]
        (packages / info.name).symlink_to(info)
    found = ":".join(map(str, (packages, *more)))
    path.write_text(f'#!/bin/sh\n{before}\nexport PYTHONPATH={found}\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def serve(folder: Path, more: str = "") -> Iterator[Server]:
    """A server that is reached under any name, with programs of its own in ``FOLDER/bin``.

    Args:
        folder: an empty folder.
        more: lines for the client's configuration.
    """
    if SSHD is None or not shutil.which("ssh-keygen"):
        pytest.skip("openssh-server is not installed")
    if os.getuid() == 0:  # the server insists on this folder when it is started by root
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(folder, free.getsockname()[1])
    for name in ("host", "other_host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    for name in ("home", "bin"):
        (folder / name).mkdir()
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"Port {server.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        f'SetEnv HOME={server.home} XDG_CACHE_HOME={folder}/cache PATH="{folder}/bin:/usr/bin:/bin" OMP_NUM_THREADS=1\n'
    )
    known = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {known[0]} {known[1]}\n")
    (folder / "config").write_text(
        f"Host *\nHostName 127.0.0.1\nPort {server.port}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile none\nIdentityAgent none\n{more}"
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
