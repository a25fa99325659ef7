"""Several processes: the same loss, statistics and weights as one process on the same traces. What
is at stake: with a wrong denominator, or a gradient that is not shared, training goes on without a
word and learns something else."""
import json
import os
import sys

import pytest
import torch
from conftest import in_processes
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import load_state_dict

import model
from model import (
    UserError,
    average_gradients,
    gather,
    gather_shares,
    is_sharded,
    load,
    rank,
    shard_if_large,
    unsharded,
    world_size,
)
from rollout import Config, processes_to_start, read_command_line, rollout, toy
from train_rl import restore, save_state, train_step
from train_sft import TINY, fine_tune, make_optimizers

KINDS = ("adamw", "muon")
CONFIG = Config(micro_tokens=1, kl=0.1)


def load_two(folder, kind):
    """The policy, and a reference that differs from it; both sharded if they are large."""
    policies = [load(folder, device="cpu") for _ in range(2)]
    with torch.no_grad():
        for p in policies[1].model.parameters():
            p.mul_(1.01)
    for policy in policies:
        policy.train_vision = kind == "muon"
    if kind == "muon":
        how = {"use_reentrant": False}
        policies[0].model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    for policy in policies:
        shard_if_large(policy)
    return policies


def some_groups(policy):
    """Traces of five questions, with advantages; of one question there is nothing to learn."""
    questions = [toy("toy-search", "train", 0, i) for i in range(5)]
    with unsharded(policy):
        groups = list(rollout(policy, questions, TINY, 3, range(5), turn_tokens=8,
                              response_tokens=40))
    groups.sort(key=lambda traces: traces[0].question.id)
    for i, traces in enumerate(groups):
        advantages = [1.0, 0.0, -0.5] if i != 3 else [0.0] * 3
        for trace, advantage in zip(traces, advantages, strict=True):
            trace.advantage = advantage
    return groups


def train(folder, start, end, replicated):
    """GRPO and fine-tuning, by both optimizers. start: None, or the folder of a state to go on
    from; replicated: whether each of several processes keeps all weights."""
    model.REPLICATED = 10**9 if replicated else 0
    for kind in KINDS:
        policy, reference = load_two(folder, kind)
        for each in (policy, reference):
            assert is_sharded(each) == (world_size() > 1 and not replicated)
        groups = some_groups(policy)
        optimizers = make_optimizers(policy, kind, 1e-3, 1e-3)
        for group in optimizers[-1].param_groups:
            group["eps"] = 1e-5     # the biases of keys have next to no gradient, only roundings
        if start:
            restore(policy, optimizers, start / kind)
        share = groups[rank()::world_size()]
        logged = [train_step(policy, reference, share, optimizers, CONFIG, 1.0) for _ in range(2)]
        lines, traces = [], sum(groups, [])
        fine_tune(policy, traces, optimizers, steps=2, batch=3, seed=0, micro_tokens=1,
                  log=lines.append)
        out = end / kind
        out.mkdir(parents=True, exist_ok=True)
        save_state(policy, optimizers, out, 1)
        policy.save(out / "rl")
        if rank() == 0:
            torch.save([logged, lines], out / "logged.pt")
        if is_sharded(policy):
            continue
        share = groups[:1][rank()::world_size()]        # the second process has none
        logged = [train_step(policy, reference, share, optimizers, CONFIG, 1.0)]
        fine_tune(policy, traces, optimizers, steps=1, batch=1, seed=1, log=lines.append)
        weights = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
        assert all(torch.equal(copy, weights) for copy in gather(weights))
        if rank() == 0:
            torch.save([logged, lines, weights], out / "uneven.pt")


def same(one, two):
    """Whether the tensors and numbers of two trees are equal to 1e-5."""
    one, two = ([x for x in tree_leaves(tree) if isinstance(x, (torch.Tensor, float, int))]
                for tree in (one, two))
    if len(one) != len(two):
        return False
    pairs = [(torch.as_tensor(a).double(), torch.as_tensor(b).double())
             for a, b in zip(one, two, strict=True)]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def figures(line):
    """A line of fine-tuning without its times."""
    return line.split("  ")[:3]


