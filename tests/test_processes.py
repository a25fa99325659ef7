"""Several processes: the same loss, statistics and weights as one process on the same traces. What
is at stake: with a wrong denominator, or a gradient that is not shared, training goes on without a
word and learns something else."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT, as_qwen3, in_processes, run_in
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import load_state_dict

import model
import train_sft
from evaluate import open_file
from model import (
    gather,
    gather_shares,
    is_sharded,
    load,
    rank,
    shard_if_large,
    unsharded,
    world_size,
)
from rollout import Dialogue, rollout
from train_rl import restore, save_state, update
from train_sft import fine_tune, make_optimizer

pytestmark = pytest.mark.slow
TASK = BASE.parent / "search-train.jsonl"
ARGS = SimpleNamespace(micro_tokens=1, kl=0.1, clip_norm=0.5, temperature=1.0)


def sample(policy, numbers, group, turn_tokens):
    """Groups of some of the task's questions; each has random numbers of its own."""
    dialogue = Dialogue(**json.loads((BASE / "dialogue.json").read_text()))
    questions = [open_file(TASK)[i] for i in numbers]
    with unsharded(policy):
        return rollout(policy, questions, dialogue, group, numbers, turn_tokens=turn_tokens,
                       response_tokens=90)


def load_two(folder):
    """The policy, with gradient checkpointing, and a reference that differs from it; both sharded
    if they are large."""
    policies = [load(folder, device="cpu") for _ in range(2)]
    with torch.no_grad():
        for p in policies[1].parameters():
            p.mul_(1.01)
    how = {"use_reentrant": False}
    policies[0].model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    for policy in policies:
        shard_if_large(policy)
    return policies


def steady_optimizer(policy, lr):
    """Biases of keys have next to no gradient but roundings, of which AdamW makes whole steps."""
    optimizer = make_optimizer(policy, lr)
    optimizer.param_groups[0]["eps"] = 1e-5
    return optimizer


def train(folder, start, end, replicated, per_node=None):
    """GRPO and fine-tuning on the same traces in any number of processes. start: None, or the
    folder of a state to go on from; replicated: whether each of several processes keeps all
    weights; per_node: how many of them are on what counts as a node."""
    model.REPLICATED = 10**9 if replicated else 0
    if per_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    policy, reference = load_two(folder)
    for each in (policy, reference):
        assert is_sharded(each) == (world_size() > 1 and not replicated)
    groups = sample(policy, range(5), 3, 8)
    for i, traces in enumerate(groups):          # of one question there is nothing to learn
        advantages = [1.0, 0.0, -0.5] if i != 3 else [0.0] * 3
        for trace, advantage in zip(traces, advantages, strict=True):
            trace.advantage = advantage
    train_sft.make_optimizer = steady_optimizer
    optimizer = steady_optimizer(policy, 1e-3)
    if start:
        assert restore(policy, optimizer, start) == 1
    # two updates of all, one of a question that the first process has, one without the penalty
    logged = []
    for first, kl in ((5, True), (5, True), (1, True), (4, False)):
        mine = range(rank(), first, world_size())
        logged.append(update(policy, reference if kl else None, optimizer,
                             [groups[i] for i in mine], 1e-3, ARGS))
    # and one from which no process has anything to learn
    mine = [groups[3]] if rank() == 0 else []
    logged.append(update(policy, None, optimizer, mine, 1e-3, ARGS))
    fine_tune(policy, sum(groups, []), steps=2, batch=3, lr=1e-3, seed=0, micro_tokens=1)
    end.mkdir(parents=True, exist_ok=True)
    save_state(policy, optimizer, end, 1)
    policy.save(end / "rl")
    if rank() == 0:
        torch.save(logged, end / "logged.pt")
    if not is_sharded(policy):
        weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
        assert all(torch.equal(copy, weights) for copy in gather(weights))


def same(one, two):
    """Whether the tensors and numbers of two trees are equal to 1e-5."""
    one, two = ([x for x in tree_leaves(tree) if isinstance(x, (torch.Tensor, float, int))]
                for tree in (one, two))
    if len(one) != len(two):
        return False
    pairs = [(torch.as_tensor(a).double(), torch.as_tensor(b).double())
             for a, b in zip(one, two, strict=True)]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def test_several_processes_equal_one(tiny_folder, tmp_path):
    """Guards both ways to train in several processes, replicated weights and FSDP2, the latter over
    nodes, too: uneven micro-batches, a process without a group to learn from, shared denominators,
    the norm that gradients are clipped to, activation checkpointing; and going on with what another
    number of processes kept."""
    runs = (("one", 1, None, True, None), ("replicated", 2, None, True, None),
            ("sharded", 2, None, False, None), ("nodes", 4, None, False, 2),
            ("one-sharded", 2, "one", False, None), ("sharded-one", 1, "sharded", True, None))
    for name, number, start, replicated, per_node in runs:
        start = start and tmp_path / start
        in_processes(number, train, tiny_folder, start, tmp_path / name, replicated, per_node)
    for ours, theirs in (("one", "replicated"), ("one", "sharded"), ("one", "nodes"),
                         ("one-sharded", "sharded-one")):
        logged, other = (torch.load(tmp_path / run / "logged.pt") for run in (ours, theirs))
        assert same(logged, other), (ours, theirs)
        assert all(row["tokens"] > 0 for row in logged)
        assert [row["grad_norm"] > 0 for row in logged] == [True] * 4 + [False]
        state, other = (torch.load(tmp_path / run / "state.pt") for run in (ours, theirs))
        assert state["policy"].keys() == other["policy"].keys()
        assert same(state, other), (ours, theirs)
        weights, other = (load_state_dict(tmp_path / run / "rl/model.safetensors")
                          for run in (ours, theirs))
        assert weights.keys() == other.keys() and same(weights, other)
    first, later = (torch.load(tmp_path / run / "state.pt") for run in ("one", "one-sharded"))
    assert not same(first, later)


