"""GRPO: advantages, the loss and the update against numbers worked out by hand; what is kept of a
run, and what it is resumed from."""
import argparse
import json
import math
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


def test_the_kl_penalty():
    """Guards k3 = exp(d) - d - 1, d = ref - new, inside the loss and in the log: with d turned
    around, or with the gradient of the log-probability alone, training drifts all the same."""
    new = torch.tensor([-1.0], requires_grad=True)
    loss, sums = grpo_loss(new, new.detach(), torch.tensor([-1.5]), torch.zeros(1), kl=0.1)
    loss.backward()
    k3 = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(0.1 * k3, abs=1e-6)
    assert sums["kl"] == pytest.approx(k3, abs=1e-6)
    assert new.grad.item() == pytest.approx(0.1 * (1 - math.exp(-0.5)), abs=1e-6)


# --------------------------------------------------------------------------------------- the update

@pytest.fixture
def groups(policy):
    """Three groups of three traces with advantages 1, -0.5, -0.5."""
    parts = json.loads((BASE / "dialogue.json").read_text())
    groups = rollout(policy, open_file(TASK)[:3], Dialogue(**parts), 3, range(3), turn_tokens=12,
                     response_tokens=90)
    for traces in groups:
        for trace, advantage in zip(traces, (1.0, -0.5, -0.5), strict=True):
            trace.advantage = advantage
    return groups


@pytest.fixture
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


def assert_same(gradients, others):
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - others[name]).abs().max() < 1e-5 * scale, name


def test_the_loss_does_not_depend_on_the_micro_batches(groups, reference, gradients):
    """Guards the one denominator: a token counts the same in a small and in a large micro-batch."""
    small, a = gradients(groups, reference, micro_tokens=1)
    large, b = gradients(groups, reference)
    for name in ("loss", "kl", "drift"):
        assert small[name] == pytest.approx(large[name], abs=1e-5)
    assert small["kl"] > 0
    assert_same(a, b)


def test_the_gradient_is_that_of_the_formula(policy, groups, gradients):
    """Guards the update as a whole: with ratio 1 and no penalty, the gradient is that of
    -sum(A * log p) / tokens; nothing is clipped, for the recorded log-probabilities are those of
    the update; and the vision tower has none, for its features are kept from the rollout."""
    logged, found = gradients(groups)
    policy.zero_grad()
    total, tokens = 0.0, 0
    for trace in sum(groups, []):
        log_probs = policy.log_probs([[trace]])
        total = total - trace.advantage * log_probs.sum()
        tokens += len(log_probs)
    (total / tokens).backward()
    named = policy.named_parameters()
    assert_same({name: p.grad for name, p in named if p.grad is not None}, found)
    assert logged["tokens"] == tokens and logged["clip"] == 0 and logged["drift"] < 1e-5
    expected = -sum(trace.advantage * sum(trace.sampled) for trace in sum(groups, [])) / tokens
    assert logged["loss"] == pytest.approx(expected, abs=1e-4)
    assert found and not any(".visual." in name for name in found)


def test_traces_without_an_advantage(groups, reference, gradients):
    """Guards what no reward holds, such as points: every trace of every group is held near the
    reference model. Without the penalty such traces are left out, for time's sake alone: they count
    in the denominator as before, and where there are no others no step is made at all."""
    for trace in sum(groups[1:], []):
        trace.advantage = 0.0
    tokens = sum(sum(trace.sampled) for trace in sum(groups, []))
    logged, found = gradients(groups)
    assert logged["tokens"] == tokens
    whole, _ = gradients(groups[:1])
    assert logged["loss"] * tokens == pytest.approx(whole["loss"] * whole["tokens"], abs=1e-4)
    for trace in groups[0]:
        trace.advantage = 0.0
    logged, found = gradients(groups, reference)
    assert logged["loss"] == pytest.approx(0.1 * logged["kl"], abs=1e-6) and logged["kl"] > 0
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    logged, found = gradients(groups)
    assert logged["loss"] == logged["grad_norm"] == 0 and logged["tokens"] == tokens and not found