def test_two_processes_equal_one(tiny_folder, tmp_path):
    """Guards both ways to train in several processes, replicated weights and FSDP2: uneven
    micro-batches, a process without a group to learn from, shared denominators, the norm that
    gradients are clipped to, both optimizers, activation checkpointing, a trained vision tower; and
    going on with what another number of processes kept."""
    for number, start, end, replicated in ((1, None, "one", True), (2, None, "replicated", True),
                                           (2, None, "sharded", False),
                                           (2, "one", "one-sharded", False),
                                           (1, "sharded", "sharded-one", True)):
        start = start and tmp_path / start
        in_processes(number, train, tiny_folder, start, tmp_path / end, replicated)
    for kind in KINDS:
        for ours, theirs in (("one", "replicated"), ("one", "sharded"),
                             ("one-sharded", "sharded-one")):
            compare(tmp_path / ours / kind, tmp_path / theirs / kind)
        first = torch.load(tmp_path / "one" / kind / "state.pt")
        assert not same(first, torch.load(tmp_path / "one-sharded" / kind / "state.pt"))
        uneven, other = (torch.load(tmp_path / name / kind / "uneven.pt")
                         for name in ("one", "replicated"))
        assert same(uneven, other) and uneven[0][0]["groups_used"] == 1


def compare(ours, theirs):
    """Two runs have the same log, state and weights."""
    logged, lines = torch.load(ours / "logged.pt")
    other, other_lines = torch.load(theirs / "logged.pt")
    assert same(logged, other)
    assert all(step["tokens"] > 0 and step["groups_used"] == 4 for step in logged)
    assert list(map(figures, lines)) == list(map(figures, other_lines))
    state, other = (torch.load(run / "state.pt") for run in (ours, theirs))
    assert state["model"].keys() == other["model"].keys() and same(state, other)
    weights, other = (load_state_dict(run / "rl/model.safetensors") for run in (ours, theirs))
    assert same(weights, other) and weights.keys() == other.keys()


@pytest.mark.parametrize("flags, gpu, number", [
    ([], False, "cores"), (["--processes", "3"], False, 3), (["--processes=1"], False, 1),
    (["--image", "a.png", "--question", "?", "--processes", "3"], False, 1),
    (["--image-root", "images", "--processes", "3"], False, 3),
    ([], True, 1), (["--processes", "1"], True, 1)])
def test_how_many_processes_are_started(monkeypatch, flags, gpu, number):
    """Guards the start: one process a core, but never more for what is done at once, nor on a GPU,
    nor inside of torchrun."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    given = read_command_line("evaluate", "")
    assert processes_to_start(given) == (8 if number == "cores" else number)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_to_start(given) == 1


def test_a_dry_run_starts_no_processes(monkeypatch):
    """Guards --dry-run: its estimate was printed after processes had been started for nothing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--dry-run", "--processes", "3"])
    assert processes_to_start(read_command_line("train_rl", "")) == 1


@pytest.mark.parametrize("number, message", [("2", "on GPUs use torchrun"), ("0", "at least 1"),
                                             ("two", "invalid int")])
def test_processes_that_cannot_be_started(monkeypatch, number, message):
    """Guards the messages; and a GPU that several processes would share without a word."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--processes", number])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=message):
        processes_to_start(read_command_line("evaluate", ""))


def average():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 2.0 + rank())      # of both
    if rank() == 1:
        parameters[1].grad = torch.ones(2, 3)                  # of one; and the last one has none
    average_gradients(parameters)
    gradients = [None if p.grad is None else p.grad.unique().tolist() for p in parameters]
    print(gradients, file=sys.stderr)


def test_gradients_of_replicated_weights_are_averaged():
    """Guards weights that are the same everywhere: a gradient of one process alone counts in all,
    and where no process has one there is none, for along zeros, too, an optimizer takes a step: it
    has momentum and weight decay."""
    outputs = in_processes(2, average)
    assert [told for _, told in outputs] == ["[[2.5], [0.5], None]\n"] * 2


def sample(folder, out):
    """The tokens and log-probabilities of this process's share of some questions, to a file."""
    policy = load(folder, device="cpu")
    questions = [toy("toy-search", "train", 0, i) for i in range(5)]
    mine = slice(rank(), None, world_size())
    groups = rollout(policy, questions[mine], TINY, 2, range(5)[mine], turn_tokens=12,
                     response_tokens=90)
    share = sorted(groups, key=lambda traces: traces[0].question.id)
    found = gather_shares([[(t.ids, t.log_probs) for t in traces] for traces in share])
    if rank() == 0:
        out.write_text(json.dumps(found))


def test_a_trace_does_not_depend_on_the_number_of_processes(tiny_folder, tmp_path):
    """Guards random numbers that belong to questions: with one stream for all, a question would get
    other traces as soon as another process, or none, took its neighbours."""
    for number in (1, 2):
        in_processes(number, sample, tiny_folder, tmp_path / f"{number}.json")
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert len(one) == len(two) == 5
    for ours, theirs in zip(sum(one, []), sum(two, []), strict=True):
        assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=1e-5)
