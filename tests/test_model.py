"""What model.py promises: exact log-probabilities, tokens that are really the policy's, checkpoints
that others can load."""
import json
import math
import os
import random
import shutil
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
    AutoModelForImageTextToText,
    AutoTokenizer,
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
    full_tensor,
    invert,
    is_sharded,
    load,
    micro_batches,
    nucleus,
    rank,
    shard_if_large,
    sum_gradients,
    unsharded,
    world_size,
    write_text,
)


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "qwen3_vl")])
def tiny_folder(request, tiny_folder, tmp_path_factory):
    """All promises are those of both families."""
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


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_engine_equals_a_plain_forward(many_sizes, tiny_folder, turns):
    """Guards the K/V cache: rows that stop at different times, slots used again, images of
    different sizes, positions."""
    policy = many_sizes
    engine = Engine(policy, turn_tokens=7, response_tokens=150, cache_tokens=2 * (90 + 3 * 150))
    done = list(engine.run(list(prompts(policy, 5, 3, seed=turns)), converse(policy, turns)))
    assert len(done) == 5 and engine.cache.prompt.shape[2] == 2
    assert len({len(s.ids) for group in done for s in group}) > 1
    for group in done:
        for sequence in group:
            plain = plain_log_probs(tiny_folder, policy, sequence)
            assert (plain - recorded([[sequence]])).abs().max() < 1e-5


@pytest.mark.slow
def test_what_runs_beside_changes_nothing(many_sizes):
    """Guards fixed seats: a row's tokens must be the same alone, in groups of another size, and
    whatever was at its seat before."""
    policy = many_sizes
    sampling = dict(turns=3, turn_tokens=7, response_tokens=150)
    alone = [roll(policy, [group], **sampling)[0] for group in prompts(policy, 6, 4)]
    for cache_tokens in (1, 1500, None):
        groups = list(prompts(policy, 6, 4))
        roll(policy, groups, cache_tokens=cache_tokens, **sampling)
        for group, same in zip(groups, alone, strict=True):
            assert [s.ids for s in group] == [s.ids for s in same]
    uneven = [group[:i % 4 + 1] for i, group in enumerate(prompts(policy, 6, 4))]
    roll(policy, uneven, cache_tokens=1500, **sampling)
    for group, same in zip(uneven, alone, strict=True):
        assert [s.ids for s in group] == [s.ids for s in same[:len(group)]]


def test_a_sequence_goes_on_from_what_it_has(many_sizes, tiny_folder):
    """Guards beginnings that we wrote, one token and more, with an image: they are read before the
    first token is sampled, and not trained on."""
    policy = many_sizes
    groups = list(prompts(policy, 3, 3))
    for group in groups:
        group[1].add(Chunk(policy.encode("<think>")[:1]))
        group[2].add(policy.chunk("See <|image_pad|>: ", [noise(64, 96)]))
    begun = [[list(s.ids) for s in group] for group in groups]
    roll(policy, groups, turns=2, response_tokens=150)
    for group, ids in zip(groups, begun, strict=True):
        for sequence, first in zip(group, ids, strict=True):
            assert sequence.ids[:len(first)] == first and not any(sequence.sampled[:len(first)])
            plain = plain_log_probs(tiny_folder, policy, sequence)
            assert (plain - recorded([[sequence]])).abs().max() < 1e-5


@pytest.mark.slow
def test_training_log_probs_equal_a_plain_forward(many_sizes, tiny_folder):
    """Guards the shared prompt: each response must see the prompt and itself, and no other
    response; a group of one takes another way."""
    policy = many_sizes
    done = roll(policy, prompts(policy, 3, 4), 3, turn_tokens=6, response_tokens=150)
    done += roll(policy, prompts(policy, 1, 1), 2, turn_tokens=6, response_tokens=150)
    with torch.no_grad():
        together = policy(done)
    plain = torch.cat([plain_log_probs(tiny_folder, policy, s) for group in done for s in group])
    assert (together - plain).abs().max() < 1e-5


