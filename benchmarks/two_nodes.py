"""Two nodes on one machine: network namespaces joined by a cable (veth), torchrun on both.

    python -m benchmarks.two_nodes [--restarts 20]         Linux, root, iproute2; ten minutes

Trains benchmarks/tiny.py's model with train_dpo.py: undisturbed; with the cable pulled in the
middle; with a rank killed in the middle, which torchrun restarts. Each must give the bytes that one
node with two ranks gives. Then, on one node, torchrun restarts a killed rank's group many times.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import tiny
from zephyr.distributed import group
from zephyr.metrics.log import trajectory

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES, PORT, CABLE = ("10.213.0.1", "10.213.0.2"), "29400", "cable"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
EPOCHS, EVERY, TIMEOUT = 25, 5, 10  # 200 steps, steps between checkpoints, seconds


class Nodes:
    """Two network namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"zephyr-{os.getpid()}-{k}" for k in range(2)]

    def __enter__(self) -> "Nodes":
        with ExitStack() as made:
            self._make(made)
            self.made = made.pop_all()
        return self

    def _make(self, made: ExitStack) -> None:
        for name in self.names:
            ip("netns", "add", name)
            made.callback(ip, "netns", "delete", name)
        ends = [("name", CABLE, "netns", name) for name in self.names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def __exit__(self, *_) -> None:
        self.made.close()

    def plug(self, state: str) -> None:
        """Bring the cable up or down, and see that both ends are."""
        ip("-n", self.names[1], "link", "set", CABLE, state)
        carrier = ["-o", "link", "show", CABLE]
        deadline = time.monotonic() + 10
        while any(
            ("LOWER_UP" in ip("-n", name, *carrier)) != (state == "up") for name in self.names
        ):
            if time.monotonic() > deadline:
                raise SystemExit(f"the cable does not go {state}")
            time.sleep(0.01)

    def start(self, log: Path, *command: str) -> list[subprocess.Popen]:
        """torchrun with one rank on each node; what node k says goes to log.k."""
        started = []
        for k, name in enumerate(self.names):
            meet = [
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(k),
                "--master-addr",
                ADDRESSES[0],
                "--master-port",
                PORT,
            ]
            cache = log.with_name(f"cache{k}")
            env = environment(GLOO_SOCKET_IFNAME=CABLE, ZEPHYR_CACHE=str(cache))
            with open(f"{log}.{k}", "w") as out:
                started.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *TORCHRUN, *meet, *command],
                        cwd=ROOT,
                        env=env,
                        stdout=out,
                        stderr=out,
                    )
                )
        return started


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def lacking() -> str:
    """What this machine does not have for two nodes; "" if they can be made."""
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces take root and iproute2"
    try:
        with Nodes():
            return ""
    except SystemExit as error:
        return str(error)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def train(place: Path, out: Path) -> list[str]:
    return [
        "train_dpo.py",
        "--model",
        str(place / "base"),
        "--data",
        str(place / "pairs.jsonl"),
        "--out",
        str(out),
        *tiny.DPO,
        "--epochs",
        str(EPOCHS),
        "--save-every",
        str(EVERY),
        "--timeout",
        str(TIMEOUT),
    ]


def ended(processes: list[subprocess.Popen], since: float, limit: float = 300) -> list[float]:
    """Wait for all; seconds from `since` until each had ended."""
    seconds = [0.0] * len(processes)
    while not all(seconds):
        for k, process in enumerate(processes):
            if not seconds[k] and process.poll() is not None:
                seconds[k] = time.monotonic() - since
        if time.monotonic() - since > limit:
            for process in processes:
                process.terminate()  # torchrun then ends its ranks
            raise SystemExit(f"not all nodes ended within {limit:.0f} s")
        time.sleep(0.05)
    return seconds


def steps(out: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.split("\n")[:-1]]  # the last may be half written
    return trajectory(rows)


def wait_for(step: int, out: Path) -> None:
    deadline = time.monotonic() + 120
    while not (rows := steps(out)) or rows[-1]["step"] < step:
        if time.monotonic() > deadline:
            raise SystemExit(f"{out}: step {step} not reached in two minutes")
        time.sleep(0.02)