# ---------------------------------------------------------------------- numbers that are not finite

def test_a_gradient_that_is_not_finite_moves_nothing(policy, groups):
    """Guards the weights: one bad gradient, and they were NaN for good, saved and evaluated."""
    optimizer = make_optimizer(policy, 1e-3)
    before = [p.clone() for p in policy.parameters()]
    groups[0][0].log_probs = [-math.inf] * len(groups[0][0].ids)     # so the ratio is infinite
    updates = [update(policy, None, optimizer, groups, 1e-3, ARGS),
               update(policy, None, optimizer, groups[1:], 0.0, ARGS)]
    assert all(map(torch.equal, before, policy.parameters()))
    norms = [one["grad_norm"] for one in updates]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[1])
    row = dict(total=1.0, correct=1.0, vote="", category="", on_target=[], true_thoughts=[])
    rows = [[row | dict.fromkeys((*train_rl.LOGGED, "official", "overlong"), 0.0)
             | {"on_target": [], "true_thoughts": []}]]
    line = train_rl.describe(rows, updates)
    assert line["skipped"] == 1 and line["grad_norm"] == norms[1]
    line = train_rl.describe(rows, updates[:1])
    assert line["skipped"] == 1 and line["loss"] is None      # and so the log remains JSON
    json.dumps(line, allow_nan=False)


@pytest.mark.slow
def test_a_lost_run_is_stopped(policy, tmp_path, monkeypatch):
    """Guards hours: after five such gradients in a row there is one line that says what to do, and
    weights that are not finite are never saved."""
    args = arguments(monkeypatch, "--update-questions", 1, "--questions", 2, "--group", 2, "--n", 1)
    norms = iter([math.nan, 1.0, *[math.inf] * 5])
    monkeypatch.setattr(train_rl, "optimizer_step", lambda *_: next(norms))
    monkeypatch.setattr(train_rl, "report", lambda *_: None)
    parts = json.loads((BASE / "dialogue.json").read_text())
    with pytest.raises(UserError, match="5 gradients in a row .* lower --lr"):
        train_rl.train(policy, policy, Dialogue(**parts), args, tmp_path)
    logged = [row["skipped"] for row in train_rl.read_log(tmp_path / "log.jsonl")]
    assert logged == [1, 2, 2]
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
    and in one; without, the tiny run's."""
    common = dict(lr=1e-6, kl=0.01, questions=128, update_questions=64, steps=500, temperature=1.0,
                  top_p=1.0, sft_lr=1e-6, sft_steps=None, diversity=0.2)
    zoom = dict(group=8, warm_up=25, clip_norm=0.2, turn_tokens=1024, response_tokens=4608)
    single = dict(group=5, warm_up=0, clip_norm=1.0, turn_tokens=2048, response_tokens=2048)
    for mode, expected in (("zoom", zoom), ("grounded", single), ("think", single)):
        found = vars(arguments(monkeypatch, "--model", "a", "--task", "b", "--mode", mode))
        assert {name: found[name] for name in common | expected} == common | expected
    tiny = arguments(monkeypatch)
    assert (tiny.task, tiny.model) == (str(TASK), str(BASE))
    assert (tiny.steps, tiny.lr, tiny.kl, tiny.group, tiny.top_p) == (40, 4e-4, 0.01, 8, 1.0)


@pytest.mark.parametrize("words, message", [
    (["--group", 1], "--group"), (["--kl", "nan"], "--kl"), (["--lr", "inf"], "--lr"),
    (["--steps", 0], "--steps"), (["--diversity", 0.3], "--diversity"),
    (["--top-p", 0.99], "--top-p"), (["--temperature", 0], "--temperature")])
def test_settings_that_teach_nothing_or_wrongly(monkeypatch, words, message):
    """Guards the loss: groups of one have no advantages; a nucleus is not what is trained; a larger
    bonus would pay a wrong trace more than a right one."""
    with pytest.raises(UserError, match=message):
        arguments(monkeypatch, *words)