def test_gradients_equal_those_of_the_padded_batch(many_sizes, tiny_folder):
    """Guards the update: the prompt once for a group must give the gradients of the prompt once for
    every response."""
    policy = many_sizes
    done = roll(policy, prompts(policy, 2, 3, seed=3), 3, turn_tokens=6, response_tokens=150)
    weights = torch.randn(len(recorded(done)), generator=torch.Generator().manual_seed(0))
    (policy.log_probs(done) * weights).sum().backward()
    sequences = sum(done, [])
    longest = max(len(s.prompt.ids) + len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), longest), policy.tokenizer.pad_token_id)
    mask, targets = torch.zeros_like(ids), []
    for row, s in enumerate(sequences):
        whole = s.prompt.ids + s.ids
        ids[row, :len(whole)], mask[row, :len(whole)] = torch.tensor(whole), 1
        targets += [(row, len(s.prompt.ids) + i) for i, sampled in enumerate(s.sampled) if sampled]
    pictures = [p for s in sequences for p in s.prompt.pictures + s.pictures]
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    logits = model(input_ids=ids, attention_mask=mask,
                   pixel_values=pixel_values(policy, pictures),
                   image_grid_thw=torch.tensor([p.grid for p in pictures]),
                   mm_token_type_ids=(ids == policy.image_token).int()).logits
    log_probs = torch.log_softmax(logits.masked_fill(policy.forbidden, -torch.inf), -1)
    rows, columns = map(list, zip(*targets, strict=True))
    padded = log_probs[rows, [c - 1 for c in columns], ids[rows, columns]]
    (padded * weights).sum().backward()
    theirs = dict(model.named_parameters())
    for name, p in policy.model.named_parameters():
        if ".visual." in name:
            assert p.grad is None
        else:
            right = theirs[name].grad
            assert (p.grad - right).abs().max() / max(1.0, right.abs().max()) < 1e-5, name
    assert {id(p) for p in policy.trainable()} == {id(p) for p in policy.parameters()
                                                   if p.grad is not None}


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


@pytest.mark.slow
def test_scores_are_not_rounded_to_bfloat16(tiny_folder):
    """Guards attention scores in float32: with large key biases, as Qwen2's, scores rounded to
    bfloat16, as in Hugging Face's eager attention, make the recorded log-probabilities those of
    another policy than the one that is trained."""
    policy = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    text = policy.model.model.language_model
    for std in (10, 30):
        torch.manual_seed(std)
        for layer in text.layers:
            keys = layer.self_attn.k_proj.bias                       # Qwen3's have a norm instead
            torch.nn.init.normal_(layer.self_attn.k_norm.weight if keys is None else keys, std=std)
        groups = list(prompts(policy, 6, 4))
        pixels = [policy.pixel_values(group[0].prompt.pictures) for group in groups]
        roll(policy, groups, turn_tokens=40)
        with torch.no_grad():
            training = policy.log_probs(groups)
            text.config._attn_implementation = "eager"
            plain = []
            for group, value in zip(groups, pixels, strict=True):
                plain += [hugging_face_log_probs(policy, s, value) for s in group]
            text.config._attn_implementation = "layout"
        rounded = (torch.cat(plain) - training).abs().mean()
        assert (recorded(groups) - training).abs().mean() < rounded / 2


def hugging_face_log_probs(policy, sequence, pixels):
    """Log-probabilities of a single turn's tokens by the model's own forward."""
    ids = torch.tensor([sequence.prompt.ids + sequence.ids])
    grids = torch.tensor([p.grid for p in sequence.prompt.pictures])
    policy.model.model.rope_deltas = None
    logits = policy.model(input_ids=ids, pixel_values=pixels.to(policy.model.dtype),
                          image_grid_thw=grids, logits_to_keep=len(sequence.ids) + 1,
                          mm_token_type_ids=(ids == policy.image_token).int()).logits[0, :-1]
    log_probs = torch.log_softmax(logits.float().masked_fill(policy.forbidden, -torch.inf), -1)
    return log_probs[range(len(sequence.ids)), sequence.ids]


