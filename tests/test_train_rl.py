"""GRPO: advantages, the loss and the update, against numbers worked out by hand."""
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLConfig

import train_rl
from model import UserError, load
from rollout import Config, Dialogue, describe_config, rollout, toy
from train_rl import group_advantages, grpo_loss, split_for_updates, train_step


def test_advantages_of_a_group():
    """Guards the normalisation: by the group's own mean and standard deviation, over the traces
    that count."""
    def advantages(rewards, counted, scale):
        return pytest.approx(group_advantages(rewards, counted, scale), abs=1e-5)
    assert advantages([1, 0, 0, 1], [True] * 4, True) == [1, -1, -1, 1]
    assert advantages([1, 0, 9], [True, True, False], False) == [0.5, -0.5, 0.0]
    assert advantages([1, 1, 1], [True] * 3, True) == [0, 0, 0]
    assert advantages([1, 0], [True, False], True) == [0, 0]


def test_what_becomes_of_overlong_traces():
    """Guards --overlong: "mask" leaves truncated and forced traces out of the statistics, and so
    does not teach to be brief; "zero" has them count as worth nothing, however well they scored."""
    def advantages(overlong, scale=False, last="truncated"):
        traces = [SimpleNamespace(score=SimpleNamespace(total=total), ended=ended)
                  for total, ended in ((1.0, "answer"), (0.0, "stopped"), (0.8, last))]
        train_rl.set_advantages(traces, Config(overlong=overlong, scale_by_std=scale))
        return pytest.approx([trace.advantage for trace in traces], abs=1e-5)
    for last in ("truncated", "forced"):
        assert advantages("mask", last=last) == [0.5, -0.5, 0.0]
        assert advantages("zero", last=last) == [2 / 3, -1 / 3, -1 / 3]
    assert advantages("mask", scale=True) == [1, -1, 0]
    assert advantages("zero", scale=True) == [2**0.5, -2**-0.5, -2**-0.5]
    assert advantages("mask", last="answer") == [0.4, -0.6, 0.2]
    assert advantages("zero", last="answer") == [0.4, -0.6, 0.2]


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
    """Guards k2 = d^2 / 2 inside the loss and k3 = exp(d) - d - 1 in the log, d = ref - new."""
    new = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-1.5])
    loss, sums = grpo_loss(new, new.detach(), ref, torch.zeros(1), kl=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * 0.5**2 / 2, abs=1e-6)
    assert sums["kl"] == pytest.approx(math.exp(-0.5) + 0.5 - 1, abs=1e-6)
    assert new.grad.item() == pytest.approx(0.1 * 0.5, abs=1e-6)


