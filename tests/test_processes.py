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
from conftest import BASE, MINI, ROOT, as_qwen3, in_processes, run_in
from torch.utils._pytree import tree_leaves, tree_structure
from transformers.modeling_utils import load_state_dict

import model
import train_sft
from evaluate import open_file
from model import gather, gather_shares, is_sharded, load, rank, unsharded, world_size
from rollout import Dialogue, rollout
from train_rl import read_log, restore, save_state, update
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
    policy, reference = (load(folder, device="cpu") for _ in range(2))
    with torch.no_grad():                        # the two differ
        for p in reference.parameters():
            p.mul_(1.01)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (policy, reference):
        model.shard_if_large(each)
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
    # an update of all, one of a question that the first process has, one without the penalty, and
    # one from which no process has anything to learn
    logged = []
    for numbers, kl in (([0, 1, 2, 3, 4], True), ([0], True), ([0, 1, 2, 3], False), ([3], False)):
        mine = [groups[i] for i in numbers if i % world_size() == rank()]
        ref = reference if kl else None
        logged.append(update(policy, ref, optimizer, mine, 1e-3, ARGS))
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
    assert tree_structure(one) == tree_structure(two)
    pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
    return all(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-5)
               for a, b in pairs if isinstance(a, (torch.Tensor, float, int)))


def written(folder):
    """What `train` wrote: figures, state and checkpoint."""
    return (torch.load(folder / "logged.pt"), torch.load(folder / "state.pt"),
            load_state_dict(folder / "rl/model.safetensors"))


def test_several_processes_equal_one(tiny_folder, tmp_path):
    """Guards both ways to train in several processes, replicated weights and FSDP2, the latter over
    nodes, too: uneven micro-batches, a process without a group to learn from, shared denominators,
    the norm that gradients are clipped to, activation checkpointing; and going on with what another
    number of processes kept."""
    def run(number, start, *how):
        out = tmp_path / f"{start} {number} {how}"
        in_processes(number, train, tiny_folder, start, out, *how)
        return out
    one, sharded = run(1, None, True), run(2, None, False)
    found = written(one)
    for other in (sharded, run(2, None, True), run(4, None, False, 2)):
        assert same(found, written(other)), other
    assert [row["grad_norm"] > 0 for row in found[0]] == [True, True, True, False]
    assert all(row["tokens"] > 0 for row in found[0])
    later = written(run(2, one, False))
    assert same(later, written(run(1, sharded, True))) and not same(found[2], later[2])


def test_qwen3_in_several_processes(tiny_folder, tmp_path):
    """Guards FSDP2 with what only Qwen3-VL has: DeepStack, which is added between the layers whose
    weights are gathered, and an output matrix of its own."""
    as_qwen3(tiny_folder, tmp_path / "qwen3")
    for name, number in (("one", 1), ("sharded", 2)):
        in_processes(number, train, tmp_path / "qwen3", None, tmp_path / name, False)
    assert same(written(tmp_path / "one"), written(tmp_path / "sharded"))
    before, after = (load_state_dict(tmp_path / name / "model.safetensors")
                     for name in ("qwen3", "one/rl"))
    assert after.keys() == before.keys() and not same(after, before)


def sample_share(folder, out):
    """The tokens and log-probabilities of this process's share of three questions, to a file."""
    policy = load(folder, device="cpu")
    groups = sample(policy, range(rank(), 3, world_size()), 2, 12)
    found = gather_shares([[(trace.ids, trace.log_probs) for trace in traces] for traces in groups])
    if rank() == 0:
        out.write_text(json.dumps(found))


def test_a_trace_does_not_depend_on_the_number_of_processes(tiny_folder, tmp_path):
    """Guards random numbers that belong to questions: with one stream for all, a question would get
    other traces as soon as another process, or none, took its neighbours. The fourth of four
    processes has no question at all."""
    for number in (1, 2, 4):
        in_processes(number, sample_share, tiny_folder, tmp_path / f"{number}.json")
    one, two, four = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2, 4))
    assert len(one) == 3 and same(one, two) and same(one, four)


# -------------------------------------------------------------------------------------- the scripts

def test_the_main_job_on_two_processes(main_job, script, tmp_path):
    """Guards the whole way under torchrun: search, fine-tuning and GRPO on two processes, of which
    the second has no question in each second update, find, sample and learn what one process does;
    all is said and written once; and the run goes on in one process."""
    (said, _), (silent, _) = in_processes(2, run_in, "train_rl", tmp_path, *MINI)
    assert said.count("step 3/3") == 1 and not silent
    one, two = main_job[0] / "runs/tiny", tmp_path / "runs/tiny"
    assert (one / "search.jsonl").read_bytes() == (two / "search.jsonl").read_bytes()
    for name in ("sft", "rl"):
        ours, theirs = (load_state_dict(run / name / "model.safetensors") for run in (one, two))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert (weight - theirs[key]).norm() <= 1e-3 * (1 + weight.norm()), (name, key)
    ours, theirs = (read_log(run / "log.jsonl") for run in (one, two))
    assert len(ours) == len(theirs) == 3
    for name, value in ours[0].items():
        if "seconds" not in name and type(value) in (int, float):
            assert value == pytest.approx(theirs[0][name], rel=1e-2, abs=1e-3), name
    ours, theirs = (read_log(run / "traces.jsonl") for run in (one, two))
    assert len(ours) == len(theirs) == 3 * 3 * 3
    assert [row["turns"] for row in ours[:9]] == [row["turns"] for row in theirs[:9]]
    resumed, _ = script("train_rl", *MINI, "--resume", cwd=tmp_path)
    assert "resuming after step 3" in resumed


@pytest.mark.parametrize("n", [5, 130])
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