def gradients(folder, out, per_node, replicated=0):
    """Each process learns from its share of four groups; the first one writes all gradients."""
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    model.REPLICATED = replicated
    policy = load(folder, device="cpu")
    shard_if_large(policy)
    assert is_sharded(policy) == (world_size() > 1 and not replicated)
    with unsharded(policy):
        groups = list(prompts(policy, 4, 3))
        roll(policy, groups, turn_tokens=6)
    for batch in micro_batches(groups[rank()::world_size()], 1):
        policy.log_probs(batch.groups).sum().backward()
    sum_gradients(policy.trainable())
    found = {name: full_tensor(p.grad) for name, p in policy.model.named_parameters()
             if p.grad is not None}
    if is_sharded(policy):
        mesh = policy.model.lm_head.weight.device_mesh
        assert tuple(mesh.shape) == (world_size() // per_node, per_node)
    if rank() == 0:
        torch.save(found, out)


@pytest.mark.slow
def test_gradients_are_sums_over_processes(tiny_folder, tmp_path):
    """Guards copies of weights, weights that are sharded, and weights sharded inside of a node and
    replicated over nodes: gradients must be the sums over all processes, not means, and not those
    of a node."""
    for name, number, *how in (("one", 1, 1), ("copies", 2, 2, 10**9), ("sharded", 2, 2),
                               ("nodes", 4, 2)):
        in_processes(number, gradients, tiny_folder, tmp_path / name, *how)
    one, *others = (torch.load(tmp_path / name) for name in ("one", "copies", "sharded", "nodes"))
    for other in others:
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            scale = max(1.0, gradient.abs().max().item())
            assert (gradient - other[name]).abs().max() / scale < 1e-5, name


def test_vocabulary_in_chunks_changes_nothing(policy, monkeypatch):
    """Guards the bound on logits: the checkpointed chunks must give the same values and
    gradients."""
    done = roll(policy, prompts(policy, 2, 2))
    found = []
    for bound in (2**26, 5 * policy.text_config.vocab_size):
        monkeypatch.setattr(model, "MAX_LOGITS", bound)
        policy.model.zero_grad()
        log_probs = policy.log_probs(done)
        log_probs.sum().backward()
        found.append((log_probs.detach(), policy.model.lm_head.weight.grad.clone()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


def test_checkpointing_changes_nothing(policy):
    """Guards gradient checkpointing: what is computed again must attend in the same layout."""
    done = roll(policy, prompts(policy, 2, 3))
    found = []
    for again in (False, True):
        if again:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.zero_grad()
        policy.train()
        policy.log_probs(done).sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.model.named_parameters()
                      if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-5, rtol=1e-5) for n in found[0])


def test_many_images_go_through_the_vision_tower_in_parts(policy, monkeypatch):
    """Guards the bound on patches: the features must not depend on it."""
    images = [noise(64, 64, seed) for seed in range(5)]
    at_once = policy.features([policy.picture(image) for image in images])
    monkeypatch.setattr(model, "MAX_VISION_PATCHES", 130)
    in_parts = policy.features([policy.picture(image) for image in images])
    for one, other in zip(at_once, in_parts, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# Of equal images, of some equally wide, and of some that are as many patches in another shape.
SIZES = [(64, 64), (64, 64), (64, 96), (96, 64), (64, 64), (33, 47), (300, 40), (32, 32), (128, 32)]


def test_pictures_together_are_what_the_image_processor_makes_of_each(many_sizes):
    """Guards the batch of images: each picture's patches must be its own, bit by bit, and where the
    text expects them; of the size that the image processor chooses, and resized in its way."""
    policy = many_sizes
    for resample in (policy.image_processor.resample, 3):
        policy.image_processor.resample = resample
        images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
        pictures = [policy.picture(image) for image in images]
        expected = [policy.image_processor(images=[image], return_tensors="pt") for image in images]
        together = policy.pixel_values(pictures)
        assert together.dtype == torch.float32
        assert torch.equal(together, torch.cat([out["pixel_values"] for out in expected]))
        for picture, out in zip(pictures, expected, strict=True):
            assert [list(picture.grid)] == out["image_grid_thw"].tolist()
            assert picture.tokens == len(out["pixel_values"]) // 4


def test_a_picture_does_not_change_with_its_image(policy):
    """Guards a picture that is encoded later on: what is drawn meanwhile must not be in it."""
    image = noise(64, 64)
    picture, before = policy.picture(image), policy.picture(noise(64, 64))
    image.paste("red", (0, 0, 64, 64))
    assert torch.equal(policy.pixel_values([picture]), policy.pixel_values([before]))


def test_features_of_many_sizes_are_those_of_each_alone(many_sizes):
    """Guards the order: the vision tower gets images sorted by size; some are asked for twice, and
    computed once."""
    policy = many_sizes
    pictures = [policy.picture(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    inputs = [(policy.pixel_values([picture]), picture.grid) for picture in pictures]
    found = policy.features(pictures + pictures[2:4])
    assert all(picture.image is None and not picture.features.requires_grad for picture in pictures)
    for features, (pixels, grid) in zip(found, inputs + inputs[2:4], strict=True):
        out = policy.model.model.get_image_features(pixels, torch.tensor([grid]))
        depths = [out.pooler_output, *getattr(out, "deepstack_features", ())]
        alone = torch.cat([image for (image,) in depths], 1)
        assert (features - alone).abs().max() < 1e-5


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
        tokens, log_probs = choose(*args)
        chosen.extend(zip(tokens, log_probs, strict=True))
        return tokens, log_probs
    monkeypatch.setattr(policy, "choose", spy)
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 3))
    done = roll(policy, prompts(policy, 2, 3), 3, turn_tokens=5, response_tokens=200)
    marked, ends = [], 0
    for sequence in sum(done, []):
        for values in zip(sequence.ids, sequence.log_probs, sequence.sampled, strict=True):
            token, log_prob, sampled = values
            assert log_prob < 0 if sampled else log_prob == 0
            if sampled:
                marked.append((token, log_prob))
                ends += token in policy.end_tokens
    assert sorted(marked) == sorted(chosen) and ends
    assert len(marked) < sum(len(sequence.ids) for sequence in sum(done, []))


def test_vision_tokens_cannot_be_sampled(policy):
    """Guards against a policy that emits the image token, which would break the search for images
    in a sequence."""
    with torch.no_grad():
        policy.model.lm_head.weight[policy.image_token] *= 50
        policy.model.lm_head.weight[policy.image_token] += 5
    done = roll(policy, prompts(policy, 2, 4), turn_tokens=20)
    assert not any(policy.forbidden[t] for group in done for s in group for t in s.ids)
    assert torch.isfinite(policy.log_probs(done)).all()


def test_log_probs_are_those_of_the_sampling_temperature(policy):
    """Guards against log-probabilities taken at temperature 1 whatever the sampling temperature."""
    done = roll(policy, prompts(policy, 1, 3), temperature=0.5)
    with torch.no_grad():
        assert (policy.log_probs(done, 0.5) - recorded(done)).abs().max() < 1e-5
        assert (policy.log_probs(done, 1.0) - recorded(done)).abs().max() > 1e-2


def test_nucleus():
    """Guards top-p: the fewest tokens that reach it, the first one always among them."""
    log_probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.allclose(nucleus(log_probs, 0.8).exp(), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert torch.allclose(nucleus(log_probs, 0.1).exp(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("temperature, top_p, top_k, penalty", [
    (1.0, 0.9, 20, 1.0), (0.7, 1.0, 3, 1.3), (1.4, 0.6, 0, 0.8), (0.01, 0.001, 1, 1.05),
    (1.0, 0.99, 10**6, 2.0)])
def test_sampling_is_that_of_hugging_face(policy, temperature, top_p, top_k, penalty):
    """Guards top-k and the penalty of repetition, and the order of them all: tokens and recorded
    log-probabilities must be of the distribution that Hugging Face's processors leave."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, policy.text_config.hidden_size, generator=generator)
    seen = [random.Random(i).choices(range(policy.text_config.vocab_size), k=i) for i in range(200)]
    tokens, log_probs = policy.choose(hidden, [random.Random(i) for i in range(200)], temperature,
                                      top_p, top_k, penalty, seen)
    processors = [SuppressTokensLogitsProcessor(policy.forbidden.nonzero()[:, 0].tolist()),
                  TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    repetition = RepetitionPenaltyLogitsProcessor(penalty)
    logits = policy.model.lm_head(hidden).detach()
    rows = [repetition(torch.tensor([ids]).long(), row[None]) if ids else row[None]
            for ids, row in zip(seen, logits, strict=True)]
    theirs = LogitsProcessorList(processors)(None, torch.cat(rows)).log_softmax(-1)
    right = invert(theirs, [random.Random(i).getrandbits(32) / 2**32 for i in range(200)])
    assert tokens == right[:, 0].tolist()
    assert torch.allclose(torch.tensor(log_probs), theirs.gather(1, right)[:, 0], atol=1e-5)


def test_tokens_follow_the_distribution():
    """Guards inverse transform sampling: each token comes as often as its probability says (a
    chi-square test), in its own row; evenly spread numbers meet each share to within one; and
    top-p's and forbidden tokens never come."""
    rng, n = random.Random(0), 20_000
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0],
                           [0.2, 0.0, 0.1, 0.0, 0.3, 0.0, 0.4]])
    drawn, even = [rng.getrandbits(32) / 2**32 for _ in range(n)], [i / n for i in range(n)]
    for uniforms, near in ((drawn, None), (even, 1)):
        tokens = invert(shares.log().repeat(n, 1), [u for u in uniforms for _ in shares]).view(n, 2)
        for found, row in zip(tokens.T, shares, strict=True):
            count, expected = found.bincount(minlength=7), n * row
            assert not count[row == 0].any()
            if near:
                assert (count - expected).abs().max() <= near
            else:
                possible = row > 0
                chi2 = ((count - expected)**2 / expected)[possible].sum()
                assert chi2 < 21                     # 3 degrees of freedom: 1 in 8,000


def test_the_ends_of_the_unit_interval(policy):
    """Guards the borders: 0 and the largest number below 1 must give the first and the last
    possible token, also where the probabilities add up to less than 1 in float32, and never one
    that is forbidden."""
    for size in (7, 350, 152_064):
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size))
        logits[:, [0, 1, -2, -1]] = -torch.inf
        log_probs = torch.log_softmax(logits, -1)
        for short in (0.0, 1e-6):
            ends = invert((log_probs - short).expand(2, -1), [0.0, 1 - 2**-32])
            assert ends.tolist() == [[2], [size - 3]]
    class Ends:
        def __init__(self, bits):
            self.getrandbits = lambda number: bits
    hidden = torch.randn(2, policy.text_config.hidden_size)
    tokens, _ = policy.choose(hidden, [Ends(0), Ends(2**32 - 1)])
    assert tokens == [policy.forbidden.logical_not().nonzero()[i].item() for i in (0, -1)]


