"""More ranks than two, two nodes, replicas; ranks that hang or die; signals; restarts."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import two_nodes
from helpers import WORKERS
from model_helpers import close, folder_of, gradients, model, pairs, token_arrays
from run_helpers import torchrun
from zephyr import losses, optim
from zephyr.data.batching import DocumentSteps, PairSteps, epoch
from zephyr.distributed import lost
from zephyr.distributed.group import finish, set_timeout, start
from zephyr.metrics.means import Means

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs() -> dict:
    rng = np.random.default_rng(5)
    rows = [[rng.integers(0, 101, n).tolist() for n in row] for row in rng.integers(1, 9, (3, 3))]
    return {"batches": [pairs(rank) for rank in range(4)], "data": token_arrays(rows)}


@pytest.fixture(scope="module")
def four(tmp_path_factory, inputs) -> list[dict]:
    where = tmp_path_factory.mktemp("four")
    folder_of(model(), where / "base")
    torch.save(inputs, where / "inputs.pt")
    return torchrun(WORKERS / "four_ranks.py", where, ranks=4)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_four_ranks_equal_one_process(four, inputs, replicas):
    m = model()
    logprobs = [m(batch).detach() for batch in inputs["batches"]]
    expected = gradients(m, inputs["batches"])
    norm = optim.step(optim.adamw(m, 0.1), 1e-3, 1e-2)
    rows = {sum(found[replicas]["shards"]["model.embed_tokens.weight"] for found in four) // 32}
    assert rows == {101 * replicas}, "each group of ranks holds the whole model once"
    for rank, found in enumerate(each[replicas] for each in four):
        torch.testing.assert_close(found["logprob"], logprobs[rank], rtol=0, atol=1e-6)
        close(found["gradients"], expected, 1e-6)
        assert float(found["norm"]) == pytest.approx(float(norm), rel=1e-5) and norm > 1e-2
        close(found["stepped"], {name: p.detach() for name, p in m.named_parameters()}, 1e-5)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_fewer_pairs_than_ranks_have_the_means_of_one_process(four, inputs, replicas):
    m, plan = model(), PairSteps(inputs["data"], 8, 10**6, 0, 0, 1, shuffle=False)
    (batch,) = epoch(plan, torch.device("cpu"))
    means = Means(losses.METRICS)
    means.add(3, losses.preference("dpo", m(batch), batch.response_N, torch.zeros(6), 0.1))
    for found in four:
        assert found[replicas]["means"] == pytest.approx(means.mean(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_rank_runs_as_many_microbatches_and_their_sum_is_the_whole(world):
    """23 and 3 pairs or documents in batches of 8: the last of an epoch has fewer than ranks."""
    rng = np.random.default_rng(0)
    for count in (23, 3):
        every = token_arrays([[[1] * n for n in row] for row in rng.integers(1, 12, (count, 3))])
        plans = [PairSteps(every, 8, 64, 0, rank, world) for rank in range(world)]
        shares = [list(epoch(plan, torch.device("cpu"))) for plan in plans]
        assert len({len(share) for share in shares}) == 1
        numbers = [k for share in shares for batch in share for k in batch.pairs.tolist()]
        assert sorted(numbers) == list(range(count))

        documents = token_arrays([list(range(n)) for n in rng.integers(2, 30, count)])
        plans = [DocumentSteps(documents, 8, 16, 32, 0, rank, world) for rank in range(world)]
        shares = [list(epoch(plan, torch.device("cpu"))) for plan in plans]
        assert len({len(share) for share in shares}) == 1
        targets = sum(len(batch.targets_N) for share in shares for batch in share)
        assert targets == len(documents.ids) - count


def test_a_flag_of_any_rank_is_every_ranks(four):
    assert [found["agree"] for found in four] == [[False, True, True]] * 4


def test_once_per_node_each_nodes_first_rank_builds_before_the_others(four):
    assert [found["once_per_node"] for found in four] == [["0"], ["0", "1"], ["2"], ["2", "3"]]


def test_a_folder_that_is_not_one_for_all_ranks_is_named(four):
    where = socket.gethostname()
    for found in four:
        code, text = found["not shared"]
        assert code == 5 and text.startswith("/") and "node " in text
        assert f"on {where} (rank 2) is not the folder that rank 0 has; give one" in text
    assert four[0]["left over"] == []


@pytest.mark.parametrize("replicas, use", [(3, "1, 2, 4 or 8"), (0, "1, 2, 4 or 8")])
def test_replicas_that_do_not_divide_the_ranks(monkeypatch, replicas, use):
    monkeypatch.setenv("WORLD_SIZE", "8")
    message = f"--replicas {replicas} does not divide the 8 ranks; use {use}"
    with pytest.raises(ValueError, match=message):
        start(replicas)


def scripts(source: Path, *arguments: str, ranks: int = 1) -> list[subprocess.Popen]:
    """The script as that many ranks, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, source, *arguments],
            text=True,
            env=env | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    "fault, waiting, message",
    [
        (
            "SIGSTOP",
            "backward",
            ": another rank did not answer within 3 s: it hangs, or its node is "
            "gone. Start the same command again: it goes on from the last checkpoint",
        ),
        (
            "SIGKILL",
            "together",
            "all_gather_object: the rank at 127.0.0.1 died. Start the same command "
            "again: it goes on from the last checkpoint",
        ),
        (
            "bug",
            "together",
            "all_gather_object: the rank at 127.0.0.1 died. Start the same command "
            "again: it goes on from the last checkpoint",
        ),
    ],
)
def test_a_rank_that_is_lost_ends_the_others_with_one_line(fault, waiting, message):
    processes = scripts(WORKERS / "lost_rank.py", fault, waiting, ranks=2)
    try:
        assert processes[1].stderr.readline() == "ready\n"
        _, said = processes[0].communicate(timeout=20)
    finally:
        if fault != "bug":
            processes[1].kill()
        with processes[1] as lost:  # communicate() would miss what came along with "ready"
            why = lost.stderr.read()
    assert ("TypeError: a bug of ours" in why) == (fault == "bug")
    assert processes[0].returncode == 6
    assert said.startswith("train_dpo.py: ") and said.endswith(message + "\n"), said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:40872."
        ),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"),
        dist.DistStoreError("wait timeout after 3000ms, keys: /k"),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistBackendError(
            "NCCL error: ncclRemoteError: A call failed possibly due to a network "
            "error or a remote process exiting prematurely."
        ),
    ],
    ids=str,
)
def test_errors_that_tell_of_a_lost_rank(error):
    assert lost.a_rank_is_lost(error)
    assert "\n" not in lost.message(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("[gloo/transport/tcp/device.cc:85] Unable to find address for: eth7"),
        RuntimeError("file read timed out"),
        dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=str,
)
def test_errors_that_do_not(error):
    assert not lost.a_rank_is_lost(error)