def test_the_gradient_of_the_kl_penalty_is_that_of_the_kl_divergence():
    """Guards why the penalty is k2: averaged over the policy's own samples its gradient is that of
    KL(policy || reference), computed from the whole distributions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, requires_grad=True)
    ref = torch.randn(5, generator=generator).log_softmax(0)
    new = logits.log_softmax(0)
    divergence = (new.exp() * (new - ref)).sum()
    wanted, = torch.autograd.grad(divergence, logits, retain_graph=True)
    found = torch.zeros(5)
    for token, probability in enumerate(new.exp().tolist()):
        one = slice(token, token + 1)
        loss, _ = grpo_loss(new[one], new[one].detach(), ref[one], torch.zeros(1), kl=1.0)
        gradient, = torch.autograd.grad(loss, logits, retain_graph=True)
        found += probability * gradient
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------- the update

class NoStep:
    """An optimizer that leaves the gradients for the test to look at."""
    param_groups = []

    def step(self):
        pass

    def zero_grad(self, set_to_none=True):
        pass


@pytest.fixture
def groups(policy):
    """Three groups of three traces with advantages 1, -0.5, -0.5."""
    questions = [toy("toy-search", "train", 0, i) for i in range(3)]
    sampling = dict(turn_tokens=12, response_tokens=90)
    groups = list(rollout(policy, questions, Dialogue(), 3, range(3), **sampling))
    for traces in groups:
        for trace, advantage in zip(traces, (1.0, -0.5, -0.5), strict=True):
            trace.advantage = advantage
    return groups


def gradients(policy, groups, micro_tokens, reference=None):
    """-> what train_step logs, and the gradient of each parameter that has one."""
    policy.model.zero_grad()
    config = Config(kl=0.1, clip_norm=1e9, micro_tokens=micro_tokens)
    logged = train_step(policy, reference, groups, [NoStep()], config, 1.0)
    named = policy.model.named_parameters()
    return logged, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(gradients, others):
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - others[name]).abs().max() < 1e-5 * scale, name


def test_the_loss_does_not_depend_on_the_micro_batches(policy, groups, tiny_folder):
    """Guards the one denominator: a token counts the same in a small and in a large micro-batch."""
    reference = load(tiny_folder, device="cpu")
    with torch.no_grad():
        reference.model.model.language_model.norm.weight.mul_(1.1)
    small, a = gradients(policy, groups, 1, reference)
    large, b = gradients(policy, groups, 10**6, reference)
    for name in ("loss", "kl", "drift"):
        assert small[name] == pytest.approx(large[name], abs=1e-5)
    assert small["kl"] > 0
    assert_same(a, b)


def test_the_gradient_is_that_of_the_formula(policy, groups):
    """Guards the update as a whole: with ratio 1 and no penalty, the gradient is that of
    -sum(A * log p) / tokens."""
    logged, found = gradients(policy, groups, 10**6)
    policy.model.zero_grad()
    total, tokens = 0.0, 0
    for trace in sum(groups, []):
        log_probs = policy.log_probs([[trace]])
        total = total - trace.advantage * log_probs.sum()
        tokens += len(log_probs)
    (total / tokens).backward()
    assert logged["tokens"] == tokens
    named = policy.model.named_parameters()
    assert_same({name: p.grad for name, p in named if p.grad is not None}, found)


def test_the_ratio_is_one_at_the_first_update(policy, groups):
    """Guards the recorded log-probabilities: taken as sampled, they are those of the update, so
    nothing is clipped and nothing has drifted."""
    logged, _ = gradients(policy, groups, 10**6)
    tokens = {trace: sum(trace.sampled) for trace in sum(groups, [])}
    expected = -sum(n * trace.advantage for trace, n in tokens.items()) / sum(tokens.values())
    assert logged["clip"] == 0 and logged["drift"] < 1e-5
    assert logged["loss"] == pytest.approx(expected, abs=1e-4)


def test_groups_without_signal_are_skipped(policy, groups):
    """Guards time and statistics: where all rewards are equal, nothing is computed or moved."""
    for trace in sum(groups, []):
        trace.advantage = 0.0
    logged, found = gradients(policy, groups, 10**6)
    assert logged["groups_used"] == logged["tokens"] == logged["loss"] == 0
    assert not any(gradient.abs().max() > 0 for gradient in found.values())


def test_a_group_without_signal_gives_one_trace_to_the_penalty(policy, groups, tiny_folder):
    """Guards what no reward holds, such as points: once all answers are right, no group had a
    signal, and nothing kept the policy near the reference model any more."""
    reference = load(tiny_folder, device="cpu")
    with torch.no_grad():
        reference.model.model.language_model.norm.weight.mul_(1.1)
    for trace in sum(groups, []):
        trace.advantage = 0.0
    logged, found = gradients(policy, groups, 10**6, reference)
    first = [traces[0] for traces in groups]
    assert logged["groups_used"] == 0 and logged["kl"] > 0
    assert logged["tokens"] == sum(sum(trace.sampled) for trace in first)
    assert logged["loss"] == pytest.approx(0.1 * logged["kl"], abs=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_the_vision_tower_is_frozen(policy, groups):
    """Guards the default: no gradients in the vision tower, and its features are kept from the
    rollout."""
    _, found = gradients(policy, groups, 10**6)
    assert found and not any(".visual." in name for name in found)
    for trace in sum(groups, []):
        assert all(p.features is not None for p in trace.prompt.pictures + trace.pictures)


def test_every_question_is_in_one_update(monkeypatch):
    """Guards several updates a step: each process finds the questions of each update among its own,
    in their order, whatever the number of processes."""
    config = Config(questions=8, update_questions=4)
    numbers = list(range(8))
    assert split_for_updates(numbers, config) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    monkeypatch.setattr(train_rl, "world_size", lambda: 2)
    for rank, expected in ((0, [[0, 2], [4, 6]]), (1, [[1, 3], [5, 7]])):
        monkeypatch.setattr(train_rl, "rank", lambda rank=rank: rank)
        assert split_for_updates(numbers[rank::2], config) == expected


def test_the_bonus_fades_and_stays_bounded():
    """Guards the shaping: the diversity bonus is the paper's at first, gone at half-time, and never
    breaks the bound."""
    config = Config(diversity=0.2, steps=100)
    bonus = [train_rl.reward_weights(config, step).diversity for step in (0, 25, 50, 99)]
    assert bonus == pytest.approx([0.2, 0.1, 0, 0])


# ---------------------------------------------------------------------------- settings and memory

@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder that has the configs of both published models, and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    for size in ("3B", "7B"):
        config_of(size).save_pretrained(folder / size)
    return folder


def config_of(size):
    """The published shapes of Qwen2.5-VL."""
    hidden, inner, layers, heads, kv, vocabulary, tied = {
        "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
        "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    }[size]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                tie_word_embeddings=tied, rope_parameters=rope)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  out_hidden_size=hidden, patch_size=14, window_size=112,
                  fullatt_block_indexes=[7, 15, 23, 31])
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def configured(**given):
    return train_rl.configure_training({name: str(x) if name == "model" else x
                                        for name, x in given.items()}, "train_rl")


@pytest.mark.parametrize("family, mode, expected", [
    ("spatial", "grounded", dict(max_pixels=4_194_304, turn_tokens=2048, response_tokens=2048,
                                 group=5, warm_up=0, clip_norm=1.0)),
    ("search", "zoom", dict(max_pixels=2_850_000, turn_tokens=1024, response_tokens=4608,
                            crop_half=182, crop_size=672, crop_dot=False, group=8, warm_up=25,
                            clip_norm=0.2, diversity=0.2)),
    ("gui", "zoom", dict(max_pixels=4_194_304, turn_tokens=1024, response_tokens=3072,
                         crop_half=50, crop_size=384, crop_dot=True, group=8)),
    ("web", "think", dict(turn_tokens=2048, response_tokens=2048, group=5, diversity=0.0)),
])
def test_the_papers_settings(shapes, family, mode, expected):
    """Guards the defaults with --model, by family and mode."""
    config = configured(model=shapes / "3B", family=family, mode=mode)
    common = dict(lr=1e-6, kl=0.01, questions=128, update_questions=64, steps=500, final_lr=1.0,
                  max_crops=4, temperature=1.0, optimizer="adamw", sft_lr=1e-6, sft_batch=32,
                  sft_steps=None, train_vision=False, overlong="mask")
    assert {name: getattr(config, name) for name in expected | common} == common | expected


def test_the_tiny_bases_settings():
    """Guards the defaults without --model: among them overlong traces, which the tiny base, whose
    traces are short, is taught to end."""
    config = configured()
    assert (config.overlong, config.optimizer, config.kl) == ("zero", "muon", 0.15)
    assert config.mode == "zoom" and configured(task="toy-spatial").mode == "grounded"
    assert configured(task="toy-spatial", mode="think").mode == "think"
    assert configured(overlong="mask").overlong == "mask"


def test_flags_go_before_the_presets_and_are_marked(shapes):
    """Guards the printed settings: they are those in force, and a star says which were given."""
    config = configured(model=shapes / "3B", family="search", group=6, kl=0.0)
    shown = describe_config(config, "train_rl")
    for part in ("group=6*", "kl=0.0*", "response_tokens=4608", "family 'search'"):
        assert part in shown
    assert config.given == ("family", "group", "kl", "model")


def test_only_sharded_models_need_even_shares(monkeypatch, shapes, tiny_folder):
    """Guards several processes: a model that every process keeps whole takes any number of
    questions, and one of which each has a part is refused at once, by its config, not after hours
    of search."""
    monkeypatch.setattr(train_rl, "world_size", lambda: 2)
    train_rl.check_shares(configured(questions=3))
    train_rl.check_shares(configured(model=tiny_folder, questions=3))
    train_rl.check_shares(configured(model=shapes / "3B", questions=4, update_questions=2))
    for uneven in (dict(questions=3), dict(questions=6, update_questions=3)):
        with pytest.raises(UserError, match="multiples of the number"):
            train_rl.check_shares(configured(model=shapes / "3B", **uneven))


def test_parameters_are_counted_without_weights(policy, tiny_folder):
    """Guards the dry run: its counts are those of the model that is then made, and the published
    ones for the real shapes."""
    total, tower = train_rl.count_parameters(AutoConfig.from_pretrained(tiny_folder))
    assert total == sum(p.numel() for p in policy.model.parameters())
    assert total - tower == sum(p.numel() for p in policy.trainable())
    assert train_rl.count_parameters(config_of("3B"))[0] == 3_754_622_976
    assert train_rl.count_parameters(config_of("7B"))[0] == 8_292_166_656


def test_memory_is_what_the_settings_make_it(shapes, monkeypatch):
    """Guards the estimate: weights and states are bytes x parameters, the cache is the engine's,
    and each setting works as it says."""
    model, gib = config_of("3B"), 2**30
    total, tower = train_rl.count_parameters(model)
    def memory(**given):
        return train_rl.memory(model, configured(model=shapes / "3B", family="search", **given))
    plain, trained = memory(), total - tower
    assert plain["weights"] == plain["reference model"] == total * 2 / gib
    assert plain["update: gradients"] == trained * 2 / gib
    assert plain["AdamW's moments"] == trained * 8 / gib
    column = 36 * 2 * 128 * 2 * 2                 # layers, heads of 128, K and V, 2 bytes
    longest = 2_850_000 // 28**2 + 512 + 8 * 4608    # tokens of a group
    assert plain["rollout: keys and values"] == longest * column / gib
    assert memory(cache_tokens=262_144)["rollout: keys and values"] == 262_144 * column / gib
    assert memory(kl=0.0)["reference model"] == 0
    assert memory(train_vision=True)["update: gradients"] == total * 2 / gib
    kept, cache = "update: activations", "rollout: keys and values"
    assert memory(group=5)[kept] < plain[kept] > memory(response_tokens=2048)[kept]
    assert memory(cache_tokens=1)[cache] == plain[cache] < memory(group=100)[cache]
    monkeypatch.setattr(train_rl, "world_size", lambda: 8)
    shared = memory()
    assert shared["weights"] == plain["weights"] / 8
    assert shared["rollout: whole weights"] == trained * 2 / gib


def test_the_dry_run_stops_before_anything(tmp_path, shapes, monkeypatch, capsys):
    """Guards --dry-run: it prints settings and estimate, and makes no file."""
    monkeypatch.chdir(tmp_path)
    train_rl.main({"model": str(shapes / "7B"), "family": "search", "dry_run": True})
    printed = capsys.readouterr().out
    assert "group=8" in printed and "peak of the update" in printed and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="needs --model"):
        train_rl.main({"dry_run": True})
