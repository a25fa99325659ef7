"""What model.py promises: exact log-probabilities, tokens that are really the policy's, checkpoints
that others can load."""
import inspect
import json
import math
import os
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    as_qwen3,
    converse,
    in_processes,
    noise,
    pixel_values,
    plain_log_probs,
    plain_model,
    prompts,
    recorded,
)
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import model
from model import (
    Cache,
    Chunk,
    Engine,
    Sequence,
    TrainLayout,
    UserError,
    free_columns,
    invert,
    is_sharded,
    load,
    rank,
    shard_if_large,
    sum_gradients,
    unsharded,
    world_size,
    write_text,
)
from train_sft import full_tensor, micro_batches

FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "qwen3_vl")]
both_families = pytest.mark.parametrize("tiny_folder", FAMILIES, indirect=True)


@pytest.fixture(scope="module", params=FAMILIES[:1])
def tiny_folder(request, tiny_folder, tmp_path_factory):
    """Of Qwen2.5-VL; of both where the code, or the attention that is compared, differs."""
    if request.param == "qwen2_5_vl":
        return tiny_folder
    folder = tmp_path_factory.mktemp("models") / request.param
    as_qwen3(tiny_folder, folder)
    return str(folder)


def roll(policy, groups, turns=1, **sampling):
    """-> the groups, sampled to their ends: one turn, or several with crops between"""
    engine = Engine(policy, **{"turn_tokens": 9, "response_tokens": 60, **sampling})
    return list(engine.run(list(groups), converse(policy, turns)))


@pytest.fixture
def many_sizes(policy):
    """The tiny policy lets images keep their size, so that grids differ, and ends its turns
    often."""
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 8))
    policy.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return policy


@both_families
def test_engine_equals_a_plain_forward(many_sizes, tiny_folder):
    """Guards the K/V cache: rows that stop at different times, slots used again, a longest prompt
    that comes late, images of different sizes, positions, its bound; and beginnings that we wrote,
    of a token and more: they are read before the first token is sampled, and not trained on."""
    policy = many_sizes
    groups = list(prompts(policy, 5, 3))
    for group in groups:
        group[1].add(Chunk(policy.encode("<think>")[:1]))
        group[2].add(policy.chunk("See <|image_pad|>: ", [noise(64, 96)]))
    sequences = sum(groups, [])
    begun = [list(sequence.ids) for sequence in sequences]
    columns = len(groups[2][0].prompt.ids) + 3 * 150
    engine = Engine(policy, turn_tokens=7, response_tokens=150, cache_tokens=3 * columns - 1)
    assert len(list(engine.run(groups, converse(policy, 3)))) == 5
    assert engine.cache.prompt.shape[2] == 2
    assert list(engine.run([], None)) == []
    assert len({len(sequence.ids) for sequence in sequences}) > 1
    for sequence, first in zip(sequences, begun, strict=True):
        start = len(first)
        assert sequence.ids[:start] == first
        assert not any(sequence.sampled[:start])
        plain = plain_log_probs(tiny_folder, policy, sequence)
        assert (plain - recorded([[sequence]])).abs().max() < 1e-5


def test_what_runs_beside_changes_nothing(many_sizes):
    """Guards fixed seats: a row's tokens must be the same alone, in groups of another size, and
    whatever was at its seat before."""
    policy = many_sizes
    sampling = dict(turns=2, turn_tokens=7, response_tokens=150)
    alone = [roll(policy, [group], **sampling)[0] for group in prompts(policy, 6, 4)]
    for cache_tokens in (1, 1500, None):
        groups = [group[:i % 4 + 1] for i, group in enumerate(prompts(policy, 6, 4))]
        roll(policy, groups, cache_tokens=cache_tokens, **sampling)
        for group, same in zip(groups, alone, strict=True):
            assert [s.ids for s in group] == [s.ids for s in same[:len(group)]]