def test_a_run_is_resumed_as_it_was_started(monkeypatch, tmp_path, data):
    """Guards results that are half of one setting and half of another; and that what does not
    change the training may change, another file for the test among it."""
    rows = [json.loads(line) for line in TASK.read_text().splitlines()[:20]]
    common = ["--task", data("a.jsonl", rows), "--config", BASE.parent / "recipe.json", "--out",
              tmp_path / "run"]

    def opened(*words):
        args = arguments(monkeypatch, *common, *words)
        train_rl.open_run(args, last=["log.jsonl"]).close()
    with pytest.raises(UserError, match="nothing to resume"):
        opened("--resume")
    opened()
    (tmp_path / "run/log.jsonl").touch()
    with pytest.raises(UserError, match="holds a run already; give --resume"):
        opened()
    opened("--resume", "--n", 3, "--save-every", 2, "--micro-tokens", 1, "--eval-task", TASK)
    for words in (["--kl", 0.5], ["--steps", 3], ["--eval-task", ""]):
        with pytest.raises(UserError, match="was started with .*; give the same, or another"):
            opened("--resume", *words)


def test_a_warm_start_with_all_questions_has_none_for_a_test(monkeypatch, tmp_path, data):
    """Guards the final table: what was searched while --eval-task held the test is not held out of
    a later run without it; a folder of train_sft.py is taken up, but for other flags they share."""
    rows = [json.loads(line) for line in TASK.read_text().splitlines()[:20]]
    common = ["--task", data("a.jsonl", rows), "--model", BASE, "--out", tmp_path / "run"]
    train_rl.open_run(arguments(monkeypatch, *common, "--eval-task", TASK), []).close()
    (tmp_path / "run/sft").mkdir()
    with pytest.raises(UserError, match="all_of_task_trains True, not False"):
        train_rl.open_run(arguments(monkeypatch, *common), [])
    warm_start = arguments(monkeypatch, *common)
    for name in ("eval_task", "lr", "steps"):
        delattr(warm_start, name)
    (tmp_path / "run/args.json").write_text(json.dumps(vars(warm_start), default=str))
    train_rl.open_run(arguments(monkeypatch, *common, "--lr", 1), []).close()
    with pytest.raises(UserError, match="started with lr 1.0, not 2.0"):
        train_rl.open_run(arguments(monkeypatch, *common, "--lr", 2), [])


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\0" * 999, "half"])
def test_a_damaged_state_is_told(tiny_folder, tmp_path, content):
    """Guards against a traceback on state.pt after a crash of the machine."""
    policy = load(tiny_folder, device="cpu")
    optimizer = make_optimizer(policy, 1e-3)
    train_rl.save_state(policy, optimizer, tmp_path, 1)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:50_000] if content == "half" else content)
    with pytest.raises(UserError, match=r"state\.pt is damaged .*; repair or delete it") as error:
        train_rl.restore(policy, optimizer, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step, weight", [("two", 0.0), (None, 0.0), (1, math.nan)])
def test_a_state_that_cannot_be_gone_on_from(tiny_folder, tmp_path, step, weight):
    """Guards against a traceback, or a run that is lost, by numbers that no run saves."""
    policy = load(tiny_folder, device="cpu")
    optimizer = make_optimizer(policy, 1e-3)
    train_rl.save_state(policy, optimizer, tmp_path, 1)
    state = torch.load(tmp_path / "state.pt")
    next(reversed(state["policy"].values())).fill_(weight)
    torch.save(state | {"step": step}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        train_rl.restore(policy, optimizer, tmp_path)


def test_a_log_that_is_gone_is_told(tmp_path):
    """Guards the end of a run against a traceback."""
    with pytest.raises(UserError, match=r"log\.jsonl is damaged"):
        train_rl.read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("damage, rows", [
    ("[" * 99_999, 0),
    ('{"step": 2, "a', 0), ('{"step": 2, "a": 1\n', 0), ("\0" * 50, 0), ("\0\0\n[]\n7\n", 0),
    ('{"st\n{"step": 2, "b": 0}\n', 1)])
def test_rows_that_a_crash_damaged_are_dropped(tmp_path, capsys, damage, rows):
    """Guards the log: a row cut in its middle, and NULs, made it unreadable, and a run could not go
    on; they are counted."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + damage)
    train_rl.drop_rows_after(path, 2)
    assert len(train_rl.read_log(path)) == 1 + rows
    assert "damaged rows are dropped" in capsys.readouterr().out


def test_rows_of_later_steps_are_dropped(tmp_path):
    """Guards the log of a killed run: rows of steps that are done again stood there twice, and half
    a row made it unreadable."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": "\u2028"}\n{"step": 3}\n{"step": 2, "a')
    train_rl.drop_rows_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": "\u2028"}\n'


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_a_state_is_exact(tiny_folder, tmp_path, groups, dtype):
    """Guards state.pt: weights, moments and their types, for bfloat16 weights, too, whose moments
    torch rounds to bfloat16 when it loads them."""
    def fresh():
        policy = load(tiny_folder, device="cpu", dtype=dtype)
        return policy, make_optimizer(policy, 1e-3)
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


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), PermissionError(13, "no"), EOFError(),
    RuntimeError("\nunexpected pos\n576 vs 534"), Exception("I/O error: (os error 28)")])