def saved(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max(
        (int(p.name[5:]) for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()),
        default=0,
    )


def same(out: Path, expected: Path) -> str:
    """Says so if the two runs are bit-identical, else ends the benchmark."""
    a, b = ((x / "model" / "model.safetensors").read_bytes() for x in (out, expected))
    if a != b or steps(out) != steps(expected):
        raise SystemExit(
            f"{out} differs from {expected}: weights {a == b}, metrics "
            f"{steps(out) == steps(expected)}"
        )
    return "bit-identical"


def said(log: Path, k: int) -> str:
    """train_dpo.py's own last line on node k."""
    text = Path(f"{log}.{k}").read_text()
    return "".join(re.findall(r"^train_dpo\.py(?: \(rank \d+\))?: .*", text, re.M)[-1:])


def undisturbed(nodes: Nodes, place: Path, one: Path) -> None:
    out, log = place / "two", place / "two.log"
    codes = finish(nodes.start(log, *train(place, out)), log)
    print(f"two nodes                exit codes {codes}, {same(out, one)} to one node's two ranks")


def finish(processes: list[subprocess.Popen], log: Path) -> list[int]:
    ended(processes, time.monotonic())
    codes = [p.returncode for p in processes]
    if any(codes):
        raise SystemExit("".join(Path(f"{log}.{k}").read_text() for k in range(2)))
    return codes


def pulled(nodes: Nodes, place: Path, one: Path) -> None:
    out, log = place / "pulled", place / "pulled.log"
    processes = nodes.start(log, *train(place, out))
    wait_for(40, out)
    nodes.plug("down")
    seconds = ended(processes, time.monotonic())
    codes = [p.returncode for p in processes]
    done, kept = steps(out)[-1]["step"], saved(out)
    print(f"cable pulled at step {done}")
    for k in range(2):
        print(
            f"  node {k} ended after {seconds[k]:.1f} s (--timeout {TIMEOUT}), exit code "
            f"{codes[k]}\n    {said(log, k)}"
        )
        if seconds[k] > TIMEOUT + 15 or "did not answer" not in said(log, k):
            raise SystemExit(f"node {k} did not end as it should")
    nodes.plug("up")
    codes = finish(nodes.start(log, *train(place, out)), log)
    print(
        f"  plugged in again       exit codes {codes}, {done - kept} steps recomputed, "
        f"{same(out, one)}"
    )


def killed(nodes: Nodes, place: Path, one: Path) -> None:
    out, log = place / "killed", place / "killed.log"
    processes = nodes.start(log, "--max-restarts", "3", *train(place, out))
    wait_for(40, out)
    attempt = (out / "metrics.jsonl").stat().st_ino  # each attempt writes a new one
    since = time.monotonic()
    os.kill(ranks_of(processes[1].pid)[0], signal.SIGKILL)
    done = steps(out)[-1]["step"]
    while (out / "metrics.jsonl").stat().st_ino == attempt and time.monotonic() < since + 120:
        time.sleep(0.02)
    wait_for(done + 3, out)
    print(f"rank on node 1 killed at step {done}, going on after {time.monotonic() - since:.1f} s")
    codes = finish(processes, log)
    print(f"  by --max-restarts 3    exit codes {codes}, {same(out, one)}")


def ranks_of(agent: int) -> list[int]:
    """Process ids of an agent's ranks: its children that have a RANK."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(c) for c in children if b"\0RANK=" in Path(f"/proc/{c}/environ").read_bytes()]


def restarts(times: int, *style: str) -> int:
    """How many of `times` runs of two ranks, one of which kills itself at first, end well."""
    command = [
        *TORCHRUN,
        *style,
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        "-m",
        "benchmarks.two_nodes",
        "--worker",
    ]
    well = 0
    for _ in range(times):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), **quiet)
        try:
            well += process.wait(120) == 0
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
    return well


def worker() -> None:
    ranks = group.start()
    group.set_timeout(20)
    for i in range(20):
        if i == 10 and ranks.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        group.agree(False)
    group.finish()


@contextmanager
def tidy(keep: bool) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="two-nodes-"))
    try:
        yield place
    finally:
        if keep:
            print(f"kept {place}")
        else:
            shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.two_nodes")
    parser.add_argument("--restarts", type=int, default=20, help="on one node, of each style [20]")
    parser.add_argument("--keep", action="store_true", help="the run folders and the logs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        return worker()
    if reason := lacking():
        return print(f"two nodes: not tried: {reason}")
    sys.stdout.reconfigure(line_buffering=True)
    with tidy(o.keep) as place, Nodes() as nodes:
        tiny.make(place)
        one = place / "one"
        subprocess.run(
            [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *train(place, one)],
            cwd=ROOT,
            env=environment(ZEPHYR_CACHE=f"{place}/cache"),
            check=True,
            capture_output=True,
        )
        for scenario in (undisturbed, pulled, killed):
            scenario(nodes, place, one)
    for style in (["--standalone"], ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]):
        if o.restarts:
            well = restarts(o.restarts, *style)
            print(f"restarts, {style[-1]:<15} {well} of {o.restarts} ended well")
            if well < o.restarts:
                raise SystemExit("a restart failed")


if __name__ == "__main__":
    main()