@both_families
@pytest.mark.parametrize("again", [False, True])
def test_training_equals_a_plain_forward(many_sizes, tiny_folder, again, monkeypatch):
    """Guards the update, values and gradients: each response must see the prompt and itself, and no
    other response; groups of one, responses of a token or none; logits in chunks; and what gradient
    checkpointing computes again."""
    policy = many_sizes
    done = roll(policy, prompts(policy, 2, 3, seed=3), 3, turn_tokens=6, response_tokens=150)
    done += roll(policy, prompts(policy, 1, 1), 2, turn_tokens=6, response_tokens=150)
    done += roll(policy, prompts(policy, 1, 2), turn_tokens=1)
    sequences = sum(done, [])
    done[0].append(Sequence(done[0][0].prompt))
    monkeypatch.setattr(model, "MAX_LOGITS", 5 * policy.text_config.vocab_size)
    if again:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    plain_model(tiny_folder).zero_grad()
    with_gradients = inspect.unwrap(plain_log_probs)
    plain = torch.cat([with_gradients(tiny_folder, policy, sequence) for sequence in sequences])
    log_probs = policy(done)
    assert (log_probs - plain).abs().max() < 1e-5
    weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
    for found in (log_probs, plain):
        (found * weights).sum().backward()
    theirs = dict(plain_model(tiny_folder).named_parameters())
    for name, p in policy.model.named_parameters():
        if ".visual." in name:
            assert p.grad is None
        else:
            right = theirs[name].grad
            assert (p.grad - right).abs().max() / max(1.0, right.abs().max()) < 1e-5, name
    assert [p for p in policy.parameters() if p.grad is not None] == policy.trainable()


def test_each_response_attends_to_its_prompt_and_itself():
    """Guards the update's attention against one masked product: heads that share keys, groups of
    one, responses of a token or none."""
    generator = torch.Generator().manual_seed(0)
    lengths = [[40, 1, 30, 7], [17], [17, 9, 0], [3, 0, 0]]
    seen, start = torch.zeros(124, 124, dtype=torch.bool), 0
    for prompt, *responses in lengths:
        first = slice(start, start + prompt)
        for length in (prompt, *responses):
            piece = slice(start, start + length)
            seen[piece, first] = True
            seen[piece, piece] = torch.ones(length, length).tril().bool()
            start += length
        seen[first, first] = torch.ones(prompt, prompt).tril().bool()
    assert start == len(seen)
    q, k, v, weight = (torch.randn(1, heads, start, 16, dtype=torch.float64, generator=generator)
                       for heads in (4, 2, 2, 4))
    plain = partial(F.scaled_dot_product_attention, attn_mask=seen, scale=0.25, enable_gqa=True)
    def by_layout(q, k, v):
        return TrainLayout(lengths)(0, q, torch.cat([k, v]), 0.25).transpose(1, 2)
    results = []
    for attention in (plain, by_layout):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, right in zip(*results, strict=True):
        assert (ours - right).abs().max() < 1e-12 * right.abs().max()


def test_scores_are_not_rounded_to_bfloat16(tiny_folder):
    """Guards attention scores in float32: with large key biases, as Qwen2's, scores rounded to
    bfloat16, as in Hugging Face's eager attention, make the recorded log-probabilities those of
    another policy than the one that is trained (by 0.11 a token, here)."""
    policy = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    torch.manual_seed(30)
    for layer in policy.model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=30)
    groups = roll(policy, prompts(policy, 6, 4), turn_tokens=40)
    with torch.no_grad():
        assert (recorded(groups) - policy.log_probs(groups)).abs().mean() < 0.05


