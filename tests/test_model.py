"""What model.py promises: exact log-probabilities, tokens that are really the policy's, checkpoints
that others can load."""
import json
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import converse, in_processes, noise, pixel_values, plain_log_probs, prompts, recorded
from transformers import AutoModelForImageTextToText, AutoTokenizer

import model
from model import (
    Cache,
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
    unsharded,
    world_size,
)


@pytest.fixture
def many_sizes(policy):
    """The tiny policy lets images keep their size, so that grids differ, and ends its turns
    often."""
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 8))
    policy.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return policy


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_engine_equals_a_plain_forward(many_sizes, tiny_folder, turns):
    """Guards the K/V cache: rows that stop at different times, refilled places, images of different
    sizes, positions."""
    policy = many_sizes
    group = 3
    engine = Engine(policy, turn_tokens=7, response_tokens=150,
                    cache_tokens=2 * (90 + group * 150))
    done = list(engine.run(prompts(policy, 5, group, seed=turns), converse(policy, turns)))
    assert len(done) == 5 and engine.cache.groups <= 2
    assert len({len(s.ids) for job in done for s in job}) > 1
    for job in done:
        for sequence in job:
            plain = plain_log_probs(tiny_folder, policy, sequence)
            assert (plain - recorded([[sequence]])).abs().max() < 1e-5


def test_training_log_probs_equal_a_plain_forward(many_sizes, tiny_folder):
    """Guards the shared prompt: each response must see the prompt and itself, and no other
    response."""
    policy = many_sizes
    engine = Engine(policy, turn_tokens=6, response_tokens=150)
    done = list(engine.run(prompts(policy, 3, 4), converse(policy, 3)))
    done += engine.run(prompts(policy, 1, 1), converse(policy, 2))     # a group of one: another way
    with torch.no_grad():
        together = policy.log_probs(done)
    plain = torch.cat([plain_log_probs(tiny_folder, policy, s) for job in done for s in job])
    assert (together - plain).abs().max() < 1e-5


def test_gradients_equal_those_of_the_padded_batch(many_sizes):
    """Guards the update: the prompt once for a group must give the gradients of the prompt once for
    every response."""
    policy = many_sizes
    policy.train_vision = True
    engine = Engine(policy, turn_tokens=6, response_tokens=150)
    done = list(engine.run(prompts(policy, 2, 3, seed=3), converse(policy, 3)))
    weights = torch.randn(len(recorded(done)), generator=torch.Generator().manual_seed(0))
    (policy.log_probs(done) * weights).sum().backward()
    shared = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    alone = [[s] for job in done for s in job]
    longest = max(len(s.prompt.ids) + len(s.ids) for (s,) in alone)
    ids = torch.full((len(alone), longest), policy.tokenizer.pad_token_id)
    mask, targets = torch.zeros_like(ids), []
    for row, (s,) in enumerate(alone):
        whole = s.prompt.ids + s.ids
        ids[row, :len(whole)], mask[row, :len(whole)] = torch.tensor(whole), 1
        targets += [(row, len(s.prompt.ids) + i) for i, sampled in enumerate(s.sampled) if sampled]
    pictures = [p for (s,) in alone for p in s.prompt.pictures + s.pictures]
    logits = policy.model(input_ids=ids, attention_mask=mask,
                          pixel_values=pixel_values(policy, pictures),
                          image_grid_thw=torch.tensor([p.grid for p in pictures]),
                          mm_token_type_ids=(ids == policy.image_token).int()).logits
    log_probs = torch.log_softmax(logits.masked_fill(policy.forbidden, -torch.inf), -1)
    rows, columns = map(list, zip(*targets, strict=True))
    padded = log_probs[rows, [c - 1 for c in columns], ids[rows, columns]]
    (padded * weights).sum().backward()
    for name, p in policy.model.named_parameters():
        scale = max(1.0, p.grad.abs().max().item())
        assert (p.grad - shared[name]).abs().max() / scale < 1e-5, name


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
    results = []
    for attention in (plain, lambda *qkv: TrainLayout(lengths)(0, *qkv, 0.25)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs)
        (out * weight).sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, right in zip(*results, strict=True):
        assert (ours - right).abs().max() < 1e-12 * right.abs().max()