def test_same_seed_same_tokens(policy):
    """Guards determinism."""
    def tokens(seed):
        return [s.ids for s in sum(roll(policy, prompts(policy, 2, 2, seed)), [])]
    assert tokens(1) == tokens(1) != tokens(2)


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


def test_a_longer_prompt_later_on(many_sizes, tiny_folder):
    """Guards a cache that the first prompts sized; and its bound."""
    policy = many_sizes
    def prompt(length):
        content = [{"type": "image"}, {"type": "text", "text": "x" * length}]
        return policy.prompt([{"role": "user", "content": content}], [noise(64, 64)])
    short, long = prompt(2), prompt(150)
    groups = [[Sequence(prompt, rng=random.Random(i)) for i in range(2)]
              for prompt in (short, short, long, short, long)]
    bound = 2 * (len(long.ids) + 2 * 20)
    engine = Engine(policy, turn_tokens=5, response_tokens=20, cache_tokens=bound)
    for group in engine.run(groups, lambda s, truncated: None):
        for sequence in group:
            plain = plain_log_probs(tiny_folder, policy, sequence)
            assert (plain - recorded([[sequence]])).abs().max() < 1e-5
        numbers = engine.cache.prompt[0].numel() + engine.cache.own[0].numel()
        assert numbers == bound * 2 * math.prod(policy.kv_shape[1:])
    assert list(engine.run([], None)) == []