def test_what_cannot_be_written_is_told(policy, monkeypatch, tmp_path, error):
    """Guards the end of a run: of a full disk each library tells in its own way, all of them in a
    line; the page and the last checkpoint are made again with --resume."""
    def full(*_, **how):
        raise error
    (tmp_path / "log.jsonl").touch()
    monkeypatch.setattr(train_rl, "write_report", full)
    monkeypatch.setattr(policy, "save", full)
    monkeypatch.setattr(torch, "save", full)
    args = SimpleNamespace(task="task", mode="zoom")
    optimizer = make_optimizer(policy, 1)
    for name, write in (
            ("report.html", lambda: train_rl.report(tmp_path, args, [], {})),
            ("rl", lambda: train_rl.save_checkpoint(policy, Dialogue(), 1.0, tmp_path / "rl")),
            ("state.pt", lambda: train_rl.save_state(policy, optimizer, tmp_path, 1))):
        with pytest.raises(UserError, match=f"{name} cannot be written .*; make room") as told:
            write()
        assert "\n" not in str(told.value) and not (tmp_path / name).exists()


@pytest.mark.parametrize("text, minutes", [('{"minutes": 3}', 3), ("{}", 0), (None, 0)])
def test_minutes_of_a_checkpoint(tmp_path, text, minutes):
    """Guards the final table: other checkpoints have no notes of ours."""
    if text:
        (tmp_path / "notes.json").write_text(text)
    assert train_rl.minutes_of(tmp_path / "notes.json") == minutes


@pytest.mark.parametrize("text", ["", '{"minu', "[]", '{"minutes": "long"}', '{"minutes": []}'])
def test_damaged_notes_are_told(tmp_path, text):
    """Guards against a traceback after the last step."""
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(UserError, match=r"notes\.json is damaged .*; repair or delete it"):
        train_rl.minutes_of(tmp_path / "notes.json")


@pytest.mark.parametrize("words, place, message", [
    (["--seed", 2**64], {}, "--seed"), (["--seed", 10**30], {}, "--seed"),
    (["--seed", -1], {}, "--seed"), ([], {"WORLD_SIZE": "2"}, "torchrun"),
    ([], {"WORLD_SIZE": "x", "RANK": "0"}, "torchrun"), ([], {"WORLD_SIZE": "1"}, "torchrun")])
def test_what_cannot_be_started_is_told(script, monkeypatch, words, place, message):
    """Guards against tracebacks: seeds that do not fit, half of torchrun's variables."""
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    _, errors = script("train_rl", *words, code=2)
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
