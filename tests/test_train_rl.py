"""GRPO: advantages, the loss and the update against numbers worked out by hand; what is kept of a
run, and what it is resumed from."""
import argparse
import json
import math
import os
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE

import train_rl
from evaluate import eval_flags, open_file
from model import UserError, load
from rollout import Dialogue, parse, rollout, shared_flags
from train_rl import group_advantages, grpo_loss, update
from train_sft import make_optimizer, sft_flags

TASK = BASE.parent / "search-train.jsonl"
ARGS = SimpleNamespace(kl=0.1, clip_norm=1.0, micro_tokens=10**6, temperature=1.0)


def test_advantages_of_a_group():
    """Guards the normalisation by the group's own mean and standard deviation; and that equal
    rewards give exactly 0, where roundings of the mean, over next to no spread, gave noise."""
    assert group_advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    found = group_advantages([0.9, 0.6, 0.6])
    assert found == pytest.approx([2**0.5, -2**-0.5, -2**-0.5], abs=1e-4)
    assert group_advantages([0.56] * 7) == [0.0] * 7


@pytest.mark.parametrize("ratio, advantage, expected, gradient", [
    (1.0, 2.0, -2.0, -2.0),        # the policy gradient
    (1.5, 1.0, -1.28, 0.0),        # clipped above, at 1.28 and not at 1.2
    (0.5, 1.0, -0.5, -0.5),        # below, with a positive advantage: not clipped
    (0.5, -1.0, 0.8, 0.0),         # clipped below, at 0.8
    (2.0, -1.0, 2.0, 2.0),         # above, with a negative advantage: not clipped ...
    (9.0, -1.0, 3.0, 0.0),         # ... until the second clip at 3
])
def test_the_clipped_loss(ratio, advantage, expected, gradient):
    """Guards clip (0.2, 0.28) and dual clip (3), values and gradients; and the logged drift."""
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, sums = grpo_loss(new, torch.zeros(1), None, torch.tensor([advantage]), kl=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert sums["drift"] == pytest.approx(abs(math.log(ratio)))


# --------------------------------------------------------------------------------------- the update

@pytest.fixture(scope="module")
def policy(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def groups(policy):
    """Three groups of three traces with advantages 1, -0.5, -0.5."""
    parts = json.loads((BASE / "dialogue.json").read_text())
    groups = rollout(policy, open_file(TASK)[:3], Dialogue(**parts), 3, range(3), turn_tokens=12,
                     response_tokens=60)
    for traces in groups:
        for trace, advantage in zip(traces, (1.0, -0.5, -0.5), strict=True):
            trace.advantage = advantage
    return groups


@pytest.fixture(scope="module")
def reference(tiny_folder):
    """A policy that differs from the one that is trained."""
    reference = load(tiny_folder, device="cpu")
    with torch.no_grad():
        reference.model.model.language_model.norm.weight.mul_(1.1)
    return reference


@pytest.fixture
def gradients(policy, monkeypatch):
    """gradients(groups, reference, **args) -> what an update logs, and the gradient of each
    parameter that has one, before the step."""
    def found(groups, reference=None, **changes):
        policy.zero_grad()
        logged = update(policy, reference, None, groups, 0.0,
                        SimpleNamespace(**vars(ARGS) | changes))
        named = policy.named_parameters()
        return logged, {name: p.grad.clone() for name, p in named if p.grad is not None}
    monkeypatch.setattr(train_rl, "optimizer_step", lambda *_: 0.0)
    return found


@pytest.mark.parametrize("micro_tokens", [1, 10**6])
def test_the_gradient_is_that_of_the_formula(policy, reference, groups, gradients, micro_tokens):
    """Guards the update as a whole, whatever the micro-batches: with ratio 1, the gradient is that
    of sum(kl * k3 - A * log p) / tokens, k3 = exp(d) - d - 1; nothing is clipped, for the recorded
    log-probabilities are those of the update; the vision tower has none."""
    logged, found = gradients(groups, reference, micro_tokens=micro_tokens)
    policy.zero_grad()
    loss, tokens, constant = 0.0, 0, 0.0
    for trace in sum(groups, []):
        new = policy.log_probs([[trace]])
        d = reference.log_probs([[trace]]).detach() - new
        loss = loss + (0.1 * (d.exp() - d - 1) - trace.advantage * new).sum()
        tokens += len(new)
        constant -= trace.advantage * len(new)
    (loss / tokens).backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - found[name]).abs().max() < 1e-5 * scale, name
    assert found and not any(".visual." in name for name in found)
    assert logged["tokens"] == tokens and logged["clip"] == 0 and logged["drift"] < 1e-5
    assert logged["loss"] == pytest.approx(0.1 * logged["kl"] + constant / tokens, abs=1e-5)


def test_traces_without_an_advantage(groups, reference, gradients):
    """Guards what no reward holds, such as points: every trace of every group is held near the
    reference model. Without the penalty such traces are left out, for time's sake alone: they count
    in the denominator as before, and where there are no others no step is made at all."""
    groups = deepcopy(groups)
    for trace in sum(groups[1:], []):
        trace.advantage = 0.0
    logged, _ = gradients(groups)
    whole, _ = gradients(groups[:1])
    tokens = logged["tokens"]
    assert tokens == sum(sum(trace.sampled) for trace in sum(groups, []))
    assert logged["loss"] * tokens == pytest.approx(whole["loss"] * whole["tokens"], abs=1e-4)
    logged, _ = gradients(groups[1:], reference)
    assert logged["loss"] == pytest.approx(0.1 * logged["kl"], abs=1e-6) and logged["kl"] > 0
    logged, found = gradients(groups[1:])
    assert logged["loss"] == logged["grad_norm"] == 0 and logged["tokens"] > 0 and not found


# ---------------------------------------------------------------------- numbers that are not finite

@pytest.mark.slow
def test_a_lost_run_is_stopped(tiny_folder, tmp_path, monkeypatch):
    """Guards hours: gradients that are not finite are counted, and the log remains JSON; after five
    in a row there is one line that says what to do, and weights that are not finite are never
    saved."""
    args = arguments(monkeypatch, "--update-questions", 1, "--questions", 2, "--group", 2,
                     "--turn-tokens", 8, "--response-tokens", 30)
    norms = iter([math.nan, 1.0, *[math.inf] * 5])
    monkeypatch.setattr(train_rl, "optimizer_step", lambda *_: next(norms))
    monkeypatch.setattr(train_rl, "report", lambda *_: None)
    policy = load(tiny_folder, device="cpu")
    with pytest.raises(UserError, match="5 gradients in a row .* lower --lr"):
        train_rl.train(policy, policy, Dialogue(crop_half=32, crop_size=64), args, tmp_path)
    logged = train_rl.read_log(tmp_path / "log.jsonl")
    assert [row["skipped"] for row in logged] == [1, 2, 2]
    assert [row["grad_norm"] for row in logged] == [1.0, None, None]
    with torch.no_grad():
        policy.trainable()[0].fill_(math.nan)
    with pytest.raises(UserError, match="weights are not finite, and are not saved"):
        train_rl.save_state(policy, make_optimizer(policy, 1e-3), tmp_path, 1)
    assert not (tmp_path / "state.pt").exists()


# ----------------------------------------------------------------------------- settings, run folder

def arguments(monkeypatch, *words):
    """The parsed command line of train_rl.py."""
    monkeypatch.setattr("sys.argv", ["train_rl.py", *map(str, words)])
    parser = argparse.ArgumentParser()
    for add_flags in (shared_flags, eval_flags, sft_flags, train_rl.rl_flags):
        add_flags(parser)
    return parse(parser, "evaluate", "rollout", "train_sft", "train_rl")


def test_the_papers_settings(monkeypatch):
    """Guards the defaults: with --model and --task every number is the paper's, in several turns
    and in one."""
    common = dict(lr=1e-6, kl=0.01, questions=128, update_questions=64, steps=500, temperature=1.0,
                  top_p=1.0, sft_lr=1e-6, sft_steps=None, diversity=0.2)
    zoom = dict(group=8, warm_up=25, clip_norm=0.2, turn_tokens=1024, response_tokens=4608)
    single = dict(group=5, warm_up=0, clip_norm=1.0, turn_tokens=2048, response_tokens=2048)
    for mode, expected in (("zoom", zoom), ("grounded", single), ("think", single)):
        found = vars(arguments(monkeypatch, "--model", "a", "--task", "b", "--mode", mode))
        assert {name: found[name] for name in common | expected} == common | expected


@pytest.mark.parametrize("flag, value", [
    ("--group", 1), ("--kl", "nan"), ("--lr", "inf"), ("--steps", 0), ("--diversity", 0.3),
    ("--top-p", 0.99), ("--temperature", 0)])
def test_settings_that_teach_nothing_or_wrongly(monkeypatch, flag, value):
    """Guards the loss: groups of one have no advantages; a nucleus is not what is trained; a larger
    bonus would pay a wrong trace more than a right one."""
    with pytest.raises(UserError, match=flag):
        arguments(monkeypatch, flag, value)


def test_a_run_is_resumed_as_it_was_started(monkeypatch, tmp_path, data):
    """Guards results that are half of one setting and half of another. What does not change the
    training may change, another file for the test among it, but not to no file, which would hold
    out what was trained on. A folder of train_sft.py lacks some settings: they are taken up."""
    def opened(*words):
        args = arguments(monkeypatch, "--out", tmp_path, *words)
        train_rl.open_run(args, last=["log.jsonl"]).close()
    opened()
    path = tmp_path / "args.json"
    settings = json.loads(path.read_text())
    (tmp_path / "sft").mkdir()
    opened("--resume", "--n", 3, "--save-every", 2, "--micro-tokens", 1, "--eval-task", TASK)
    for flag, value, why in (("--kl", 0.5, "kl 0.01, not 0.5"),
                             ("--eval-task", "", "all_of_task_trains True, not False")):
        with pytest.raises(UserError, match=f"was started with {why}; give the same, or another"):
            opened("--resume", flag, value)
    for name in ("eval_task", "lr", "steps"):
        del settings[name]
    path.write_text(json.dumps(settings))
    opened("--lr", 1)
    with pytest.raises(UserError, match="lr 1.0, not 2.0"):
        opened("--lr", 2)


# --------------------------------------------------------------------- what a run goes on from

def spoil_weights(path):
    state = torch.load(path)
    next(reversed(state["policy"].values())).fill_(math.nan)
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(bytes(999)),
                                   lambda path: os.truncate(path, 50_000), spoil_weights])