def test_scores_are_not_rounded_to_bfloat16(tiny_folder):
    """Guards attention scores in float32: with large key biases, as Qwen2's, scores rounded to
    bfloat16, as in Hugging Face's eager attention, make the recorded log-probabilities those of
    another policy than the one that is trained."""
    policy = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    text = policy.model.model.language_model
    for std in (10, 30):
        torch.manual_seed(std)
        for layer in text.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=std)
        jobs = list(prompts(policy, 6, 4))
        pixels = [[policy.pixel_values(job[0].prompt.pictures) for _ in job] for job in jobs]
        engine = Engine(policy, turn_tokens=40, response_tokens=60)
        list(engine.run(jobs, lambda s, truncated: None))
        with torch.no_grad():
            training = policy.log_probs(jobs)
            text.config._attn_implementation = "eager"
            plain = []
            for job, values in zip(jobs, pixels, strict=True):
                for s, value in zip(job, values, strict=True):
                    plain.append(hugging_face_log_probs(policy, s, value))
            text.config._attn_implementation = "layout"
        rounded = (torch.cat(plain) - training).abs().mean()
        assert (recorded(jobs) - training).abs().mean() < rounded / 2


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


def gradients(folder, out, per_node):
    """Each process learns from its share of four groups; the first one writes all gradients."""
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    model.REPLICATED = 0
    policy = load(folder, device="cpu")
    shard_if_large(policy)
    assert is_sharded(policy) == (world_size() > 1)
    with unsharded(policy):
        engine = Engine(policy, turn_tokens=6, response_tokens=60)
        done = list(engine.run(prompts(policy, 4, 3), lambda s, truncated: None))
    done.sort(key=lambda job: job[0].prompt.pictures[0].grid)
    done.sort(key=lambda job: len(job[0].prompt.ids))
    for batch in micro_batches(done[rank()::world_size()], 1):
        (policy.log_probs(batch.groups).sum() / 4 * world_size()).backward()
    found = {name: full_tensor(p.grad) for name, p in policy.model.named_parameters()
             if p.grad is not None}
    if is_sharded(policy):
        mesh = policy.model.lm_head.weight.device_mesh
        assert tuple(mesh.shape) == (world_size() // per_node, per_node)
    if rank() == 0:
        torch.save(found, out)


def test_nodes_of_several_processes_equal_one_process(tiny_folder, tmp_path):
    """Guards weights that are sharded inside of a node and replicated over nodes: gradients must be
    averaged over all processes, not those of a node."""
    for number, per_node in ((1, 1), (4, 2)):
        in_processes(number, gradients, tiny_folder, tmp_path / f"{number}.pt", per_node)
    one, four = (torch.load(tmp_path / f"{number}.pt") for number in (1, 4))
    assert one.keys() == four.keys()
    for name, gradient in one.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (gradient - four[name]).abs().max() / scale < 1e-5, name


def test_vocabulary_in_chunks_changes_nothing(policy, monkeypatch):
    """Guards the bound on logits: the checkpointed chunks must give the same values and
    gradients."""
    engine = Engine(policy, turn_tokens=9, response_tokens=60)
    done = list(engine.run(prompts(policy, 2, 2), lambda s, truncated: None))
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
    engine = Engine(policy, turn_tokens=9, response_tokens=60)
    done = list(engine.run(prompts(policy, 2, 3), lambda s, truncated: None))
    found = []
    for again in (False, True):
        if again:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.zero_grad()
        policy.model.train()
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
    """Guards the one tall image: each picture's patches must be its own, bit by bit, and where the
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
    """Guards the order: the vision tower gets images sorted by size; some are asked for twice."""
    policy = many_sizes
    policy.train_vision = True                         # so that nothing is kept
    pictures = [policy.picture(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    found = policy.features(pictures + pictures[2:4])
    for picture, features in zip(pictures + pictures[2:4], found, strict=True):
        pixels, grid = policy.pixel_values([picture]), torch.tensor([picture.grid])
        alone = policy.model.model.get_image_features(pixels, grid).pooler_output[0]
        assert (features - alone).abs().max() < 1e-5


def test_windows_in_a_batch_are_those_one_by_one(many_sizes):
    """Guards the vision tower's attention by lengths: images and windows of several sizes, at a
    border smaller ones, and the gradients, against Hugging Face's loop over windows."""
    policy = many_sizes
    policy.train_vision = True                         # so that nothing is kept
    tower = policy.model.model.visual
    tower.fullatt_block_indexes = [1]                  # the first layer attends in windows
    pictures = [policy.picture(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    results = []
    for attention in ("flash_by_length", "sdpa"):
        tower.config._attn_implementation = attention
        features = torch.cat(policy.features(pictures))
        policy.model.zero_grad()
        features.square().mean().backward()
        results.append([features, *(p.grad for p in tower.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_greedy_tokens_are_those_of_generate(policy):
    """Guards sampling and stopping: temperature 0 must give what `generate` gives."""
    (sequence,) = job = next(prompts(policy, 1, 1))
    pictures = sequence.prompt.pictures
    ids = torch.tensor([sequence.prompt.ids])
    out = policy.model.generate(
        input_ids=ids, pixel_values=pixel_values(policy, pictures), max_new_tokens=12,
        image_grid_thw=torch.tensor([pictures[0].grid]), do_sample=False,
        mm_token_type_ids=(ids == policy.image_token).int(),
        suppress_tokens=policy.forbidden.nonzero()[:, 0].tolist())
    policy.model.model.rope_deltas = None
    engine = Engine(policy, temperature=0, turn_tokens=12, response_tokens=60)
    next(engine.run([job], lambda s, truncated: None))
    assert sequence.ids == out[0, ids.shape[1]:].tolist()


def test_the_mask_is_exactly_the_sampled_tokens(policy):
    """Guards the mask: prompt, observations and forced beginnings are never trained on, end tokens
    are."""
    seen = []
    original = Engine.sample
    def spy(engine, rows, hidden, on_turn):
        before = [len(r.sequence.ids) for r in rows]
        over = original(engine, rows, hidden, on_turn)
        seen.extend((id(r.sequence), n) for r, n in zip(rows, before, strict=True))
        return over
    engine = Engine(policy, turn_tokens=5, response_tokens=200)
    engine.sample = lambda *args: spy(engine, *args)
    done = list(engine.run(prompts(policy, 2, 3), converse(policy, 3)))
    marked = {(id(s), i) for job in done for s in job
              for i, sampled in enumerate(s.sampled) if sampled}
    assert marked == set(seen) and len(seen) == len(marked)
    for job in done:
        for s in job:
            assert len(s.ids) == len(s.sampled) == len(s.log_probs)
            for log_prob, sampled in zip(s.log_probs, s.sampled, strict=True):
                assert log_prob < 0 if sampled else log_prob == 0


def test_vision_tokens_cannot_be_sampled(policy):
    """Guards against a policy that emits the image token, which would break the search for images
    in a sequence."""
    with torch.no_grad():
        policy.model.lm_head.weight[policy.image_token] *= 50
        policy.model.lm_head.weight[policy.image_token] += 5
    engine = Engine(policy, turn_tokens=20, response_tokens=100)
    done = list(engine.run(prompts(policy, 2, 4), lambda s, truncated: None))
    assert not any(policy.forbidden[t] for job in done for s in job for t in s.ids)
    assert torch.isfinite(policy.log_probs(done)).all()


def test_log_probs_are_those_of_the_sampling_temperature(policy):
    """Guards against log-probabilities taken at temperature 1 whatever the sampling temperature."""
    engine = Engine(policy, temperature=0.5, turn_tokens=9, response_tokens=60)
    done = list(engine.run(prompts(policy, 1, 3), lambda s, truncated: None))
    with torch.no_grad():
        assert (policy.log_probs(done, 0.5) - recorded(done)).abs().max() < 1e-5
        assert (policy.log_probs(done, 1.0) - recorded(done)).abs().max() > 1e-2


def test_nucleus():
    """Guards top-p: the fewest tokens that reach it, the first one always among them."""
    log_probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.allclose(nucleus(log_probs, 0.8).exp(), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert torch.allclose(nucleus(log_probs, 0.1).exp(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


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
        engine = Engine(policy, turn_tokens=9, response_tokens=60)
        jobs = engine.run(prompts(policy, 2, 2, seed), lambda s, truncated: None)
        return [s.ids for job in jobs for s in job]
    assert tokens(1) == tokens(1) != tokens(2)


def test_a_longer_prompt_later_on(many_sizes, tiny_folder):
    """Guards the cache that the first jobs sized: a longer prompt must still be computed right,
    within the bound."""
    policy = many_sizes
    def prompt(length):
        content = [{"type": "image"}, {"type": "text", "text": "x" * length}]
        return policy.prompt([{"role": "user", "content": content}], [noise(64, 64)])
    short, long = prompt(2), prompt(150)
    jobs = [[Sequence(prompt, rng=random.Random(i)) for i in range(2)]
            for prompt in (short, short, long, short, long)]
    engine = Engine(policy, turn_tokens=5, response_tokens=20, cache_tokens=2 * (90 + 2 * 20))
    for job in engine.run(iter(jobs), lambda s, truncated: None):
        for sequence in job:
            plain = plain_log_probs(tiny_folder, policy, sequence)
            assert (plain - recorded([[sequence]])).abs().max() < 1e-5
        if engine.cache:
            caches = engine.cache.prompt[0], engine.cache.own[0]
            columns = sum(cache.shape[1] * cache.shape[3] for cache in caches)
            assert engine.cache.groups == 1 or columns <= engine.cache_tokens


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
    policy.save(tmp_path / "out", dialogue={"mode": "zoom"})
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    weights, others = plain.state_dict().values(), policy.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == policy.tokenizer.chat_template
    again = load(str(tmp_path / "out"), device="cpu")
    assert again.image_processor.size == policy.image_processor.size
    assert json.loads((tmp_path / "out" / "dialogue.json").read_text()) == {"mode": "zoom"}
    assert not list(tmp_path.glob("*.part"))
    policy.save(tmp_path / "out")                       # over what is there
    assert not list(tmp_path.glob("*.old"))


def test_what_cannot_be_loaded_says_so_in_a_line(tmp_path, tiny_folder):
    """Guards against tracebacks for a missing folder, another family, a truncated checkpoint."""
    with pytest.raises(UserError, match="nowhere"):
        load(str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="llama"):
        load(str(other))
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(tiny_folder).iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = data[:len(data) // 2]
        (cut / file.name).write_bytes(data)
    with pytest.raises(UserError, match="cut"):
        load(str(cut))


def test_the_cache_takes_half_of_the_free_memory(policy, monkeypatch):
    """Guards --cache-tokens without a value: on a GPU the bytes of a column were miscounted, and
    rollouts ran out of memory or left it idle."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**6, 3 * 10**6))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert free_columns(policy) == 262_144
    config, dtype = policy.text_config, policy.model.dtype
    cache = Cache(policy, 1, 1, 1, 0)
    column = sum(x.nbytes for x in cache.prompt)
    gpu = SimpleNamespace(device=torch.device("cuda", 0), text_config=config,
                          model=SimpleNamespace(dtype=dtype))
    assert free_columns(gpu) == 10**6 // column