def gradients(folder, out, replicated=0):
    """Each process learns from its share of four groups; the first one writes all gradients."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    model.REPLICATED = replicated
    policy = load(folder, device="cpu")
    shard_if_large(policy)
    assert is_sharded(policy) == (world_size() > 1 and not replicated)
    if is_sharded(policy):
        assert tuple(policy.model.lm_head.weight.device_mesh.shape) == (2, 2)
    groups = list(prompts(policy, 4, 2))
    with unsharded(policy):
        roll(policy, groups, turn_tokens=4)
    for batch in micro_batches(groups[rank()::world_size()], 1):
        policy.log_probs(batch.groups).sum().backward()
    sum_gradients(policy.trainable())
    found = [full_tensor(p.grad) for p in policy.trainable()]
    if rank() == 0:
        torch.save(found, out)


def test_gradients_are_sums_over_processes(tiny_folder, tmp_path):
    """Guards copies of weights, and weights sharded inside of a node and replicated over nodes:
    gradients must be the sums over all processes, not means, and not those of a node."""
    in_processes(1, gradients, tiny_folder, tmp_path / "one")
    in_processes(2, gradients, tiny_folder, tmp_path / "copies", 10**9)
    in_processes(4, gradients, tiny_folder, tmp_path / "nodes")
    one, *others = (torch.load(tmp_path / name) for name in ("one", "copies", "nodes"))
    for other in others:
        for gradient, same in zip(one, other, strict=True):
            scale = max(1.0, gradient.abs().max().item())
            assert (gradient - same).abs().max() / scale < 1e-5


# Of equal images, of some equally wide, and of some that are as many patches in another shape.
SIZES = [(64, 64), (64, 64), (64, 96), (96, 64), (64, 64), (33, 47), (300, 40), (32, 32), (128, 32)]


def test_pictures_together_are_what_the_image_processor_makes_of_each(many_sizes):
    """Guards the batch of images: each picture's patches must be its own, bit by bit, and where the
    text expects them; of the size that the image processor chooses, and resized in its way; what is
    drawn on the image later on must not be in them."""
    policy = many_sizes
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    pictures = [policy.picture(image) for image in images]
    expected = [policy.image_processor(images=[image], return_tensors="pt") for image in images]
    for image in images:
        image.paste("red", (0, 0, 64, 64))
    together = policy.pixel_values(pictures)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([out["pixel_values"] for out in expected]))
    for picture, out in zip(pictures, expected, strict=True):
        assert [list(picture.grid)] == out["image_grid_thw"].tolist()
        assert picture.tokens == len(out["pixel_values"]) // 4


@both_families
def test_features_of_many_sizes_are_those_of_each_alone(many_sizes, monkeypatch):
    """Guards the order: the vision tower gets images sorted by size, in parts; some are asked for
    twice, and computed once."""
    policy = many_sizes
    monkeypatch.setattr(model, "MAX_VISION_PATCHES", 400)
    pictures = [policy.picture(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    inputs = [(policy.pixel_values([picture]), picture.grid) for picture in pictures]
    found = policy.features(pictures + pictures[2:4])
    assert all(picture.image is None and not picture.features.requires_grad for picture in pictures)
    for features, (pixels, grid) in zip(found, inputs + inputs[2:4], strict=True):
        out = policy.model.model.get_image_features(pixels, torch.tensor([grid]))
        depths = [out.pooler_output, *getattr(out, "deepstack_features", ())]
        alone = torch.cat([image for (image,) in depths], 1)
        assert (features - alone).abs().max() < 1e-5


@both_families
def test_windows_in_a_batch_are_those_one_by_one(many_sizes):
    """Guards the vision tower's attention by lengths: images and windows of several sizes, at a
    border smaller ones, and the gradients, against Hugging Face's loop over windows."""
    policy = many_sizes
    tower = policy.model.model.visual
    tower.fullatt_block_indexes = [1]                  # the first layer attends in windows
    pictures = [policy.picture(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    pictures.sort(key=lambda picture: picture.grid)
    results = []
    for attention in ("flash_by_length", "sdpa"):
        tower.config._attn_implementation = attention
        features = torch.cat(policy.run_vision_tower(pictures))
        policy.model.zero_grad()
        features.square().mean().backward()
        results.append([features, *(p.grad for p in tower.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_tokens_are_those_of_generate(policy, tiny_folder, penalty):
    """Guards sampling and stopping: temperature 0 must give what `generate` gives; a penalty of
    repetition counts the prompt's tokens, too."""
    (sequence,) = group = next(prompts(policy, 1, 1))
    pictures = sequence.prompt.pictures
    ids = torch.tensor([sequence.prompt.ids])
    out = plain_model(tiny_folder).generate(
        input_ids=ids, pixel_values=pixel_values(policy, pictures), max_new_tokens=12,
        image_grid_thw=torch.tensor([pictures[0].grid]), do_sample=False,
        mm_token_type_ids=(ids == policy.image_token).int(), repetition_penalty=penalty,
        suppress_tokens=policy.forbidden.nonzero()[:, 0].tolist())
    roll(policy, [group], temperature=0, turn_tokens=12, repetition_penalty=penalty)
    assert sequence.ids == out[0, ids.shape[1]:].tolist()


def test_the_mask_is_exactly_the_sampled_tokens(policy, monkeypatch):
    """Guards the mask: observations are never trained on, what the policy chose is, end tokens
    too."""
    chosen, choose = [], policy.choose

    def spy(*args):
        found = choose(*args)
        chosen.extend(zip(*found, strict=True))
        return found
    monkeypatch.setattr(policy, "choose", spy)
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 3))
    marked, others = [], []
    for s in sum(roll(policy, prompts(policy, 2, 3), 3, turn_tokens=5, response_tokens=200), []):
        for token, log_prob, sampled in zip(s.ids, s.log_probs, s.sampled, strict=True):
            (marked if sampled else others).append((token, log_prob))
    assert sorted(marked) == sorted(chosen)
    assert {log_prob for _, log_prob in others} == {0}
    assert any(token in policy.end_tokens for token, _ in marked)


def test_log_probs_are_those_of_the_sampling_temperature(policy):
    """Guards against log-probabilities taken at temperature 1 whatever the sampling temperature."""
    done = roll(policy, prompts(policy, 1, 3), temperature=0.5)
    with torch.no_grad():
        assert (policy.log_probs(done, 0.5) - recorded(done)).abs().max() < 1e-5
        assert (policy.log_probs(done, 1.0) - recorded(done)).abs().max() > 1e-2


@pytest.mark.parametrize("temperature, top_p, top_k, penalty", [
    (1.0, 0.9, 20, 1.0), (0.7, 1.0, 3, 1.3), (1.4, 0.6, 0, 0.8), (1.0, 0.99, 10**6, 2.0)])
def test_sampling_is_that_of_hugging_face(policy, temperature, top_p, top_k, penalty):
    """Guards top-k, top-p and the penalty of repetition, and the order of them all: tokens and
    recorded log-probabilities must be of the distribution that Hugging Face's processors leave."""
    hidden = torch.randn(200, policy.text_config.hidden_size,
                         generator=torch.Generator().manual_seed(0))
    rngs = [random.Random(i) for i in range(200)]
    uniforms = [random.Random(i).getrandbits(32) / 2**32 for i in range(200)]
    seen = [random.Random(i).choices(range(policy.text_config.vocab_size), k=i + 1)
            for i in range(200)]
    tokens, log_probs = policy.choose(hidden, rngs, temperature, top_p, top_k, penalty, seen)
    repetition = RepetitionPenaltyLogitsProcessor(penalty)
    logits = policy.model.lm_head(hidden).detach()
    rows = [repetition(torch.tensor([ids]), row[None])
            for ids, row in zip(seen, logits, strict=True)]
    processors = LogitsProcessorList([
        SuppressTokensLogitsProcessor(policy.forbidden.nonzero()[:, 0].tolist()),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k or 10**6),
        TopPLogitsWarper(top_p)])
    theirs = processors(None, torch.cat(rows)).log_softmax(-1)
    right = invert(theirs, uniforms)
    assert tokens == right[:, 0].tolist()
    assert torch.allclose(torch.tensor(log_probs), theirs.gather(1, right)[:, 0], atol=1e-5)


def test_tokens_follow_the_distribution():
    """Guards inverse transform sampling: evenly spread numbers meet each token's probability to
    within one, in its own row; top-p's and forbidden tokens never come."""
    n = 20_000
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0],
                           [0.2, 0.0, 0.1, 0.0, 0.3, 0.0, 0.4]])
    uniforms = [i / n for i in range(n) for _ in shares]
    tokens = invert(shares.log().repeat(n, 1), uniforms).view(n, 2)
    for found, row in zip(tokens.T, shares, strict=True):
        count = found.bincount(minlength=7)
        assert (count - n * row).abs().max() <= 1 and not count[row == 0].any()