@pytest.mark.slow
def test_max_pixels_only_lowers_the_checkpoints_bound(tiny_folder):
    """Guards the size of the model's input: a family's bound must not blow up the images of a
    checkpoint that was made for smaller ones."""
    own = load(tiny_folder, device="cpu").image_processor.size
    for most in (own["longest_edge"] * 100, 32 * 32):
        policy = load(tiny_folder, device="cpu", max_pixels=most)
        assert policy.image_processor.size["longest_edge"] == min(most, own["longest_edge"])
    assert policy.picture(noise(400, 400)).image.size == (32, 32)
    policy = load(tiny_folder, device="cpu", max_image_side=48)
    policy.image_processor.size = {"shortest_edge": 1, "longest_edge": 2**20}
    assert policy.input_size(96, 64) == (48, 32) and policy.input_size(96, 40, False) == (48, 20)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_not_finite_is_not_sampled_from(policy, value, temperature):
    """Guards a rollout of a lost policy: no token is made up where there are no probabilities."""
    hidden = torch.full((2, policy.text_config.hidden_size), value)
    with pytest.raises(UserError, match="not finite"):
        policy.choose(hidden * 1e30, [random.Random(0)] * 2, temperature)


def test_the_bounds_of_a_run_are_not_the_checkpoints(tiny_folder, tmp_path):
    """Guards an evaluation at more pixels than training had: what is saved has the bounds of the
    checkpoint that it came from."""
    policy = load(tiny_folder, device="cpu", max_pixels=32 * 32)
    policy.save(tmp_path / "out")
    before, after = (load(folder, device="cpu").image_processor.size
                     for folder in (tiny_folder, tmp_path / "out"))
    assert before == after != policy.image_processor.size


