"""GRPO: advantages, the loss and the update, against numbers worked out by hand."""
import argparse
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

import model as models
import train_rl
from evaluate import toy_search
from model import Cache, UserError
from rollout import Dialogue, rollout, settings
from train_rl import group_advantages, grpo_loss, train_step


def test_advantages_of_a_group():
    """Guards the normalisation: by the group's own mean and standard deviation, over the traces that count."""
    assert group_advantages([1, 0, 0, 1], [True] * 4, scale=True) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert group_advantages([1, 0, 9], [True, True, False], scale=False) == [0.5, -0.5, 0.0]
    assert group_advantages([1, 1, 1], [True] * 3, scale=True) == [0, 0, 0]
    assert group_advantages([1, 0], [True, False], scale=True) == [0, 0]


def test_what_becomes_of_overlong_traces():
    """Guards --overlong: "mask" leaves traces that ran out of tokens or looks out of the statistics, and so does not teach to be
    brief; "zero" has them count as worth nothing, however well they scored."""
    scores, complete = [SimpleNamespace(total=total) for total in (1.0, 0.0, 0.8)], [True, True, False]
    def advantages(overlong, no_std=True, complete=complete):
        return train_rl.advantages_of(scores, complete, SimpleNamespace(overlong=overlong, no_std=no_std))
    assert advantages("mask") == [0.5, -0.5, 0.0]
    assert advantages("zero") == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages("mask", no_std=False) == pytest.approx([1, -1, 0], abs=1e-5)
    assert advantages("zero", no_std=False) == pytest.approx([2**0.5, -2**-0.5, -2**-0.5], abs=1e-5)
    whole = [True] * 3
    assert advantages("mask", complete=whole) == advantages("zero", complete=whole) == pytest.approx([0.4, -0.6, 0.2])


def test_overlong_by_default(monkeypatch, shapes):
    """Guards the defaults: the tiny base, whose traces are short, is taught to end them; the paper's recipe masks."""
    assert parsed(monkeypatch).overlong == "zero"
    assert parsed(monkeypatch, "--model", shapes / "3B").overlong == "mask"
    assert parsed(monkeypatch, "--overlong", "mask").overlong == "mask"


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
    return list(rollout(policy, questions, Dialogue(), 3, range(3), turn_tokens=12, response_tokens=90))


def gradients(policy, groups, micro_tokens, reference=None, place="gpu"):
    policy.model.zero_grad()
    args = argparse.Namespace(**ARGUMENTS, micro_tokens=micro_tokens, reference=place)
    logged = train_step(policy, reference, groups, [NoStep()], args, 1.0)
    return logged, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def test_the_loss_does_not_depend_on_the_micro_batches(policy, groups, tiny_folder):
    """Guards the one denominator: a token counts the same in a small and in a large micro-batch."""
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


def test_where_the_reference_model_lives_changes_no_number(policy, groups, tiny_folder, monkeypatch):
    """Guards --reference cpu: it is fetched once an update and sent back before the policy's own passes; the update is the
    same to the bit."""
    reference = models.load(tiny_folder, device="cpu")
    with torch.no_grad():
        reference.model.model.language_model.norm.weight.mul_(1.1)
    weighted = [(traces, [1.0, -0.5, -0.5]) for traces in groups]
    logged, found = gradients(policy, weighted, 1, reference)
    calls, plain = [], policy.log_probs
    monkeypatch.setattr(reference.model, "to", lambda device: calls.append(str(device)))
    monkeypatch.setattr(policy, "log_probs", lambda *a: calls.append("policy") or plain(*a))
    again, same = gradients(policy, weighted, 1, reference, "cpu")
    assert calls == ["cpu", "cpu", "policy", "policy", "policy"]           # fetched to the policy's device: here a CPU too
    assert again == logged and all(torch.equal(found[name], same[name]) for name in found)


# ------------------------------------------------------------------------------------------------ settings and memory

@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder that has the configs of both published models, and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    for size in ("3B", "7B"):
        config_of(size).save_pretrained(folder / size)
    return folder


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *map(str, flags)])
    return train_rl.parse_arguments()


@pytest.mark.parametrize("family, mode, expected", [
    ("spatial", "grounded", dict(max_pixels=4_194_304, turn_tokens=2048, response_tokens=2048, group=5, warm_up=0,
                                 clip_norm=1.0)),
    ("search", "zoom", dict(max_pixels=2_850_000, turn_tokens=1024, response_tokens=4608, crop_half=182, crop_size=672,
                            crop_dot=False, group=8, warm_up=25, clip_norm=0.2, diversity=0.2)),
    ("gui", "zoom", dict(max_pixels=4_194_304, turn_tokens=1024, response_tokens=3072, crop_half=50, crop_size=384,
                         crop_dot=True, group=8)),
    ("web", "think", dict(turn_tokens=2048, response_tokens=2048, group=5, diversity=0.0)),
])
def test_the_papers_settings(monkeypatch, shapes, family, mode, expected):
    """Guards the defaults with --model, by family and mode."""
    args = parsed(monkeypatch, "--model", shapes / "3B", "--family", family, "--mode", mode)
    common = dict(lr=1e-6, kl=0.01, questions=128, update_questions=64, steps=500, final_lr=1.0, max_crops=4, temperature=1.0,
                  optimizer="adamw", sft_lr=1e-6, sft_batch=32, sft_steps=None, train_vision=False)
    assert {name: getattr(args, name) for name in expected | common} == common | expected