def test_the_ends_of_the_unit_interval(policy):
    """Guards the borders: 0 and the largest number below 1 must give the first and the last
    possible token, also where the probabilities add up to less than 1 in float32, and never one
    that is forbidden."""
    size = 152_064
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, -2, -1]] = -torch.inf
    log_probs = torch.log_softmax(logits, -1)
    for short in (0.0, 1e-6):
        ends = invert((log_probs - short).expand(2, -1), [0.0, 1 - 2**-32])
        assert ends.tolist() == [[2], [size - 3]]
    rngs = [SimpleNamespace(getrandbits=lambda _, bits=bits: bits) for bits in (0, 2**32 - 1)]
    hidden = torch.randn(2, policy.text_config.hidden_size)
    tokens, _ = policy.choose(hidden, rngs)
    allowed = policy.forbidden.logical_not().nonzero()
    assert tokens == [allowed[0].item(), allowed[-1].item()]


def test_response_tokens_bound_all_that_follows_the_prompt(policy):
    """Guards the cache's width: an observation that does not fit ends the row, and a turn is cut at
    turn_tokens or where the response is full."""
    said, limit = [], 40

    def on_turn(sequence, truncated):
        said.append(truncated)
        return Chunk(policy.encode("12345678"))
    policy.end_tokens = set()
    engine = Engine(policy, turn_tokens=9, response_tokens=limit)
    (group,) = engine.run(list(prompts(policy, 1, 2)), on_turn)
    assert all(said) and len(said) == 6
    for sequence in group:
        assert len(sequence.ids) == 9 + 8 + 9 + 8 + 6 and sum(sequence.sampled) == 9 + 9 + 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_sampled_from(policy, value):
    """Guards a rollout of a lost policy: no token is made up where there are no probabilities."""
    hidden = torch.zeros(2, policy.text_config.hidden_size)
    hidden[1] = value
    with pytest.raises(UserError, match="not finite"):
        policy.choose(hidden, [random.Random(0)] * 2)