def test_text_round_trip(policy):
    """Guards the tiny tokenizer: any text must come back as it was, digits one by one, fixed
    strings as one token."""
    texts = ("<think>Card 2 at (37, 5).</think>\n<answer>dotted</answer>",
             "Grüße, 你好 \n\t 12345 \x00")
    for text in texts:
        assert policy.decode(policy.encode(text)) == text
    assert len(policy.encode("12345")) == 5
    assert len(policy.encode("</think>\n<answer>")) == 1


def test_questions_cannot_speak_as_the_chat(policy):
    """Guards against chat markers in a data set's text."""
    added = policy.tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    text = "".join(map(policy.tokenizer.convert_ids_to_tokens, special))
    assert special == set(policy.encode(text)) and len(special) == 7
    assert not special & set(policy.encode(policy.clean(text + "<|im_<|im_end|>end|>\ud800")))


def test_plain_transformers_loads_what_we_save(policy, tmp_path):
    """Guards the checkpoints: others must be able to use them."""
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(1.5)
    policy.save(tmp_path / "out", dialogue={"mode": "zöom"})
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    weights, others = plain.state_dict().values(), policy.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == policy.tokenizer.chat_template
    again = load(str(tmp_path / "out"), device="cpu")
    assert again.image_processor.size == policy.image_processor.size
    text = (tmp_path / "out" / "dialogue.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"mode": "zöom"} and "ö" in text
    assert not list(tmp_path.glob("*.part"))
    policy.save(tmp_path / "out")                       # over what is there
    assert not list(tmp_path.glob("*.old"))


def test_files_are_written_whole_or_not_at_all(tmp_path):
    """Guards a file that a killed or failed run left half written; and texts beyond ASCII."""
    path = tmp_path / "file"
    write_text(path, "Grüße\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 10**6 + "\ud800")
    assert path.read_bytes() == "Grüße\n".encode()


def test_what_cannot_be_loaded_says_so_in_a_line(tmp_path, tiny_folder):
    """Guards against tracebacks, or random weights, where something of a checkpoint is missing,
    foreign or truncated: the line names the part."""
    def broken(name, file, change=None):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        whole = (folder / file).read_bytes()
        (folder / file).unlink() if change is None else (folder / file).write_bytes(change(whole))
        return folder
    def half(data):
        return data[:len(data) // 2]
    def wider(data):
        return data.replace(b'"intermediate_size": 192', b'"intermediate_size": 224')
    faults = {"nowhere.*config.json": tmp_path / "nowhere",
              "other.*llama": broken("other", "config.json", lambda _: b'{"model_type": "llama"}'),
              "cut/model.safetensors": broken("cut", "model.safetensors", half),
              "no weights.*weights": broken("no weights", "model.safetensors"),
              "wide.*another size": broken("wide", "config.json", wider),
              "words.*tokenizer": broken("words", "tokenizer.json", half),
              "images.*preprocessor": broken("images", "preprocessor_config.json", half),
              "template.*chat template": broken("template", "chat_template.jinja")}
    for words, folder in faults.items():
        with pytest.raises(UserError, match=words) as error:
            load(str(folder), device="cpu")
        assert "\n" not in str(error.value)


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
