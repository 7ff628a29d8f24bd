"""Two hosts, network namespaces of this machine, train as one process does; one lost, the other says which it was."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuyu_e2e.checkpoint.atomic import check
from fuyu_e2e.checkpoint.lightning_io import read_checkpoint
from fuyu_e2e.checkpoint.run_checkpoints import newest
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.shipped import shipped
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.callbacks.heartbeat import Heartbeat, Host
from fuyu_e2e.training.settings.launcher_environment import launched_processes
from fuyu_e2e.training.settings.recipe import FuyuCLI

SWITCH = "10.77.0.254"
SILENCE = 3.0
COMMAND = Path(sys.executable).parent / "fuyu-e2e"


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

    spec = importlib.util.spec_from_file_location("resumed_runs", Path(__file__).parents[1] / "resumed_runs.py")
    assert spec is not None
    assert spec.loader is not None
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    one = runs.run(folder, "one", 0, None)
    assert results["whole"]["codes"] == [0, 0]
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
        check(newest(folder / name)[0])


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True], ids=["with the host that is left", "with the one that came back"])
def test_torchrun_goes_on_by_itself(
    question_data: Callable[..., FuyuDataModule],
    network: Network,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    back: bool,
) -> None:
    """The weights become those of a run of one process, for a step has the same rows on any number of hosts."""
    data = question_data()
    subprocess.run([COMMAND, "shards", "index", data.patterns["train"]], check=True, capture_output=True)

    def fit(name: str, train: str) -> list[str]:
        return [
            str(COMMAND),
            "fit",
            f"--config={shipped('recipes/quickstart.yaml')}",
            f"--data.train={train}",
            f"--data.tokenizer={data.tokenizer_path}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--data.budget=96",
            "--data.shuffle=4",
            "--rows_per_step=4",
            f"--hosts.limit={SILENCE}",
            "--checkpoint.every_n_train_steps=4",
            "--trainer.max_steps=40",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / name}",
            "--ckpt_path=last",
        ]

    served = (tmp_path / "train.tar").relative_to(tmp_path_factory.getbasetemp())
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    # By default the first host's torchrun keeps the ranks' store, and forgets to tell a newcomer where.
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(number: int) -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        torchrun += ["--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={network.addresses[0]}:29400"]
        torchrun += [f"--rdzv-conf=last_call_timeout=5,is_host={1 - number}"]
        torchrun += [f"--local-addr={network.addresses[number]}", "--no-python"]
        command = [*torchrun, *fit("two", f"http://{SWITCH}:8000/{served}")]
        with (tmp_path / f"{number}.log").open("ab") as log:
            return network.start(
                network.pids[1 + number], *command, env=environment, cwd=tmp_path, stdout=log, stderr=log
            )

    agents = [start(0), start(1)]
    while not (tmp_path / "two" / "checkpoints" / "last.ckpt").exists():
        assert all(agent.poll() is None for agent in agents), (tmp_path / "0.log").read_text()
        time.sleep(0.1)
    network.kill(network.pids[2], network.pids[2])
    if back:
        start(1)
    code = agents[0].wait(timeout=240)
    log = (tmp_path / "0.log").read_text()
    assert code == 0, log
    assert f"host host1 ({network.addresses[1]}, node rank 1, rank 1) is lost" in log
    assert "exitcode: 5" in log
    assert log.count("Starting with 2 processes") == 1 + back
    assert "Reading the checkpoint" in log

    done = subprocess.run(fit("one", data.patterns["train"]), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, one = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("two", "one")
    )
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-4, rtol=1e-3)


class Ticks(threading.Event):
    """What the thread waits with: nothing, but for what a test does at each tick."""

    def __init__(self, at_tick: Callable[[int], Any], ticks: int) -> None:
        super().__init__()
        self.at_tick, self.ticks, self.ticked = at_tick, ticks, 0

    def wait(self, timeout: float | None = None) -> bool:
        self.ticked += 1
        self.at_tick(self.ticked)
        return self.ticked == self.ticks


@pytest.mark.parametrize(
    ("silent", "after", "named"),
    [
        ((2,), (9,), ["c"]),
        ((1, 2), (9, 9), ["b", "c"]),
        ((0,), (9,), ["a"]),
        ((2, 0), (9, 19), ["c"]),  # the first host leaves for the loss of the third, before the fourth has seen it
        ((), (), []),
    ],
    ids=["one", "two", "the store's", "the store's afterwards", "none"],
)
def test_which_host_is_named(
    silent: tuple[int, ...],
    after: tuple[int, ...],
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the fourth of four hosts sees it; without the first, which keeps the store, it hears nobody."""
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    monkeypatch.setattr("sys.__stderr__", sys.stderr)
    hosts = [Host(name, f"10.0.0.{rank}", rank, (2 * rank, 2 * rank + 1)) for rank, name in enumerate("abc")]
    callback = Heartbeat(1.0)
    callback._signs = [b""] * 3

    def hear(tick: int) -> None:
        lost = {host for host, last in zip(silent, after, strict=True) if tick > last}
        if 0 in lost:
            return
        callback._answers += 1
        callback._signs = [sign if host in lost else str(tick).encode() for host, sign in enumerate(callback._signs)]

    callback._watch(hosts, hosts[0], 0.1, Ticks(hear, ticks=60))
    written = capsys.readouterr().err
    assert left == ([5] if named else [])
    for host in hosts:
        assert (str(host) in written) == (host.name in named)
    if named:
        assert "not heard for 1 s (hosts.limit) after step 0" in written


def test_the_launcher_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "SLURM"))]:
        monkeypatch.delenv(name)
    assert launched_processes() == {}
    slurm = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "captions"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == {"devices": 4, "num_nodes": 2}
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == {"devices": 8, "num_nodes": 3}


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_of_a_step_that_the_processes_cannot_share(rows: int, tmp_path: Path) -> None:
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), world_size=2, strategy=None)
    command = SimpleNamespace(
        trainer=trainer, config=SimpleNamespace(fit=SimpleNamespace(ckpt_path=None, rows_per_step=rows))
    )
    with pytest.raises(UserError, match=f"rows_per_step is {rows}, but must be a multiple of the 2 processes"):
        FuyuCLI.before_fit(command)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_bad_limits(limit: float) -> None:
    with pytest.raises(UserError, match=r"hosts\.limit is"):
        Heartbeat(limit)