def test_a_damaged_state_is_told(tiny_folder, tmp_path, spoil):
    """Guards against a traceback on state.pt after a crash of the machine, or a run that is lost,
    by numbers that no run saves."""
    policy = load(tiny_folder, device="cpu")
    optimizer = make_optimizer(policy, 1e-3)
    train_rl.save_state(policy, optimizer, tmp_path, 1)
    spoil(tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt is damaged .*; repair or delete it") as error:
        train_rl.restore(policy, optimizer, tmp_path)
    assert "\n" not in str(error.value)


def test_minutes_of_a_checkpoint(tmp_path):
    """Guards the final table: other checkpoints have no notes of ours; damaged ones are told."""
    path = tmp_path / "notes.json"
    assert train_rl.minutes_of(path) == 0
    for text, minutes in (("{}", 0), ('{"minutes": 3}', 3)):
        path.write_text(text)
        assert train_rl.minutes_of(path) == minutes
    for text in ("", '{"minu', "[]", '{"minutes": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"notes\.json is damaged .*; repair or delete it"):
            train_rl.minutes_of(path)


@pytest.mark.parametrize("damage", ['{"step": 2, "a', '{"step": 2, "a": 1\n', "\0" * 50,
                                    "\0\0\n[]\n7\n", "[" * 99_999])
def test_rows_that_are_done_again_or_damaged_are_dropped(tmp_path, capsys, damage):
    """Guards the log: rows of steps that are done again stood there twice; a row cut in its middle,
    and NULs, made it unreadable, and a run could not go on; they are counted."""
    path = tmp_path / "log.jsonl"
    kept = '{"step": 2, "a": "\u2028"}\n'
    path.write_text(f'{{"st\n{kept}{{"step": 3}}\n{damage}')
    with pytest.raises(UserError, match=r"log\.jsonl is damaged"):
        train_rl.read_log(path)
    train_rl.drop_rows_after(path, 2)
    assert path.read_text() == kept
    assert "damaged rows are dropped" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_a_state_is_exact(tiny_folder, tmp_path, groups, dtype):
    """Guards state.pt: weights, moments and their types, for bfloat16 weights, too, whose moments
    torch rounds to bfloat16 when it loads them."""
    def fresh():
        policy = load(tiny_folder, device="cpu", dtype=dtype)
        return policy, make_optimizer(policy, 1e-3)
    groups = deepcopy(groups)
    for trace in sum(groups, []):
        for picture in trace.prompt.pictures + trace.pictures:
            picture.features = picture.features.to(dtype)
    policy, optimizer = fresh()
    update(policy, None, optimizer, groups, 1e-3, ARGS)
    train_rl.save_state(policy, optimizer, tmp_path, 1)
    again, other = fresh()
    assert train_rl.restore(again, other, tmp_path) == 1
    for one, its_optimizer in ((policy, optimizer), (again, other)):
        update(one, None, its_optimizer, groups, 1e-3, ARGS)
    assert all(map(torch.equal, policy.parameters(), again.parameters()))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError(),
                                   RuntimeError("\nunexpected pos\n576 vs 534")])
def test_a_page_that_cannot_be_written_is_told(monkeypatch, tmp_path, error):
    """Guards the end of a run: of a full disk each library tells in its own way, all of them in a
    line."""
    def full(*_):
        raise error
    (tmp_path / "log.jsonl").touch()
    monkeypatch.setattr(train_rl, "write_report", full)
    with pytest.raises(UserError, match=r"report\.html cannot be written .*; make room") as told:
        train_rl.report(tmp_path, SimpleNamespace(task="", mode="zoom"), [], {})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("words, place, message", [
    (["--seed", 2**64], {}, "--seed"), (["--seed", -1], {}, "--seed"),
    ([], {"WORLD_SIZE": "2"}, "torchrun"), ([], {"WORLD_SIZE": "x", "RANK": "0"}, "torchrun")])
def test_what_cannot_be_started_is_told(script, monkeypatch, words, place, message):
    """Guards against tracebacks: seeds that do not fit, half of torchrun's variables."""
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    _, errors = script("train_rl", *words, code=2)
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