def test_the_first_signal_asks_and_one_a_second_later_ends_even_a_hung_run():
    (process,) = scripts(WORKERS / "signals.py")
    try:
        assert process.stderr.readline() == "Ctrl-C is Python's, now it hangs\n"
        time.sleep(0.2)
        process.terminate()
        process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 143


def test_the_limit_holds_in_every_group():
    ranks = start()
    try:
        own = dist.new_group(backend="gloo")  # as checkpoints in the background have
        set_timeout(7)
        for group in (dist.group.WORLD, own, *ranks.mesh.get_all_groups()):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 7
    finally:
        finish()


FAKES = {
    "scontrol": 'if [ "$1" = requeue ]; then touch requeued; else printf "one\\ntwo\\n"; fi',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "torchrun": 'printf "%s\\n" "$@" > started; echo "$SAYS" >&2; exit $CODE',
}


@pytest.mark.parametrize(
    "code, says, requeued",
    [
        (0, "model /shared/run/model", False),
        (1, "train_dpo.py: --batch 7 is less than the 16 ranks; each needs a share", False),
        (1, "train_dpo.py: asked to stop: saved after step 8 in r; the same command goes on", True),
        (
            1,
            "train_dpo.py (rank 3): all_reduce: the rank at 10.0.0.2 died. Start the same command "
            "again: it goes on from the last checkpoint",
            True,
        ),
    ],
)
def test_the_slurm_script_starts_each_node_and_requeues_what_can_go_on(
    tmp_path, code, says, requeued
):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "CODE": str(code),
        "SAYS": says,
    }
    script = ROOT / "docs" / "operate" / "zephyr.sbatch"
    command = ["bash", script, "train_dpo.py", "--data", "a file.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout and not done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    started = (tmp_path / "started").read_text().splitlines()
    for pair in (["--nnodes", "2"], ["--node-rank", "1"], ["--master-addr", "one"]):
        assert pair in [started[k : k + 2] for k in range(len(started))]
    assert started[-3:] == ["train_dpo.py", "--data", "a file.jsonl"]


def test_a_killed_rank_is_restarted_in_both_styles_of_torchrun():
    styles = (["--standalone"], ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"])
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda style: two_nodes.restarts(1, *style), styles)) == [1, 1]
