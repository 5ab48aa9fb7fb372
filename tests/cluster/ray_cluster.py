"""A Ray cluster on hosts, launched from ``cluster_configs/ray-up-local.yaml`` as an operator does.

1. The package's wheel is built from a copy of the sources.
2. Each host gets a Python environment that already holds what the package needs, as from an
   operator's image; the package itself comes with ``ray up``, over ssh.
3. ``up``: the YAML with the hosts' addresses put in; returns when every node has joined.
4. ``deploy``: the application file goes to the head with ``ray rsync-up``, and ``ray exec`` has
   ``serve deploy`` run there, as docs/clusters.md says.
5. ``down``: ``ray down``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from .hosts import Host, Hosts

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "cluster_configs"
UP_S = 300.0
DEPLOY_S = 300.0

Resources = Mapping[str, Mapping[str, float]]
"""Host name to the custom resources that it announces."""


class RayCluster:
    """One cluster whose head is the first host."""

    def __init__(self, hosts: Hosts, resources: Resources) -> None:
        self._hosts = hosts
        self._operator = hosts.folder / "operator"
        self._file = self._operator / "ray-up.yaml"
        self._operator.mkdir()
        self._make_wheel()
        self._make_token()
        self._write_cluster_file()
        for host in hosts.hosts:
            self._prepare(host, resources.get(host.name, {}))

    @property
    def head(self) -> Host:
        return self._hosts.hosts[0]

    @property
    def url(self) -> str:
        """The service through the head's address."""
        return f"http://{self.head.address}:8000"

    def up(self) -> None:
        """Launch head and workers; every one has joined when it returns."""
        self._ray("up", "--yes", str(self._file))
        end = time.monotonic() + UP_S
        while len(alive := self.nodes()) < len(self._hosts.hosts):
            assert time.monotonic() < end, f"only these nodes have joined: {alive}\n{self._log()}"
            time.sleep(1)

    def down(self) -> None:
        """Stop Ray on every host."""
        self._ray("down", "--yes", str(self._file))

    def on_head(self, command: str, timeout: float = 120) -> str:
        """Standard output of a shell command on the head; it must succeed."""
        login = f"export PATH=~/inference-pio/venv/bin:$PATH RAY_AUTH_MODE=token; {command}"
        answer = self._hosts.ssh(self.head, login, timeout)
        assert answer.returncode == 0, f"{command}: {answer.stdout}{answer.stderr}"
        return answer.stdout

    def nodes(self) -> dict[str, dict[str, float]]:
        """Address to resources of every node that is alive."""
        program = "{n['NodeManagerAddress']: n['Resources'] for n in ray.nodes() if n['Alive']}"
        found: dict[str, dict[str, float]] = self._python(program)
        return found

    def deploy(self, application: dict[str, Any]) -> None:
        """``serve deploy`` a Serve document on the head; returns once it is healthy."""
        file = self._operator / "application.yaml"
        file.write_text(yaml.safe_dump(application))
        self._ray("rsync-up", str(self._file), str(file), file.name)
        self._ray("exec", str(self._file), f"RAY_AUTH_MODE=token serve deploy {file.name}")
        end = time.monotonic() + DEPLOY_S
        while True:
            status = yaml.safe_load(self.on_head("serve status"))
            states = [a["status"] for a in status["applications"].values()]
            if states == ["RUNNING"] and self._healthy():
                return
            assert "DEPLOY_FAILED" not in states, yaml.safe_dump(status)
            assert time.monotonic() < end, yaml.safe_dump(status)
            time.sleep(1)

    def replicas(self, deployment: str) -> dict[str, str]:
        """Replica id to its node's address, of every running replica."""
        program = (
            "{r['replica_id']: r['node_ip'] "
            "for a in serve_details()['applications'].values() "
            f"for r in a['deployments']['{deployment}']['replicas'] if r['state'] == 'RUNNING'}}"
        )
        found: dict[str, str] = self._python(program)
        return found

    def leftovers(self) -> dict[str, dict[int, str]]:
        """What runs on each host beside sshd."""
        found = {host.name: host.processes() for host in self._hosts.hosts}
        return {
            name: {pid: words for pid, words in processes.items() if "sshd" not in words}
            for name, processes in found.items()
        }

    def _python(self, expression: str) -> Any:
        """The value of an expression on the head, with Ray at hand."""
        program = (
            "import json, ray\n"
            "from ray.serve._private.api import _get_global_client\n"
            "ray.init(address='auto', logging_level='ERROR', log_to_driver=False)\n"
            "def serve_details(): return _get_global_client().get_serve_details()\n"
            f"print('VALUE', json.dumps({expression}))\n"
        )
        output = self.on_head(f"python -c {shlex.quote(program)}")
        (line,) = [line for line in output.splitlines() if line.startswith("VALUE ")]
        return json.loads(line.removeprefix("VALUE "))

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _ray(self, *words: str) -> str:
        environment = os.environ | {
            "HOME": str(self._operator),
            "RAY_TMPDIR": str(self._operator),
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
        }
        command = [str(Path(sys.executable).with_name("ray")), *words]
        answer = subprocess.run(
            command,
            cwd=self._operator,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=UP_S,
        )
        assert answer.returncode == 0, f"ray {' '.join(words)}:\n{answer.stdout}"
        return answer.stdout

    def _log(self) -> str:
        command = "tail -n 60 /tmp/ray/session_latest/logs/monitor.*"
        return self._hosts.ssh(self.head, command).stdout

    def _make_wheel(self) -> None:
        sources = self._operator / "sources"
        unwanted = shutil.ignore_patterns(".*", "build", "dist", "tests", "*.egg-info")
        shutil.copytree(REPOSITORY, sources, ignore=unwanted)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-w", self._operator / "dist", sources], check=True)
        shutil.rmtree(sources)
        shutil.copy(REPOSITORY / "constraints.txt", self._operator / "dist")

    def _make_token(self) -> None:
        token = self._operator / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(os.urandom(32).hex())
        token.chmod(0o600)

    def _write_cluster_file(self) -> None:
        config = yaml.safe_load((CONFIGS / "ray-up-local.yaml").read_text())
        head, *workers = [host.address for host in self._hosts.hosts]
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["min_workers"] = config["max_workers"] = len(workers)
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self._hosts.key)}
        self._file.write_text(yaml.safe_dump(config))

    @staticmethod
    def _prepare(host: Host, resources: Mapping[str, float]) -> None:
        """A virtual environment as pip would have filled it, without the package itself."""
        home = str(Path.home())
        venv = host.home / "inference-pio" / "venv"
        create = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(venv)]
        subprocess.run(create, check=True)
        inside = Path(home) / "inference-pio" / "venv"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = venv / "lib" / version / "site-packages"
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        for name, module in {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}.items():
            function = "main" if name == "ray" else "cli"
            script = venv / "bin" / name
            script.write_text(
                f"#!{inside}/bin/python\nimport sys\nfrom {module} import {function}\n"
                f"sys.exit({function}())\n"
            )
            script.chmod(0o755)
        (host.home / "inference-pio-resources.json").write_text(json.dumps(dict(resources)))