def test_flags_go_before_the_presets_and_are_marked(monkeypatch, shapes):
    """Guards the printed settings: they are those in force, and a star says which were given."""
    args = parsed(monkeypatch, "--model", shapes / "3B", "--family", "search", "--group", 6, "--kl", 0)
    shown = settings(args)
    for part in ("group 6*", "kl 0.0*", "response_tokens 4608 ", "'search' in the mode 'zoom'"):
        assert part in shown
    assert args.given == ["family", "group", "kl", "model"]


def test_only_sharded_models_need_even_shares(monkeypatch, shapes, tiny_folder):
    """Guards several processes: a model that every process keeps whole takes any number of
    questions, and one of which each has a part is refused at once, by its config, not after hours
    of search."""
    for flags, message in ((["--questions", 3], "multiples of the number"),
                           (["--reference", "cpu"], "--reference cpu")):
        for small in ([], ["--model", tiny_folder]):
            assert parsed(monkeypatch, *small, *flags, "--gpus", 2).gpus == 2
        with pytest.raises(UserError, match=message):
            parsed(monkeypatch, "--model", shapes / "3B", *flags, "--gpus", 2)


def config_of(size):
    """The published shapes of Qwen2.5-VL."""
    hidden, inner, layers, heads, kv, vocabulary, tied = {"3B": (2048, 11_008, 36, 16, 2, 151_936, True),
                                                          "7B": (3584, 18_944, 28, 28, 4, 152_064, False)}[size]
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden, patch_size=14,
                  window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def test_parameters_are_counted_without_weights(policy, tiny_folder):
    """Guards the dry run: its counts are those of the model that is then made, and the published ones for the real shapes."""
    total, tower, largest = train_rl.count_parameters(AutoConfig.from_pretrained(tiny_folder))
    assert total == sum(p.numel() for p in policy.model.parameters())
    assert total - tower == sum(p.numel() for p in policy.trainable()) and largest < total
    assert train_rl.count_parameters(config_of("3B"))[0] == 3_754_622_976
    assert train_rl.count_parameters(config_of("7B"))[0] == 8_292_166_656


def test_memory_is_what_the_flags_make_it(policy, tiny_folder, shapes, monkeypatch):
    """Guards the estimate: states are bytes x parameters, the cache is that of the engine, and each flag works as it says."""
    config, gib = config_of("3B"), 2**30
    counts = train_rl.count_parameters(config)
    def memory(*flags):
        return train_rl.memory(config, counts, parsed(monkeypatch, "--model", shapes / "3B", "--family", "search", *flags))
    plain, total, trained = memory(), counts[0], counts[0] - counts[1]
    assert plain["weights"] == plain["reference"] == total * 2 / gib and plain["gradients"] == trained * 2 / gib
    assert plain["optimizer"] == trained * 8 / gib and memory("--adam-dtype", "bfloat16")["optimizer"] == trained * 4 / gib
    assert plain["cache"] == 262_144 * 36_864 / gib                # bytes a column: 36 layers, 2 heads of 128, K and V, 2 bytes
    assert memory("--kl", 0)["reference"] == 0 and memory("--train-vision")["gradients"] == total * 2 / gib
    for flags in (("--reference", "cpu"), ("--adam-dtype", "bfloat16"), ("--gpus", 8)):
        assert all(memory(*flags)[phase] < plain[phase] for phase in ("update", "roll-out")), flags
    assert memory("--group", 5)["update"] < plain["update"] > memory("--response-tokens", 2048)["update"]
    assert memory("--cache-tokens", 131_072)["roll-out"] < plain["roll-out"] < memory("--max-pixels", 10**7)["roll-out"]

    args = parsed(monkeypatch, "--cache-tokens", 1, "--max-pixels", 4096, "--group", 3)
    config = AutoConfig.from_pretrained(tiny_folder)
    one = train_rl.memory(config, train_rl.count_parameters(config), args, width=4)["cache of one group"]
    cache = Cache(policy.text_config, 1, 3, 4096 // 256 + train_rl.TEXT, args.response_tokens, torch.float32, "cpu")
    real = sum(x.nbytes for kv in (cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v) for x in kv)
    assert one * gib == pytest.approx(real)


def test_advice_fits_and_the_dry_run_stops_before_anything(tmp_path, shapes, monkeypatch, capsys):
    """Guards --dry-run: where the job does not fit, the flags that it names make it fit; and no file is made."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", shapes / "7B", "--family", "search", "--mode", "grounded", "--dry-run"]
    parsed(monkeypatch, *flags)
    with pytest.raises(UserError, match="it fits with --.*, or with torchrun") as told:
        train_rl.main()
    advised = str(told.value).split("it fits with ")[1].split(", or")[0].split()
    parsed(monkeypatch, *flags, *advised)
    train_rl.main()
    assert "8,292,166,656 parameters" in capsys.readouterr().out and not list(tmp_path.iterdir())
    parsed(monkeypatch, *flags, "--gpu-gib", 8)
    with pytest.raises(UserError, match="smaller model"):
        train_rl.main()
