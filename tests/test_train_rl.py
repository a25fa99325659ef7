"""GRPO: advantages, the loss and the update, against numbers worked out by hand."""
import argparse
import math

import pytest
import torch

import train_rl
from evaluate import toy_search
from rollout import Dialogue, rollout
from train_rl import group_advantages, grpo_loss, train_step


def test_advantages_of_a_group():
    """Guards the normalisation: by the group's own mean and standard deviation, over the traces that count."""
    assert group_advantages([1, 0, 0, 1], [True] * 4, scale=True) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert group_advantages([1, 0, 9], [True, True, False], scale=False) == [0.5, -0.5, 0.0]
    assert group_advantages([1, 1, 1], [True] * 3, scale=True) == [0, 0, 0]
    assert group_advantages([1, 0], [True, False], scale=True) == [0, 0]


@pytest.mark.parametrize("ratio, advantage, expected, gradient", [
    (1.0, 2.0, -2.0, -2.0),        # the policy gradient
    (1.5, 1.0, -1.28, 0.0),        # clipped above, at 1.28 and not at 1.2
    (0.5, 1.0, -0.5, -0.5),        # below, with a positive advantage: not clipped
    (0.5, -1.0, 0.8, 0.0),         # clipped below, at 0.8
    (2.0, -1.0, 2.0, 2.0),         # above, with a negative advantage: not clipped ...
    (9.0, -1.0, 3.0, 0.0),         # ... until the second clip at 3
])
def test_the_clipped_loss(ratio, advantage, expected, gradient):
    """Guards clip (0.2, 0.28) and dual clip (3), values and gradients."""
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = grpo_loss(new, torch.zeros(1), None, torch.tensor([advantage]), kl=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5) and new.grad.item() == pytest.approx(gradient, abs=1e-5)


def test_the_kl_penalty():
    """Guards k3 = exp(d) - d - 1 with d = ref - new, inside the loss."""
    new = torch.tensor([-1.0], requires_grad=True)
    loss, logged = grpo_loss(new, new.detach(), torch.tensor([-1.5]), torch.zeros(1), kl=0.1)
    loss.backward()
    k3 = math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(0.1 * k3, abs=1e-6) and logged["kl"] == pytest.approx(k3, abs=1e-6)
    assert new.grad.item() == pytest.approx(0.1 * (1 - math.exp(-0.5)), abs=1e-6)


ARGUMENTS = dict(temperature=1.0, kl=0.1, clip_norm=1e9)


class NoStep:
    """An optimizer that keeps the gradients for the test to look at."""
    param_groups = []

    def step(self):
        pass

    def zero_grad(self, set_to_none=True):
        pass


@pytest.fixture
def groups(policy):
    questions = [toy_search("train", 0, i) for i in range(3)]
    return list(rollout(policy, questions, Dialogue(), 3, turn_tokens=12, response_tokens=90,
                        generator=torch.Generator().manual_seed(0)))


def gradients(policy, groups, micro_tokens, reference=None):
    policy.model.zero_grad()
    args = argparse.Namespace(**ARGUMENTS, micro_tokens=micro_tokens)
    logged = train_step(policy, reference, groups, [NoStep()], args, 1.0)
    return logged, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def test_the_loss_does_not_depend_on_the_micro_batches(policy, groups, tiny_folder):
    """Guards the one denominator: a token counts the same in a small and in a large micro-batch."""
    import model as models
    reference = models.load(tiny_folder, device="cpu")
    with torch.no_grad():
        reference.model.model.language_model.norm.weight.mul_(1.1)
    weighted = [(traces, [1.0, -0.5, -0.5]) for traces in groups]
    small, a = gradients(policy, weighted, 1, reference)
    large, b = gradients(policy, weighted, 10**6, reference)
    assert small["loss"] == pytest.approx(large["loss"], abs=1e-5) and small["kl"] == pytest.approx(large["kl"], abs=1e-5)
    assert small["kl"] > 0
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-5 * max(1.0, a[name].abs().max().item()), name


def test_the_gradient_is_that_of_the_formula(policy, groups):
    """Guards the update as a whole: with ratio 1 and no penalty, the gradient is that of -sum(A * log p) / tokens."""
    weighted = [(traces, [1.0, -0.5, -0.5]) for traces in groups]
    logged, found = gradients(policy, weighted, 10**6)
    policy.model.zero_grad()
    total, tokens = 0.0, 0
    for traces, advantages in weighted:
        for trace, advantage in zip(traces, advantages):
            log_probs = policy.log_probs([[trace]])
            total, tokens = total - advantage * log_probs.sum(), tokens + len(log_probs)
    (total / tokens).backward()
    assert logged["tokens"] == tokens
    for name, p in policy.model.named_parameters():
        if p.grad is not None:
            assert (p.grad - found[name]).abs().max() < 1e-5 * max(1.0, p.grad.abs().max().item()), name


def test_the_ratio_is_one_at_the_first_update(policy, groups):
    """Guards the recorded log-probabilities: taken as sampled, they are those of the update, so nothing is clipped."""
    logged, _ = gradients(policy, [(traces, [1.0, -0.5, -0.5]) for traces in groups], 10**6)
    expected = 0.0
    tokens = [sum(t.sampled) for traces in groups for t in traces]
    for n, advantage in zip(tokens, [1.0, -0.5, -0.5] * 3):
        expected -= n * advantage
    assert logged["clip"] == 0 and logged["loss"] == pytest.approx(expected / sum(tokens), abs=1e-4)


def test_groups_without_signal_are_skipped(policy, groups):
    """Guards time and statistics: where all rewards are equal, nothing is computed and nothing moves."""
    logged, found = gradients(policy, [(traces, [0.0] * 3) for traces in groups], 10**6)
    assert logged["groups_used"] == 0 and logged["tokens"] == 0 and not any(g.abs().max() > 0 for g in found.values())


def test_the_vision_tower_is_frozen(policy, groups):
    """Guards the default: no gradients in the vision tower, and its features are kept from the roll-out."""
    _, found = gradients(policy, [(traces, [1.0, -0.5, -0.5]) for traces in groups], 10**6)
    assert found and not any(".visual." in name for name in found)
    assert all(p.features is not None for traces in groups for t in traces for p in t.prompt.pictures + t.pictures)


def test_the_bonus_fades_and_stays_bounded():
    """Guards the shaping: the diversity bonus is the paper's at first, gone at half-time, and never breaks the bound."""
    args = argparse.Namespace(mode="zoom", diversity=0.2, steps=100)
    assert train_rl.weights_at(args, 0).diversity == 0.2 and train_rl.weights_at(args, 25).diversity == pytest.approx(0.1)
    assert train_rl.weights_at(args, 50).diversity == train_rl.weights_at(args, 99).diversity == 0
