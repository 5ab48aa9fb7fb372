"""Three hosts on one machine, for everything that is launched over ssh.

A host is a set of Linux namespaces: its own network (a veth pair on a bridge), processes, host name
and mounts (/tmp, /dev/shm and root's home are its own), with an sshd inside. The files of the
system are shared and root owns them all, so it is no sandbox.

1. ``missing()`` names what this machine lacks for it.
2. Entering makes keys, bridge and hosts, and waits until each answers over ssh.
3. ``kill`` ends every process of a host at once and takes its network away: a power cut.
4. Leaving ends every process of every host and removes the bridge and the folder.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

BRIDGE = "pio-br"
NETWORK = "10.77.13"
PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
}
HOME = Path(pwd.getpwuid(0).pw_dir)

SSHD_CONFIG = """
Port 22
ListenAddress {address}
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
MaxSessions 100
"""

# Runs as the first process of the host: its end is the end of them all.
FIRST_PROCESS = """
set -e
mount --make-rprivate /
{binds}
mount --rbind {own}/home {home}
mount --bind {own}/tmp /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /run/sshd
hostname {name}
exec {sshd} -D -f {own}/sshd_config -E {own}/sshd.log
"""


def missing() -> str | None:
    """What this machine lacks to build hosts, or ``None``."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "hosts are built from network namespaces, which needs root on Linux"
    absent = [f"{name} ({package})" for name, package in PROGRAMS.items() if not which(name)]
    if absent:
        return f"hosts need programs that are not installed: {', '.join(absent)}"
    made = run("ip", "link", "add", BRIDGE, "type", "bridge", check=False)
    if made.returncode:
        return f"no network bridge can be made: {made.stderr.strip()}"
    run("ip", "link", "del", BRIDGE)
    return None


def which(program: str) -> str | None:
    """Its path; system administrators' folders are searched too."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of this machine; its output is kept."""
    path = which(command[0])
    assert path is not None, command[0]
    return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=check)


@dataclass(frozen=True, slots=True)
class Host:
    """One host; ``pid`` is its first process, ``outer`` what waits for that one's end."""

    name: str
    address: str
    folder: Path
    pid: int
    outer: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        """Root's home there, as this machine sees it."""
        return self.folder / "home"

    def processes(self) -> dict[int, str]:
        """Every process of the host but the first, which is its sshd, by pid as seen from here.

        A dead host has none: its first process took them all along.
        """
        if not host_is_alive(self):
            return {}
        space = os.stat(f"/proc/{self.pid}/ns/pid_for_children").st_ino
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            try:
                if os.stat(entry / "ns" / "pid").st_ino == space:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = words.decode(errors="replace").strip()
            except OSError:
                continue  # it has ended meanwhile
        return found


class Hosts:
    """The hosts ``host1`` … ``hostN``; a context manager."""

    def __init__(self, count: int, keep: Sequence[Path] = ()) -> None:
        """``keep``: folders below root's home that every host sees."""
        self._count = count
        self._keep = keep
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="pio-hosts-", dir="/var/tmp"))
        try:
            self._make_network()
            for number in range(1, self._count + 1):
                self.hosts.append(self._make_host(number))
            for host in self.hosts:
                self._wait_for_ssh(host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._remove()

    @property
    def key(self) -> Path:
        """The private ssh key that every host lets in."""
        return self.folder / "id"

    def ssh(
        self, host: Host, command: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on a host as root."""
        options = ["-i", str(self.key)]
        for option in (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=5",
        ):
            options += ["-o", option]
        return subprocess.run(
            ["ssh", *options, f"root@{host.address}", command],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def kill(self, host: Host) -> None:
        """Cut a host's power: its network first, so that nobody hears its processes die."""
        run("ip", "link", "del", _outer(host.name))
        os.kill(host.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while host_is_alive(host):
            assert time.monotonic() < end, f"{host.name} survives SIGKILL of its first process"
            time.sleep(0.05)

    def _make_network(self) -> None:
        for name in ("id", "hostkey"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        keys = self.folder / "authorized_keys"
        keys.write_text((self.folder / "id.pub").read_text())
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")

    def _make_host(self, number: int) -> Host:
        name, address = f"host{number}", f"{NETWORK}.{10 + number}"
        own, space = self.folder / name, f"pio-{name}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", _outer(name), "type", "veth", "peer", "eth0", "netns", space)
        run("ip", "link", "set", _outer(name), "master", BRIDGE, "up")
        run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")
        run("ip", "-n", space, "route", "add", "default", "via", f"{NETWORK}.1")
        (own / "home").mkdir(parents=True)
        (own / "tmp").mkdir()
        (own / "tmp").chmod(0o1777)
        config = SSHD_CONFIG.format(address=address, folder=self.folder)
        (own / "sshd_config").write_text(config)
        script = own / "first-process"
        script.write_text(
            FIRST_PROCESS.format(
                binds="\n".join(self._bind(own, path) for path in self._keep),
                own=own,
                home=HOME,
                name=name,
                sshd=which("sshd"),
            )
        )
        words = ["netns", "exec", space, "unshare", "--mount", "--pid", "--uts", "--ipc"]
        words += ["--fork", "--kill-child", "--mount-proc", "bash", str(script)]
        with (own / "log").open("wb") as log:
            outer = subprocess.Popen(
                [str(which("ip")), *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return Host(name, address, own, _only_child(outer, own / "log"), outer)

    @staticmethod
    def _bind(own: Path, path: Path) -> str:
        place = own / "home" / path.relative_to(HOME)
        place.mkdir(parents=True, exist_ok=True)
        return f"mount --bind {path} {place}"

    def _wait_for_ssh(self, host: Host) -> None:
        end = time.monotonic() + 30
        while True:
            answer = self.ssh(host, "hostname")
            if answer.returncode == 0:
                assert answer.stdout.strip() == host.name, answer.stdout
                return
            log = (host.folder / "log").read_text() + answer.stderr
            assert time.monotonic() < end, f"no ssh to {host.name}: {log}"
            time.sleep(0.2)

    def _remove(self) -> None:
        for host in self.hosts:
            if host_is_alive(host):
                os.kill(host.pid, signal.SIGKILL)
            host.outer.wait(30)
        for number in range(1, self._count + 1):
            run("ip", "netns", "del", f"pio-host{number}", check=False)
            run("ip", "link", "del", _outer(f"host{number}"), check=False)
        run("ip", "link", "del", BRIDGE, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def host_is_alive(host: Host) -> bool:
    """Whether the host's first process is there; without it there is no other."""
    try:
        state = Path(f"/proc/{host.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _outer(name: str) -> str:
    """The end of a host's veth pair that lies on the bridge."""
    return f"pio-{name}"


def _only_child(parent: subprocess.Popen[bytes], log: Path) -> int:
    """The pid of the process that ``unshare`` has forked."""
    end = time.monotonic() + 10
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while time.monotonic() < end:
        if parent.poll() is not None:
            break
        if pids := children.read_text().split():
            return int(pids[0])
        time.sleep(0.02)
    raise AssertionError(f"a host did not start: {log.read_text()}")
