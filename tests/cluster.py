"""A Redis Cluster of real nodes that tests kill, empty, and move slots between."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from llmstream.store.embedded import find_server


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [int(free.getsockname()[1]) for free in sockets]
    for free in sockets:
        free.close()
    return ports


def until(predicate: Callable[[], bool], timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, "the cluster is not what was expected"
        time.sleep(0.01)


class ClusterNode:
    """One server of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.port, self.bus = free_ports(2)
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder / str(self.port)
        self._folder.mkdir()
        self.socket = self._folder / "s"
        given = {
            "port": self.port,
            "bind": "127.0.0.1",
            "unixsocket": self.socket,
            "dir": self._folder,
            "save": "",
            "appendonly": "yes",
            "cluster-enabled": "yes",
            "cluster-port": self.bus,
            "cluster-allow-replica-migration": "no",  # a node without slots would make itself a replica
            "repl-diskless-sync-delay": 0,
        }
        self._command = [str(find_server())]
        for key, value in given.items():
            self._command += f"--{key}", str(value)
        self._client = redis.Redis(port=self.port, socket_timeout=5)
        self.start()

    def start(self) -> None:
        """Starts the server without waiting for it."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, start_new_session=True)

    def ask(self, *command: Any) -> Any:
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def says(self, section: str, field: str, value: object) -> bool:
        """Whether INFO says so; no while the server does not answer."""
        with suppress(redis.RedisError):
            return bool(self.ask("INFO", section)[field] == value)
        return False

    @property
    def sound(self) -> bool:
        """Whether the node takes writes."""
        with suppress(redis.RedisError):
            return b"cluster_state:ok" in self.ask("CLUSTER", "INFO")
        return False

    @property
    def linked(self) -> int:
        """Nodes that it can talk to, itself included: only these get what is published."""
        nodes = self.ask("CLUSTER", "NODES").splitlines()
        return sum(b" connected" in node and b"handshake" not in node for node in nodes)

    @property
    def id(self) -> str:
        return str(self.ask("CLUSTER", "MYID").decode())

    def owners(self) -> dict[int, int]:
        """Port by slot, as far as this node knows."""
        ranges = self.ask("CLUSTER", "SLOTS")
        return {slot: port for first, last, (_, port, *_), *_ in ranges for slot in range(first, last + 1)}

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def forget(self) -> None:
        """Loses all data of a server that was killed, but not its place in the cluster."""
        shutil.rmtree(self._folder / "appendonlydir")


class RealCluster:
    """Nodes that share the hash slots evenly, and a spare one."""

    def __init__(self, folder: Path, count: int) -> None:
        self.all = [ClusterNode(folder) for _ in range(count + 1)]
        self.nodes = self.all[:count]
        """Those that have slots."""

    def form(self) -> None:
        """Makes a cluster of the nodes."""
        until(lambda: all(node.says("server", "tcp_port", node.port) for node in self.all))
        count = len(self.nodes)
        share = -(-REDIS_CLUSTER_HASH_SLOTS // count)
        for number, node in enumerate(self.nodes):
            last = min((number + 1) * share, REDIS_CLUSTER_HASH_SLOTS) - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", number * share, last)
        for number, node in enumerate(self.all):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        until(lambda: all(node.sound and node.linked == len(self.all) for node in self.all))

    @property
    def url(self) -> str:
        """One node is enough to find the others."""
        return f"redis://{self.nodes[-1].address}/0"

    def owner(self, key: str) -> ClusterNode:
        port = self.nodes[0].owners()[key_slot(key.encode())]
        return next(node for node in self.nodes if node.port == port)

    def counted(self, error: str) -> int:
        """How often the nodes have answered with this kind of error."""
        stats = (node.ask("INFO", "errorstats") for node in self.nodes)
        return sum(found.get(f"errorstat_{error}", {}).get("count", 0) for found in stats)

    def clients(self) -> list[int]:
        """Connections of clients to each node, ours included."""
        return [len(node.ask("CLIENT", "LIST").splitlines()) for node in self.nodes]

    def subscribers(self, channel: str) -> int:
        return sum(node.ask("PUBSUB", "NUMSUB", channel)[1] for node in self.nodes)

    def restart(self, *nodes: ClusterNode) -> None:
        """Starts nodes that were killed and waits until they are back."""
        for node in nodes:
            node.start()
        until(lambda: all(each.sound for each in self.nodes))

    def promote(self, standby: ClusterNode, primary: ClusterNode) -> None:
        """Lets a replica take the place of a node without asking anybody."""
        standby.ask("CLUSTER", "FAILOVER", "TAKEOVER")
        self.nodes[self.nodes.index(primary)] = standby
        until(lambda: all(primary.port not in node.owners().values() for node in self.nodes))

    def spare(self) -> ClusterNode:
        """A node without slots."""
        return next(node for node in self.all if node not in self.nodes and node.process is not None)

    def standby(self, primary: ClusterNode) -> ClusterNode:
        """A replica of a node, in step with it."""
        node = self.spare()
        node.ask("CLUSTER", "REPLICATE", primary.id)
        until(lambda: node.says("replication", "master_link_status", "up"))
        until(lambda: node.sound and node.owners() == primary.owners())
        return node


class Migration:
    """The hash slot of a key on its way to another node, step by step."""

    def __init__(self, cluster: RealCluster, key: str, source: ClusterNode, target: ClusterNode) -> None:
        self._cluster = cluster
        self._slot = key_slot(key.encode())
        self.source = source
        self.target = target

    def begin(self) -> None:
        self.target.ask("CLUSTER", "SETSLOT", self._slot, "IMPORTING", self.source.id)
        self.source.ask("CLUSTER", "SETSLOT", self._slot, "MIGRATING", self.target.id)

    def move(self, *keys: str) -> None:
        """Moves keys, without any all that are left."""
        for key in keys or self.source.ask("CLUSTER", "GETKEYSINSLOT", self._slot, 1000):
            self.source.ask("MIGRATE", "127.0.0.1", self.target.port, key, 0, 5000)

    def finish(self) -> None:
        for node in (self.target, self.source, *self._cluster.nodes):
            node.ask("CLUSTER", "SETSLOT", self._slot, "NODE", self.target.id)

    def all_at_once(self) -> None:
        self.begin()
        self.move()
        self.finish()


@contextmanager
def real_cluster(folder: Path, count: int = 3) -> Iterator[RealCluster]:
    cluster = RealCluster(folder, count)
    try:
        cluster.form()
        yield cluster
    finally:
        for node in cluster.all:
            node.kill()