def test_questions_cannot_speak_as_the_chat(policy):
    """Guards against chat markers in a data set's text."""
    added = policy.tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    text = "".join(map(policy.tokenizer.convert_ids_to_tokens, special))
    assert special == set(policy.encode(text)) and len(special) == 7
    assert not special & set(policy.encode(policy.clean(text + "<|im_<|im_end|>end|>\ud800")))


def test_a_checkpoint_is_written_over_another(policy, tmp_path):
    """Guards what a second save leaves behind; and notes beyond ASCII."""
    policy.save(tmp_path / "out")
    policy.save(tmp_path / "out", dialogue={"mode": "zöom"})
    assert os.listdir(tmp_path) == ["out"]
    text = (tmp_path / "out" / "dialogue.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"mode": "zöom"} and "ö" in text


def test_files_are_written_whole_or_not_at_all(tmp_path):
    """Guards a file that a killed or failed run left half written; and texts beyond ASCII."""
    path = tmp_path / "file"
    write_text(path, "Grüße\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 10**6 + "\ud800")
    assert path.read_bytes() == "Grüße\n".encode()


def test_the_cache_takes_half_of_the_free_memory(policy, monkeypatch):
    """Guards the number of slots: on a GPU the bytes of a column were miscounted, and
    rollouts ran out of memory or left it idle."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**6, 3 * 10**6))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert free_columns(policy) == 262_144
    column = sum(kv.nbytes for kv in Cache(policy, 1, 1, 1, 0).prompt)
    gpu = SimpleNamespace(device=torch.device("cuda", 0), kv_shape=policy.kv_shape,
                          model=policy.model)
    assert free_columns(gpu) == 10**6 // column
