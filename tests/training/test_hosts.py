"""Two hosts, network namespaces of this machine, train as one process does; one lost, the other says which and ends."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from fuyu_e2e.checkpoint.whole import check, newest
from fuyu_e2e.datamodule import FuyuDataModule
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.hosts import TICKS, Host, Hosts
from fuyu_e2e.training.launched import launched_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SWITCH = "10.77.0.254"
SILENCE = 3.0


class Network:
    """Hosts with a network between them: namespaces, which are gone with the last process in them."""

    def __init__(self, served: Path) -> None:
        self.places = [self._place(name) for name in ("switch", "host0", "host1")]
        self.pids = [place.pid for place in self.places]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(2)]
        switch, *hosts = self.pids
        self.run(switch, "ip", "link", "add", "bridge0", "type", "bridge")
        self.run(switch, "ip", "address", "add", f"{SWITCH}/24", "dev", "bridge0")
        self.run(switch, "ip", "link", "set", "bridge0", "up")
        for number, (host, address) in enumerate(zip(hosts, self.addresses, strict=True)):
            ends = (f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host))
            self.run(switch, "ip", "link", "add", *ends)
            self.run(switch, "ip", "link", "set", f"port{number}", "master", "bridge0", "up")
            self.run(host, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                self.run(host, "ip", "link", "set", device, "up")
        server = [sys.executable, "-m", "http.server", "--directory", str(served), "8000"]
        self.start(switch, *server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def _place(name: str) -> subprocess.Popen[str]:
        # It ends with the tests, whatever becomes of them: nothing holds the other end of its pipe any more.
        command = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo made && exec cat"]
        place = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert place.stdout is not None
        assert place.stderr is not None
        if not place.stdout.readline():
            pytest.skip(f"no network namespaces here: {place.stderr.read().strip()}")
        return place

    @staticmethod
    def command(pid: int, *command: str) -> list[str]:
        """A command as one of a namespace's."""
        return ["nsenter", "--target", str(pid), "--net", "--uts", *command]

    def run(self, pid: int, *command: str) -> None:
        """Runs a command in a namespace."""
        subprocess.run(self.command(pid, *command), check=True)

    def start(self, pid: int, *command: str, **settings: Any) -> subprocess.Popen[bytes]:
        """Starts a command in a namespace."""
        return subprocess.Popen(self.command(pid, *command), **settings)

    def cut(self, host: int) -> list[str]:
        """The command that takes a host's network down without a word."""
        return self.command(self.pids[0], "ip", "link", "set", f"port{host}", "down")

    def mend(self) -> None:
        """Brings the network up again."""
        for host in range(2):
            self.run(self.pids[0], "ip", "link", "set", f"port{host}", "up")

    @staticmethod
    def kill(pid: int, *spared: int) -> None:
        """Kills what runs in a namespace."""
        namespace = Path(f"/proc/{pid}/ns/net").readlink()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                inside = (place / "ns" / "net").readlink() == namespace
            except OSError:  # gone by now
                continue
            if inside and int(place.name) not in spared:
                os.kill(int(place.name), signal.SIGKILL)

    def end(self) -> None:
        """Kills everything in it, and with the last process the network is gone."""
        for place in self.places:
            self.kill(place.pid)
            place.communicate()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        pytest.skip("network namespaces need root, and ip, nsenter and unshare")
    network = Network(tmp_path_factory.getbasetemp())
    yield network
    network.end()


def test_two_hosts_train_as_one_process_and_end_with_a_sentence_when_one_is_lost(
    guarded_runs: Callable[..., tuple[Path, dict[str, Any]]], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stream over http. One is killed, its network goes, or the first's, which keeps the store."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    hosts = {
        "pids": network.pids[1:],
        "address": network.addresses[0],
        "shards": f"http://{SWITCH}:8000/{{}}/{{{{0..2}}}}.tar",
    }
    common = {"hosts": hosts, "silence": SILENCE, "save_every": 2}
    folder, results = guarded_runs(
        {"name": "whole", **common},
        {"name": "killed", **common, "signal": "SIGKILL", "ranks": [1], "row": 8},
        {"name": "cut", **common, "cut": network.cut(0), "row": 8},
    )
    network.mend()

    spec = importlib.util.spec_from_file_location("resumed_runs", Path(__file__).with_name("resumed_runs.py"))
    assert spec is not None
    assert spec.loader is not None
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    one = runs.run(folder, "one", 0, None)
    assert results["whole"]["codes"] == [0, 0]
    import json

    two = json.loads((folder / "whole" / "0.json").read_text())
    torch.testing.assert_close(two["losses"], one.losses, atol=1e-5, rtol=1e-4)

    def log(name: str, rank: int) -> str:
        return (folder / name / f"{rank}.log").read_text()

    gone = [f"host host{rank} ({network.addresses[rank]}, node rank {rank}, rank {rank}) is lost" for rank in (0, 1)]
    assert results["killed"]["codes"] == [5, -signal.SIGKILL], log("killed", 0)
    assert gone[1] in log("killed", 0)
    assert results["cut"]["codes"] == [5, 5], log("cut", 0) + log("cut", 1)
    assert gone[1] in log("cut", 0)
    assert gone[0] in log("cut", 1)
    for name in ("killed", "cut"):
        assert results[name]["seconds"] < 2 * SILENCE + 2
        check(newest(folder / name)[0])
