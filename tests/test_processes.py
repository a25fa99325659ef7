"""Several processes: the same loss, statistics and weights as one process on the same traces. What
is at stake: with a wrong denominator, or a gradient that is not shared, training goes on without a
word and learns something else."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import load_state_dict

import model as models
import rollout as rollouts
import train_rl as rl
import train_sft as sft
from conftest import in_processes
from evaluate import toy_search
from model import UserError
from rollout import (Dialogue, average_gradients, gather_shares, is_sharded, processes_to_start, rank,
                     rollout, share_out, unsharded, world_size)


def train(model, start, end, replicated):
    """GRPO and fine-tuning, by both optimizers. start: None, or the folder of a state to go on from;
    replicated: whether each of several processes keeps all weights."""
    rollouts.REPLICATED = 10**9 if replicated else 0
    for kind in ("adamw", "muon"):
        policy, reference = (models.load(model, device="cpu") for _ in range(2))
        with torch.no_grad():
            for p in reference.model.parameters():
                p.mul_(1.01)
        policy.train_vision = reference.train_vision = kind == "muon"
        if kind == "muon":
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        share_out(policy)
        share_out(reference)
        assert is_sharded(policy) == is_sharded(reference) == (world_size() > 1 and not replicated)
        questions = [toy_search("train", 0, i) for i in range(5)]
        with unsharded(policy):
            groups = list(rollout(policy, questions, Dialogue(max_crops=1), 3, range(5), turn_tokens=8,
                                  response_tokens=40))
        groups.sort(key=lambda traces: traces[0].question.id)
        pairs = [(traces, [1.0, 0.0, -0.5] if i != 3 else [0.0] * 3) for i, traces in enumerate(groups)]
        optimizers = sft.make_optimizers(policy, kind, 1e-3, 1e-3)
        for group in optimizers[-1].param_groups:
            group["eps"] = 1e-5     # the biases of keys have next to no gradient: no steps of roundings
        args = SimpleNamespace(micro_tokens=1, temperature=1.0, kl=0.1, clip_norm=1.0, reference="gpu")
        if start:
            rl.restore(policy, optimizers, start / kind)
        share = pairs[rank()::world_size()]
        logged = [rl.train_step(policy, reference, share, optimizers, args, 1.0) for _ in range(2)]
        lines, traces = [], [t for traces in groups for t in traces]
        sft.fine_tune(policy, traces, optimizers, steps=2, batch=3, seed=0, micro_tokens=1,
                      log=lines.append)
        out = end / kind
        out.mkdir(parents=True, exist_ok=True)
        rl.keep_state(policy, optimizers, out, 1)
        policy.save(out / "rl")
        if rank() == 0:
            torch.save([logged, lines], out / "logged.pt")
        if not is_sharded(policy):              # the second process has nothing to learn from
            share = pairs[:1][rank()::world_size()]
            logged = [rl.train_step(policy, reference, share, optimizers, args, 1.0)]
            sft.fine_tune(policy, traces, optimizers, steps=1, batch=1, seed=1, log=lines.append)
            weights = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
            copies = rollouts.gather(weights)
            assert all(torch.equal(copy, weights) for copy in copies)
            if rank() == 0:
                torch.save([logged, lines, weights], out / "uneven.pt")


def same(one, two):
    """Whether the tensors and numbers of two trees are equal to 1e-5."""
    one, two = ([x for x in tree_leaves(tree) if isinstance(x, (torch.Tensor, float, int))] for tree in (one, two))
    return len(one) == len(two) and all(torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b).double(),
                                                       rtol=1e-5, atol=1e-5) for a, b in zip(one, two))


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
    for kind in ("adamw", "muon"):
        for ours, theirs in (("one", "replicated"), ("one", "sharded"),
                             ("one-sharded", "sharded-one")):
            ours, theirs = tmp_path / ours / kind, tmp_path / theirs / kind
            (logged, lines), (other, other_lines) = (torch.load(folder / "logged.pt") for folder in (ours, theirs))
            assert all(step["tokens"] > 0 and step["groups_used"] == 4 for step in logged) and same(logged, other)
            assert [line.split("  ")[:3] for line in lines] == [line.split("  ")[:3] for line in other_lines]
            kept, others = (torch.load(folder / "state.pt") for folder in (ours, theirs))
            assert kept["model"].keys() == others["model"].keys() and same(kept, others)
            weights, other_weights = (load_state_dict(folder / "rl" / "model.safetensors") for folder in (ours, theirs))
            assert same(weights, other_weights) and weights.keys() == other_weights.keys()
        begun = torch.load(tmp_path / "one" / kind / "state.pt")
        assert not same(begun, torch.load(tmp_path / "one-sharded" / kind / "state.pt"))
        uneven, other = (torch.load(tmp_path / name / kind / "uneven.pt")
                         for name in ("one", "replicated"))
        assert same(uneven, other) and uneven[0][0]["groups_used"] == 1


@pytest.mark.parametrize("flags, gpu, number", [
    ([], False, "cores"), (["--processes", "3"], False, 3), (["--processes=1"], False, 1),
    (["--image", "a.png", "--question", "?", "--processes", "3"], False, 1), (["--help"], False, 1),
    (["--image-root", "images", "--processes", "3"], False, 3), (["--dry-run"], False, 1),
    ([], True, 1), (["--processes", "1"], True, 1)])
def test_how_many_processes_are_started(monkeypatch, flags, gpu, number):
    """Guards the start: one process a core, but never more for what is done at once, nor on a GPU,
    nor inside of torchrun."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    assert processes_to_start() == (8 if number == "cores" else number)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_to_start() == 1


@pytest.mark.parametrize("number, message", [("2", "on GPUs use torchrun"), ("0", "at least 1"),
                                             ("two", "invalid int")])
def test_processes_that_cannot_be_started(monkeypatch, number, message):
    """Guards the messages; and a GPU that several processes would share without a word."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--processes", number])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=message):
        processes_to_start()


def average():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 2.0 + rank())      # of both
    if rank() == 1:
        parameters[1].grad = torch.ones(2, 3)                  # of one; and the last one has none
    average_gradients(parameters)
    found = [None if p.grad is None else p.grad.unique().tolist() for p in parameters]
    print(found, file=sys.stderr)


def test_gradients_of_replicated_weights_are_averaged():
    """Guards weights that are the same everywhere: a gradient of one process alone counts in all,
    and where no process has one there is none, for along zeros, too, an optimizer takes a step: it
    has momentum and weight decay."""
    outputs = in_processes(2, average)
    assert [told for _, told in outputs] == ["[[2.5], [0.5], None]\n"] * 2


def sample(model, out):
    """The tokens and log-probabilities of this process's share of some questions, to a file."""
    policy = models.load(model, device="cpu")
    questions, mine = [toy_search("train", 0, i) for i in range(5)], slice(rank(), None, world_size())
    jobs = rollout(policy, questions[mine], Dialogue(), 2, range(5)[mine], turn_tokens=12, response_tokens=90)
    share = sorted(jobs, key=lambda traces: traces[0].question.id)
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
    for (ids, log_probs), (other_ids, others) in zip(sum(one, []), sum(two, []), strict=True):
        assert ids == other_ids and log_probs == pytest.approx(others, abs=1e-5)