def test_qwen3_in_several_processes(tiny_folder, tmp_path):
    """Guards FSDP2 with what only Qwen3-VL has: DeepStack, which is added between the layers whose
    weights are gathered, and an output matrix of its own."""
    as_qwen3(tiny_folder, tmp_path / "qwen3")
    for name, number in (("one", 1), ("sharded", 2)):
        in_processes(number, train, tmp_path / "qwen3", None, tmp_path / name, False)
    one, other = (torch.load(tmp_path / run / "logged.pt") for run in ("one", "sharded"))
    assert same(one, other) and [row["grad_norm"] > 0 for row in one] == [True] * 4 + [False]
    one, other = (load_state_dict(tmp_path / run / "rl/model.safetensors")
                  for run in ("one", "sharded"))
    assert one.keys() == other.keys() and same(one, other)
    before = load_state_dict(tmp_path / "qwen3/model.safetensors")
    assert one.keys() == before.keys() and not same(one, before)


def sample_share(folder, out):
    """The tokens and log-probabilities of this process's share of five questions, to a file."""
    policy = load(folder, device="cpu")
    groups = sample(policy, range(rank(), 5, world_size()), 2, 12)
    found = gather_shares([[(trace.ids, trace.log_probs) for trace in traces] for traces in groups])
    if rank() == 0:
        out.write_text(json.dumps(found))


def test_a_trace_does_not_depend_on_the_number_of_processes(tiny_folder, tmp_path):
    """Guards random numbers that belong to questions: with one stream for all, a question would get
    other traces as soon as another process, or none, took its neighbours. The sixth of six
    processes has no question at all."""
    for number in (1, 2, 6):
        in_processes(number, sample_share, tiny_folder, tmp_path / f"{number}.json")
    one, *others = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2, 6))
    for other in others:
        assert len(one) == len(other) == 5
        for ours, theirs in zip(sum(one, []), sum(other, []), strict=True):
            assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=1e-5)


# -------------------------------------------------------------------------------------- the scripts

MINI = ["--search-questions", 6, "--simulations", 2, "--sft-steps", 2, "--steps", 2, "--questions",
        3, "--update-questions", 2, "--group", 4, "--n", 6]


def numbers(row):
    """Of a line of the log, without its times."""
    return {name: value for name, value in row.items()
            if "seconds" not in name and type(value) in (int, float)}


def test_the_main_job_on_two_processes(script, tmp_path):
    """Guards the whole way under torchrun: search, fine-tuning and GRPO on two processes, of which
    the second has no question in each second update, find, sample and learn what one process does;
    all is said and written once; and the run goes on in one process."""
    (said, _), (silent, _) = in_processes(2, run_in, "train_rl", tmp_path, *MINI, "--out", "two")
    alone, _ = script("train_rl", *MINI, "--out", "one", cwd=tmp_path)
    assert said.count("step 2/2") == alone.count("step 2/2") == 1 and not silent
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "search.jsonl").read_bytes() == (two / "search.jsonl").read_bytes()
    for name in ("sft", "rl"):
        ours, theirs = (load_state_dict(run / name / "model.safetensors") for run in (one, two))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert (weight - theirs[key]).norm() <= 1e-3 * (1 + weight.norm()), (name, key)
    ours, theirs = ([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                    for run in (one, two))
    assert len(ours) == len(theirs) == 2
    assert numbers(ours[0]) == pytest.approx(numbers(theirs[0]), rel=1e-2, abs=1e-3)
    ours, theirs = ((run / "traces.jsonl").read_text().splitlines() for run in (one, two))
    assert len(ours) == len(theirs) == 2 * 3 * 4
    assert ([json.loads(row)["turns"] for row in ours[:12]]
            == [json.loads(row)["turns"] for row in theirs[:12]])
    resumed, _ = script("train_rl", *MINI, "--out", "two", "--resume", cwd=tmp_path)
    assert "resuming after step 2" in resumed


@pytest.mark.parametrize("n", [5, 200])
def test_evaluation_on_two_processes(script, tmp_path, n):
    """Guards torchrun: two processes give the figures of one and say everything once, also where
    there are too few questions for both."""
    flags = ["--n", n, "--turn-tokens", 8, "--response-tokens", 30, "--json"]
    (said, _), (silent, _) = in_processes(2, run_in, "evaluate", tmp_path, *flags, "two.json")
    alone, _ = script("evaluate", *flags, "one.json", cwd=tmp_path)
    assert said.count("without tool:") == alone.count("without tool:") or n > 128
    assert said.count("true thoughts") == 1 and not silent
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one | {"minutes": 0} == two | {"minutes": 0} and one["n"] == n


def test_an_error_of_all_processes_is_said_once(tmp_path):
    """Guards the output under torchrun itself: one line, and the exit code of an error."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run([sys.executable, *torchrun, ROOT / "train_rl.py", "--group", "1"],
                          cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode and not done.stdout
    assert done.stderr.count("error: argument --group") == 1
