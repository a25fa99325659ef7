"""Several processes (torchrun): the same loss, statistics and weights as one process on the same traces. What is at stake: with a
wrong denominator, or a gradient that is not shared, training goes on without a word and learns something else."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROCESS = """
import sys
from types import SimpleNamespace

import torch
import evaluate as evaluation
import model as models
import train_rl as rl
import train_sft as sft
from model import whole
from rollout import Dialogue, rank, rollout, run, shard, whole_weights, world

def main():
    torch.set_num_threads(1)
    found = {}
    for kind in ("adamw", "muon"):
        policy, reference = (models.load(sys.argv[1], device="cpu") for _ in range(2))
        with torch.no_grad():
            for p in reference.model.parameters():
                p.mul_(1.01)
        policy.train_vision = reference.train_vision = kind == "muon"
        if kind == "muon":
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if world() > 1:
            shard(policy)
            shard(reference)
        questions = [evaluation.toy_search("train", 0, i) for i in range(5)]
        with whole_weights(policy):
            groups = list(rollout(policy, questions, Dialogue(max_crops=1), 3, turn_tokens=8, response_tokens=40,
                                  generator=torch.Generator().manual_seed(1)))
        groups.sort(key=lambda traces: traces[0].question.id)
        pairs = [(traces, [1.0, 0.0, -0.5] if i != 3 else [0.0] * 3) for i, traces in enumerate(groups)]
        optimizers = sft.make_optimizers(policy, kind, 1e-3, 1e-3)
        args = SimpleNamespace(micro_tokens=1, temperature=1.0, kl=0.1, clip_norm=1.0, reference="gpu")
        logged = [rl.train_step(policy, reference, pairs[rank()::world()], optimizers, args, 1.0) for _ in range(2)]
        lines = []
        sft.fine_tune(policy, [t for traces in groups for t in traces], optimizers, steps=2, batch=3, seed=0, micro_tokens=1,
                      log=lines.append)
        found[kind] = logged, lines, {n: whole(p).clone() for n, p in policy.model.named_parameters()}
    if rank() == 0:
        torch.save(found, sys.argv[2])
run(main)
"""


def run_processes(number, *command):
    """Runs a command in so many processes, as torchrun does. -> their outputs"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if number > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if number > 1 else {} for r in range(number)]
    started = [subprocess.Popen([sys.executable, *map(str, command)], env=env | extra, stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.PIPE) for extra in ranks]
    outputs = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return [out for out, _ in outputs]


def test_two_processes_equal_one(tiny_folder, tmp_path):
    """Guards FSDP2: uneven micro-batches, a process without a group to learn from, shared denominators, the norm that gradients
    are clipped to, both optimizers, activation checkpointing, a trained vision tower."""
    found = []
    for number in (1, 2):
        run_processes(number, "-c", PROCESS, tiny_folder, tmp_path / f"{number}.pt")
        found.append(torch.load(tmp_path / f"{number}.pt"))
    for kind, (logged, lines, weights) in found[0].items():
        others, other_lines, other_weights = found[1][kind]
        for ours, theirs in zip(logged, others):
            assert ours["tokens"] == theirs["tokens"] > 0 and ours["groups_used"] == theirs["groups_used"] == 4
            for name, value in ours.items():
                assert theirs[name] == pytest.approx(value, abs=1e-5, rel=1e-5), (kind, name)
        assert [line.split("  ")[:3] for line in lines] == [line.split("  ")[:3] for line in other_lines]
        for name, weight in weights.items():
            assert (weight - other_weights[name]).abs().max() < 1e-5, (kind, name)
