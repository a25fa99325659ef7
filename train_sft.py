"""Warm start: perception pretraining of the tiny base, tree search for traces, linearising, supervised fine-tuning.

In:  a task, and a checkpoint to start from (by default the tiny one, made here from random weights).
Out: `traces.jsonl` (what the search found, to be read by a person and by `--traces`) and a checkpoint `sft/`.

    python train_sft.py                                  # tiny base -> search -> SFT
    python train_sft.py --model PATH --task FILE --mode zoom --teacher PATH
    python train_sft.py --model PATH --task FILE --mode zoom --traces FILE

Departures from the paper: in the mode `zoom` a step of the search is a turn with its real close-up, so that its value depends
on what it shows; the policy is its own teacher, or `--teacher`; for a base from nothing, pretraining (a) stands in for Qwen's.
"""
import json
import math
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers import AddedToken, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evaluate import (ANSWERS, BLOCK, CARD, CELL, COLOURS, CONTRAST, JITTER, NOTHING, PATTERNS, QUESTION, SIDE,
                      Scene, configure, mean, place_cards, questions_of, search_scene)
from model import (Chunk, Policy, Sequence, UserError, average_gradients, full_tensor, gather, gather_shares,
                   is_sharded, load, micro_batches, rank, read_config, shard_if_large, shard_like,
                   sum_over_processes, world_size, write_text)
from reward import is_correct
from rollout import (POINT, Dialogue, Frame, Question, Trace, continue_traces, crop_box, describe_config,
                     format_call, format_point, make_dialogue, parse_points, parse_turn, rollout, run, zoom)

# ------------------------------------------------------------------------------------------------ (a) the tiny base

TINY_PROMPTS = {"direct": "Answer.", "think": "Think.", "grounded": "Point.", "zoom": "Zoom."}
TINY = Dialogue(system_prompts=TINY_PROMPTS)
SHOW = ("Show each", " card.")         # instructed dialogue: look at all of them
LIST = "List the cards."
PLACES = [cell * CELL + CELL // 2 + shift for cell in range(SIDE // CELL) for shift in JITTER]    # px: where cards' centres are
BATCH = 16                             # lessons, or images, in a step of its pretraining
TILES = 4                              # a side of the image of tiles, one for each token
SEEN = 64                              # px: the side of what the tiny base sees, of drawings and of close-ups


def tiny_strings():
    """What the tiny tokenizer has as single tokens: the fixed strings of the grammar and the words of the drawn questions."""
    call = format_call((0, 0)).partition("[0, 0]")
    fixed = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<observation>", "</observation>",
             TINY.before_crop, TINY.after_crop, "</think>\n" + call[0] + "[", "]" + call[2], "</think>\n<answer>", "system\n", "user\n", "assistant\n"]
    words = [*TINY_PROMPTS.values(), *QUESTION, *SHOW, LIST, " Card ", "Card ", " at (", ", ", ").", " None.", "Nothing.", ":"]
    words += [BACKTRACK] + [" " + c for c in COLOURS] + list(PATTERNS) + [p.capitalize() + "." for p in PATTERNS]
    return fixed + words


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>"]
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tiny(folder, strings, *, image_px=SEEN, hidden=96, layers=4, heads=3, vision_hidden=64):
    """Writes a tiny Qwen2.5-VL with random weights (torch's seed) as a checkpoint folder. strings: what shall be one token
    each, besides special tokens and bytes. image_px: side of the square that it sees of an image: 8 px a patch, merged 2x2."""
    alphabet = sorted(chr(c) for c in byte_characters())
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[], eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(s, normalized=False) for s in strings])
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    half = hidden // heads // 2
    side = half * 3 // 8
    text = dict(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, initializer_range=0.1,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[half - 2 * side, side, side]),
                tie_word_embeddings=True, bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    vision = dict(depth=2, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden, num_heads=4, out_hidden_size=hidden,
                  patch_size=8, spatial_merge_size=2, temporal_patch_size=2, window_size=64, fullatt_block_indexes=[0, 1],
                  initializer_range=0.1)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
                              video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
                              vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=image_px**2,
                                         max_pixels=image_px**2, resample=4,   # box filter: exact means over whole blocks
                                         image_mean=[0.5] * 3, image_std=[0.25] * 3)
    Policy(model, tokenizer, processor).save(folder)


def byte_characters():
    """The 256 characters by which byte-level BPE writes bytes: printable ones as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + i for i in range(256 - len(printable))]


def card_text(number, point):
    return f"Card {number} at {format_point(point)}."


class Lesson:
    """Writes one pretraining sequence: text that is learned, text that is only read, and images."""

    def __init__(self, policy, system, user, image):
        content = [{"type": "image"}, {"type": "text", "text": user}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        self.policy, self.sequence = policy, Sequence(policy.prompt(messages, [image]))

    def write(self, text, learned=True):
        self.sequence.add(Chunk(self.policy.encode(text)), sampled=learned)
        return self

    def observe(self, image):
        end = self.policy.tokenizer.eos_token
        before, after = ({"type": "text", "text": text} for text in (TINY.before_crop, TINY.after_crop))
        self.write(end).sequence.add(self.policy.reply([before, {"type": "image"}, after], [image]))
        return self


def overview(scene):
    """The drawing as the tiny base sees it: the means of its blocks (what the image processor's box filter makes of it)."""
    return scene.draw().reduce(SIDE // SEEN)


def mixed_scene(rng, fewest=4, most=9, copies=(1, 2, 3, 3)):
    """`fewest` to `most` cards, of each colour as many as a draw from `copies` says."""
    colours = [c for c in rng.sample(list(COLOURS), 6) for _ in range(rng.choice(copies))][:rng.randint(fewest, most)]
    return Scene(place_cards(rng, [(c, rng.choice(("plain", *PATTERNS))) for c in colours]), colours[0])


def draw_tiles(rng):
    """A crop's size of TILES x TILES tiles, each with a colour and a pattern, in half of the images at any phase.
    -> image, [(colour, pattern)] in reading order"""
    side, step = SEEN // TILES, rng.choice((1, BLOCK))
    image, faces = np.empty((SEEN, SEEN, 3)), []
    for row in range(TILES):
        for column in range(TILES):
            colour, pattern = rng.choice(list(COLOURS)), rng.choice(list(PATTERNS))
            y, x = rng.randrange(0, BLOCK, step), rng.randrange(0, BLOCK, step)
            texture = np.tile(PATTERNS[pattern], (side // BLOCK + 1,) * 2)[y:y + side, x:x + side, None]
            place = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            image[place] = np.array(COLOURS[colour]) + CONTRAST * texture
            faces.append((colour, pattern))
    return Image.fromarray(image.astype(np.uint8)), faces


def lesson_list(policy, rng, **kind):
    """Locate: list the cards of every colour, in reading order, and say where there is none (or no more). kind: of the scene."""
    scene = mixed_scene(rng, **kind)
    frame = Frame((SEEN, SEEN), (SIDE, SIDE))
    lesson = Lesson(policy, TINY_PROMPTS["grounded"], LIST, overview(scene))
    present = {c.colour for c in scene.cards}
    colours = sorted(present) + [c for c in COLOURS if c not in present][:1]
    for colour in rng.sample(colours, len(colours)):
        lesson.write(f" {colour}:", learned=False)
        for number, card in enumerate(Scene(scene.cards, colour).candidates, 1):
            lesson.write(" " + card_text(number, frame.to_input((card.x, card.y))))
        lesson.write(" None.")
    return lesson.sequence


def lesson_read(policy, rng):
    """Read: what is on the card in the close-up? Up to four of them in turn."""
    scene = mixed_scene(rng)
    drawing, lesson = scene.draw(), None
    for card in rng.sample(scene.cards, min(4, len(scene.cards))):
        point = card.x + rng.randint(-16, 16), card.y + rng.randint(-16, 16)
        close_up = zoom(drawing, point, SEEN // 2, SEEN)
        user = f"{QUESTION[0]} {card.colour}{QUESTION[1]}"
        if lesson is None:
            lesson = Lesson(policy, TINY_PROMPTS["direct"], user, close_up)
        else:
            lesson.write(policy.tokenizer.eos_token).sequence.add(
                policy.reply([{"type": "image"}, {"type": "text", "text": user}], [close_up]))
        lesson.write(f"<answer>{card.pattern}</answer>")
    return lesson.write(policy.tokenizer.eos_token).sequence


def lesson_dialogue(policy, rng, go_on, show):
    """The dialogue of the mode `zoom`, with decisions that are not sensible: after each look, whatever it showed, it goes on to
    the next candidate (or back to the one that it missed) with probability `go_on` and otherwise answers, if need be with any
    pattern. So the base learns the grammar, where cards are and what a close-up shows, but not when to look on. Some looks are
    astray (their points are not learned): it learns to say that nothing is there. show: the instructed kind, all cards."""
    colour, count = rng.choice(list(COLOURS)), rng.choice((1, 2, 3, 3))
    scene = patterned(rng, colour, count)
    frame, drawing, candidates = Frame((SEEN, SEEN), (SIDE, SIDE)), scene.draw(), scene.candidates
    words = SHOW if show else QUESTION
    lesson = Lesson(policy, TINY_PROMPTS["zoom"], f"{words[0]} {colour}{words[1]}", overview(scene))
    if not show and rng.random() < 0.05:               # answering without a look: a guess
        guess = rng.choice(ANSWERS) + "</answer>" + policy.tokenizer.eos_token
        return lesson.write(TINY.forced_answer, learned=False).write(guess).sequence
    number, thought = 0, ""
    for turn in range(4):
        astray = rng.random() < 0.15
        if astray:
            target = point = rng.randrange(SIDE), rng.randrange(SIDE)
        else:
            target = candidates[number].x, candidates[number].y
            point = tuple(min(max(v + rng.choice((0, rng.randint(-16, 16))), 0), SIDE - 1) for v in target)
        spot = frame.to_input(target)
        lesson.write(f"<think>{thought}Card {number + 1} at (").write(f"{format_point(spot)[1:]}.", learned=not astray)
        lesson.write(f"</think>\n{format_call(spot)}")
        box = crop_box(drawing.size, point, SEEN // 2)
        lesson.observe(zoom(drawing, point, SEEN // 2, SEEN))
        seen = scene.shown(box)
        found = seen[0].pattern if seen else None
        thought = f"{found.capitalize()}. " if found else "Nothing. "
        left = found is None or number + 1 < len(candidates)
        if turn == 3 or not left or not (show or rng.random() < go_on):
            break
        number += found is not None
    answer = found if found in ANSWERS else rng.choice(ANSWERS)
    return lesson.write(f"<think>{thought.strip()}</think>\n<answer>{answer}</answer>{policy.tokenizer.eos_token}").sequence


def learning_rate(step, steps, warm_up, final=0.1, cosine=False):
    """Factor on the learning rate: linear warm-up over `warm_up` steps; decay to `final` at the end, linear or by a cosine."""
    done = (1 - math.cos(math.pi * step / steps)) / 2 if cosine else step / steps
    return min(1, (step + 1) / warm_up) * (1 - (1 - final) * done)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for hidden matrices of small models (Jordan 2024), all of a shape at once. torch.optim.Muon
    works in bfloat16, which on a CPU without units for it took five times as long as the rest of a step; ours in float32."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                           for p in params]
                grads, momenta = (torch.stack([full_tensor(x) for x in found])  # (n, rows, columns)
                                  for found in ([p.grad for p in params], momenta))
                update = orthogonalise(grads.lerp(momenta, group["momentum"]))
                scale = max(1, shape[0] / shape[1])**0.5
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(shard_like(u, p), alpha=-group["lr"] * scale)


def orthogonalise(x, steps=5):
    """Brings the singular values of matrices (n, rows, columns) near 1, by the quintic Newton-Schulz iteration."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights. These are 1e-4 apart at 0.02, so a step of 1e-6 would always be rounded away; here what is
    written back is rounded up or down at random, right on average. Moments are kept in `dtype`; the arithmetic is float32,
    SLICE elements at a time. The random numbers follow from step and parameter alone: a resumed run goes on as it would."""
    SLICE = 2**24

    def __init__(self, params, lr, betas=(0.9, 0.999), weight_decay=0.01, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for number, p in enumerate(p for p in group["params"] if p.grad is not None):
                state = self.state[p] = self.state[p] or {
                    "step": 0, **{n: torch.zeros_like(p, dtype=self.dtype) for n in ("exp_avg", "exp_avg_sq")}}
                state["step"] = t = state["step"] + 1
                generator = torch.Generator(p.device).manual_seed(t * 100_003 + number)
                tensors = p, state["exp_avg"], state["exp_avg_sq"], p.grad.contiguous()
                tensors = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)     # of a sharded one: our part
                for *kept, grad in zip(*(x.view(-1).split(self.SLICE) for x in tensors)):
                    w, m, v, g = (x.float() for x in (*kept, grad))
                    m.lerp_(g, 1 - b1)
                    v.mul_(b2).addcmul_(g, g, value=1 - b2)
                    w.mul_(1 - lr * decay).addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(1e-8), value=-lr / (1 - b1**t))
                    for old, new in zip(kept, (w, m, v)):
                        old.copy_(rounded(new, generator) if old.dtype == torch.bfloat16 else new)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)            # casts moments to the weights' dtype: taken again as they were kept
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, p in zip(names, [p for group in self.param_groups for p in group["params"]]):
            kept = state_dict["state"].get(name, {})
            self.state[p].update({k: x.to(p.device) if torch.is_tensor(x) else x for k, x in kept.items()})


def rounded(x, generator):
    """float32 -> bfloat16, to one of the two neighbours, the nearer one the more often: the mean is x."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -2**16).view(torch.float32).bfloat16()


def make_optimizers(policy, kind, lr, adamw_lr=None, dtype="float32"):
    """"adamw", or "muon": Muon for hidden matrices, AdamW for the rest. dtype: of AdamW's moments of bfloat16 weights."""
    plain = policy.model.dtype != torch.bfloat16
    adamw = torch.optim.AdamW if plain else partial(RoundedAdamW, dtype=getattr(torch, dtype))
    if kind == "adamw":
        return [adamw(policy.trainable(), lr=lr, weight_decay=0.01)]
    named = dict(policy.model.named_parameters())
    outer = {id(p) for n, p in named.items() if p.ndim != 2 or "embed_tokens" in n or "lm_head" in n}
    hidden = [p for p in policy.trainable() if id(p) not in outer]
    rest = [p for p in policy.trainable() if id(p) in outer]
    return [Muon(hidden, lr=lr), adamw(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


# What a token of the vision tower is to tell: colour or that there is no card, pattern, place in x and in y, and the how manieth
# card of its colour it is, in reading order.
CLASSES = (len(COLOURS) + 1, len(PATTERNS), len(PLACES), len(PLACES), 3)
UNASKED = -1


def tile_truths(rng):
    """-> an image of tiles, and of each of its tokens the numbers of its CLASSES."""
    image, faces = draw_tiles(rng)
    return image, [face_truth(colour, pattern) for colour, pattern in faces]


def cell_truths(rng):
    """-> an overview, and of each of its tokens the numbers of its CLASSES; the pattern cannot be seen in it."""
    scene, colours = mixed_scene(rng), list(COLOURS)
    truths, seen = [], Counter()
    for card in scene.cells():
        if card is None:
            truths.append((len(colours), *[UNASKED] * 4))
            continue
        place = PLACES.index(card.x), PLACES.index(card.y)
        truths.append((colours.index(card.colour), UNASKED, *place, seen[card.colour]))
        seen[card.colour] += 1
    return overview(scene), truths


def crop_truths(rng):
    """-> a crop near a card, and of each of its tokens the numbers of its CLASSES: of what fills it, a card or the ground."""
    scene, half = mixed_scene(rng), CARD // 2
    card = rng.choice(scene.cards)
    point = card.x + rng.randint(-24, 24), card.y + rng.randint(-24, 24)
    left, top, right, bottom = crop_box((SIDE, SIDE), point, SEEN // 2)
    side, truths = SEEN // TILES, []
    for y in range(top, bottom, side):
        for x in range(left, right, side):
            over = [c for c in scene.cards if abs(c.x - x - side / 2) < half + side / 2
                    and abs(c.y - y - side / 2) < half + side / 2]
            within = [c for c in over if abs(c.x - x - side / 2) <= half - side / 2
                      and abs(c.y - y - side / 2) <= half - side / 2]
            if within:
                truths.append(face_truth(within[0].colour, within[0].pattern))
            elif over:
                truths.append((UNASKED,) * 5)
            else:
                truths.append((len(COLOURS), *[UNASKED] * 4))
    return scene.draw().crop((left, top, right, bottom)), truths


def face_truth(colour, pattern):
    return list(COLOURS).index(colour), list(PATTERNS).index(pattern), *[UNASKED] * 3


def train_tower(policy, seed, *, steps, log=print):
    """Teaches the vision tower alone. Its tokens tell their CLASSES by fixed directions, all at right angles: what is told has
    to fill the token. (By linear heads that learn it can hide in a small part of the token, where the language model does not
    find it: after 300 lessons it could not place a single card.)"""
    tower, hidden = policy.model.model.visual, policy.text_config.hidden_size
    torch.manual_seed(seed)
    directions = torch.nn.init.orthogonal_(torch.empty(sum(CLASSES), hidden))            # (classes, hidden)
    matrices = [p for p in tower.parameters() if p.ndim == 2]
    others = [p for p in tower.parameters() if p.ndim != 2]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    policy.train_vision = True
    started = time.time()
    for step in range(steps):
        kinds = [tile_truths] * 4 + [crop_truths] * 4 + [cell_truths] * 8
        if step >= steps // 4:                               # what is left to learn is to count
            kinds = [tile_truths] + [crop_truths] * 2 + [cell_truths] * 13
        pictures, truths = [], []
        for i in range(rank(), len(kinds), world_size()):
            image, truth = kinds[i](random.Random(f"tower {seed} {step} {i}"))
            pictures.append(policy.picture(image))
            truths += truth
        tokens = F.normalize(torch.cat(policy.features(pictures)), dim=-1) * hidden**0.5   # (images * 16, hidden)
        logits = (tokens @ directions.T).split(CLASSES, -1)                              # (images * 16, classes) each
        targets = torch.tensor(truths).T                                                 # (classes, images * 16)
        asked = sum_over_processes((targets != UNASKED).sum(1).tolist())
        loss = torch.zeros(())
        for x, target, n in zip(logits, targets, asked):
            loss = loss + F.cross_entropy(x, target, ignore_index=UNASKED, reduction="sum") / max(1, n)
        (loss * world_size()).backward()                     # gradients are averaged over the processes
        optimizer_step(list(tower.parameters()), optimizers, learning_rate(step, steps, 20, 0.05))
        if step % 100 == 99:
            log(f"vision tower {step + 1}/{steps}  loss {sum_over_processes([loss.item()])[0]:.3f}  {remaining(started, step + 1, steps)}")
    policy.train_vision = False


def lesson_mix(share):
    """How many lessons of each kind a step has at `share` of pretraining: lists first, then ever more dialogues."""
    dialogues = 0 if share < 0.2 else 5 if share < 0.45 else 8
    return {"read": 1, "dialogue": dialogues, "list": BATCH - 1 - dialogues}


def list_kind(share):
    """The scenes of lessons that list cards: few colours once each, then more cards, then alike, in an eighth of the time."""
    u = min(1, share / 0.12)
    if u < 0.33:
        return dict(fewest=1, most=1 + int(5 * u / 0.33), copies=(1,))
    if u < 0.66:
        return dict(fewest=2, most=7, copies=(1, 2, 2, 3))
    return dict(fewest=4, most=5 + int(4 * u), copies=(1, 2, 3, 3))


GO_ON = 0.2      # with this probability a dialogue of the lessons goes on to the next candidate, whatever the crop showed


def make_lesson(policy, kind, rng, share):
    """A pretraining sequence. share: of the curriculum that is over."""
    if kind == "read":
        return lesson_read(policy, rng)
    if kind == "dialogue":
        return lesson_dialogue(policy, rng, GO_ON, show=rng.random() < 0.8)
    return lesson_list(policy, rng, **list_kind(share))


def pretrain(policy, steps, seed, *, log=print):
    """Teaches the tiny base to see and to speak: the vision tower first, then, with the tower frozen, the language model.

    After `steps` steps, when the learning rate has decayed, comes an exam. A base that fails it goes on for a quarter of the
    steps, from a lower learning rate, and tries again; twice `steps` is the bound. A base of few steps has a tower of as few,
    and a short exam. -> what the last exam found"""
    train_tower(policy, seed, steps=min(700, steps), log=log)
    optimizers = make_optimizers(policy, "muon", 0.01, adamw_lr=5e-3)
    started, done, length, peak = time.time(), 0, steps, 1.0
    while True:
        policy.model.train()
        for step in range(done, done + length):
            factor = peak * learning_rate(step - done, length, 30, 0.03)
            loss = learn_lessons(policy, optimizers, step, steps, seed, factor)
            if step % 50 == 49 or step + 1 == done + length:
                loss, = sum_over_processes([loss])
                left = remaining(started, step + 1, done + length)
                log(f"pretraining {step + 1}/{done + length}  loss {loss:.3f}  {left}")
        policy.model.eval()
        done, length, peak = done + length, max(1, steps // 4), 0.4
        found = exam(policy, seed, n=min(1024, 8 * steps))
        log("exam: " + "  ".join(f"{name} {share:.3f}" for name, share in found.items()))
        if failed := [name for name, share in found.items() if share < PASSES[name.split()[0]]]:
            log(f"exam: NOT PASSED in {', '.join(failed)}" + ", more lessons" * (done < 2 * steps))
        if not failed or done >= 2 * steps:
            return found


def learn_lessons(policy, optimizers, step, steps, seed, factor):
    """One pretraining step, each process with its share of the lessons. -> this share's part of the loss"""
    kinds = [kind for kind, count in lesson_mix(step / steps).items() for _ in range(count)]
    lessons = []
    for i in range(rank(), len(kinds), world_size()):
        rng = random.Random(f"lesson {seed} {step} {i}")
        lessons.append(make_lesson(policy, kinds[i], rng, step / steps))
    tokens, = sum_over_processes([sum(sum(lesson.sampled) for lesson in lessons)])
    loss = -policy.log_probs([[lesson] for lesson in lessons]).sum() / tokens
    (loss * world_size()).backward()                         # gradients are averaged over the processes
    optimizer_step(policy.trainable(), optimizers, factor)
    return loss.item()


# ------------------------------------------------------------------------------------------------ its exam

# The least share of each part of the exam that a base passes with.
PASSES = {"says": 0.98, "target": 0.98, "lists": 0.8}


def exam(policy, seed, n=1024):
    """What the base has to know, on scenes that no lesson showed, sampled at temperature 1. -> {what: share}

    says PATTERN: thoughts after a crop of such a card that name its pattern; target 1, 2, 3: first, second and third looks that
    lie on the first, second and third candidate; lists: the probability with which all cards of a scene are listed without
    a mistake."""
    drawn = [patterned(random.Random(f"exam {seed} {i}")) for i in range(n)]
    questions = [Question(f"{SHOW[0]} {scene.colour}{SHOW[1]}", [scene.draw], "", scene=scene) for scene in drawn]
    seeds = [f"exam {seed} {i}" for i in range(n)]
    mine = slice(rank(), None, world_size())
    rows = []                                                # (what was examined, right or wrong)
    for trace, in rollout(policy, questions[mine], TINY, 1, seeds[mine], turn_tokens=48, response_tokens=288):
        rows += examine(trace)
    lists = [lesson_list(policy, random.Random(f"exam list {seed} {i}")) for i in range(n // 8)][mine]
    with torch.no_grad():
        rows += [("lists", policy.log_probs([[lesson]]).sum().exp().item()) for lesson in lists]
    found = defaultdict(list)
    for name, right in sum(gather(rows), []):
        found[name].append(right)
    names = ["lists", *(f"says {pattern}" for pattern in PATTERNS), *(f"target {number}" for number in (1, 2, 3))]
    return {name: mean(found[name]) for name in names}       # 0 for what it was never seen to do


def examine(trace):
    """The parts of the exam that a dialogue of the instructed kind has: [(what was examined, right or wrong)]."""
    scene, frame = trace.question.scene, trace.frames[0]
    rows = []
    for turn, after in pairwise(trace.turns):
        if turn.crop and not after.forced and scene.face_in(turn.crop) != NOTHING:
            rows.append((f"says {scene.face_in(turn.crop)}", scene.describes(after.thought, turn.crop)))
    points = [frame.to_original(point) for point in trace.zoom_points]
    for number, (point, card) in enumerate(zip(points, scene.candidates), 1):
        rows.append((f"target {number}", scene.card_at(point) is card))
    return rows


def patterned(rng, colour=None, candidates=None):
    """A scene as the questions have, but any candidate may bear a pattern, or all, or none."""
    scene = search_scene(rng, colour, candidates)
    faces = {id(c): rng.choice(("plain", *ANSWERS)) for c in scene.candidates}
    return Scene(tuple(replace(c, pattern=faces.get(id(c), c.pattern)) for c in scene.cards), scene.colour)


def optimizer_step(parameters, optimizers, factor, clip=1.0):
    """One step along the accumulated gradients, at `factor` times each optimizer's own learning
    rate; then they are cleared. All processes have to call it: gradients are averaged over them.
    -> the norm before clipping to `clip`."""
    average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return full_tensor(norm).item()


def remaining(started, done, total):
    """"12 s, 48 s left"."""
    spent = time.time() - started
    return f"{spent:.0f} s, {spent / done * (total - done):.0f} s left"


# ------------------------------------------------------------------------------------------------ (b) tree search

BACKTRACK = "That was not it. "        # put before a right roll-out that follows a wrong one
POINT_STEP = re.compile(f"(?:{POINT.pattern})[.,;:!]*")
SENTENCE_STEP = re.compile(r"[.!?](?=\s)")


@dataclass(eq=False)
class Node:
    """A path of steps (paper: warm start). trace: the tokens of the path; rollouts: complete traces sampled from here."""
    trace: Trace
    parent: "Node | None" = None
    points: tuple = ()             # the points used on the path, px as seen
    children: list = field(default_factory=list)
    rollouts: list = field(default_factory=list)
    visits: int = 0
    value: float = 0.0             # mean reward of all roll-outs below

    def back_up(self, reward):
        node = self
        while node:
            node.visits += 1
            node.value += (reward - node.value) / node.visits
            node = node.parent

    def select(self, c):
        """The leaf that UCB1 leads to: value + c * sqrt(ln(N_parent + 1) / (N_child + 1))."""
        node = self
        while node.children:
            explore = math.log(node.visits + 1)
            node = max(node.children, key=lambda child: child.value + c * math.sqrt(explore / (child.visits + 1)))
        return node

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()


def first_step_end(policy, trace, begin):
    """Where the step of a complete trace that begins at token `begin` ends. In the mode `zoom` a step is a turn with its
    observation; in the others it is a sentence with its point (`think`: a sentence), and the last one runs to the end."""
    if trace.mode == "zoom":
        return next((start for start in trace.turn_starts if start > begin), len(trace.ids))
    step, text = POINT_STEP if trace.mode == "grounded" else SENTENCE_STEP, ""
    for end in range(begin + 1, len(trace.ids)):
        text = policy.decode(trace.ids[begin:end])
        if "</think>" in text:
            break
        if (found := step.search(text)) and found.end() < len(text) or text.endswith(").") and found:
            return end
    return len(trace.ids)


def cut_trace(policy, trace, end):
    """The first `end` tokens of a trace (a step's end), to be continued."""
    if end >= len(trace.ids):
        return trace
    turns = [t for t, start in zip(trace.turns, trace.turn_starts[1:]) if start <= end]
    pictures = trace.pictures[:sum(1 for t in turns if t.crop)]
    starts = [s for s in trace.turn_starts if s <= end]
    return Trace(trace.prompt, trace.ids[:end], trace.sampled[:end], trace.log_probs[:end], pictures, trace.rng,
                 question=trace.question, mode=trace.mode, frames=trace.frames, turns=turns, turn_starts=starts,
                 prefix=policy.decode(trace.ids[starts[-1]:end]))


def continue_from(policy, dialogue, prefixes, count, sampling):
    """`count` complete traces from each prefix; the prefix is run once for them. -> lists of Traces, in the prefixes' order.

    Each trace gets a random stream of its own, begun by the next number of its tree's stream."""
    def jobs():
        for prefix in prefixes:
            prompt = Chunk(prefix.prompt.ids + prefix.ids, prefix.prompt.pictures + prefix.pictures)
            job = [Trace(prompt, rng=random.Random(prefix.rng.getrandbits(64)), question=prefix.question,
                         mode=prefix.mode, frames=prefix.frames, turns=list(prefix.turns), prefix=prefix.prefix,
                         crops=prefix.crops) for _ in range(count)]
            place[id(job)] = len(place), job
            yield job

    def whole(prefix, rest):
        shift = len(prefix.ids)
        return Trace(prefix.prompt, prefix.ids + rest.ids, prefix.sampled + rest.sampled, prefix.log_probs + rest.log_probs,
                     prefix.pictures + rest.pictures, prefix.rng, question=rest.question, mode=rest.mode, frames=rest.frames,
                     turns=rest.turns, ended=rest.ended, turn_starts=prefix.turn_starts + [s + shift for s in rest.turn_starts[1:]],
                     crops=prefix.crops)

    place, found = {}, {}
    for job in continue_traces(policy, jobs(), dialogue, **sampling):
        found[place[id(job)][0]] = job
    return [[whole(prefix, rest) for rest in found[i]] for i, prefix in enumerate(prefixes)]


def search(policy, questions, dialogue, seeds, sampling, *, simulations=8, width=3, rollouts=2, depth=10, c=2.0, min_distance=10,
           log=print):
    """Monte Carlo tree search for right traces of each question (paper: warm start). -> the trees' roots. In each simulation
    UCB1 selects a leaf of every tree; `width` continuations are sampled from it to their ends; the first step of each becomes a
    child unless it repeats a point of its path or a sibling; each child gets `rollouts` roll-outs, the one that it came with
    among them; rewards (1 right, 0 wrong) are backed up. seeds: one a question, for all random numbers of its tree."""
    roots = [Node(dialogue.start(policy, question, 1, seed)[0]) for question, seed in zip(questions, seeds)]
    started = time.time()
    for simulation in range(simulations):
        leaves, new = [root.select(c) for root in roots], []
        for leaf in leaves:
            if leaf.trace.ended:                       # nothing to expand: its reward counts again
                leaf.back_up(is_correct(leaf.trace))
        leaves = [leaf for leaf in leaves if not leaf.trace.ended]
        for leaf, traces in zip(leaves, continue_from(policy, dialogue, [leaf.trace for leaf in leaves], width, sampling)):
            leaf.rollouts += traces
            for trace in traces:
                child = expand(policy, leaf, trace, min_distance, depth)
                if child is None:
                    leaf.back_up(0.0)
                    continue
                if child not in leaf.children:
                    leaf.children.append(child)
                    new.append(child)
                child.back_up(is_correct(trace))
        new = [child for child in new if not child.trace.ended]
        for child, traces in zip(new, continue_from(policy, dialogue, [child.trace for child in new], rollouts - 1, sampling)):
            child.rollouts += traces
            for trace in traces:
                child.back_up(is_correct(trace))
        solved, asked = sum_over_processes([sum(root.value > 0 for root in roots), len(roots)])
        log(f"search {simulation + 1}/{simulations}  questions with a right trace {solved:.0f}/{asked:.0f}  "
            f"{remaining(started, simulation + 1, simulations)}")
    return roots


def expand(policy, leaf, trace, min_distance, depth):
    """The child of `leaf` that the first new step of `trace` leads to: new, the same sibling, or None if it repeats a point."""
    step = cut_trace(policy, trace, first_step_end(policy, trace, len(leaf.trace.ids)))
    text = policy.decode(step.ids[len(leaf.trace.ids):])
    points = step.zoom_points[len(leaf.trace.zoom_points):] if trace.mode == "zoom" else [] if step.ended else parse_points(text)
    if any(near(p, used, min_distance) for p in points for used in leaf.points):
        return None
    for sibling in leaf.children:
        if sibling.trace.ids == step.ids:
            return sibling
    node = Node(step, leaf, leaf.points + tuple(points))
    level, above = 1, leaf
    while above := above.parent:
        level += 1
    if level >= depth and not step.ended:              # too deep: the answer is asked for
        step.add(Chunk(policy.encode("</think>\n<answer>")))
        step.prefix += "</think>\n<answer>"
    return node


def near(a, b, distance):
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) < distance


# ------------------------------------------------------------------------------------------------ (c) linearising

def linearise(root, min_distance=10):
    """The chains of a tree (lists of turns' texts): of each node, every right roll-out, and every pair of a wrong and a right
    one with a back-tracking sentence between (paper: warm start); nothing twice, the shortest first."""
    chains = {}
    for node in root.walk():
        right = [t for t in node.rollouts if t.ended == "answer" and is_correct(t)]
        wrong = [t for t in node.rollouts if t.ended == "answer" and not is_correct(t)]
        for trace in right:
            chains.setdefault(tuple(t.text for t in trace.turns))
        for bad in wrong:
            for good in right:
                join = join_turns if root.trace.mode == "zoom" else join_steps
                if chain := join(node, bad, good, min_distance):
                    chains.setdefault(tuple(chain))
    return sorted(map(list, chains), key=lambda chain: sum(map(len, chain)))


def join_turns(node, bad, good, min_distance):
    """The looks of a wrong trace, a back-tracking sentence, and of a right trace the turns that look at other places."""
    shared = len(node.trace.turns)
    looks = [t for t in bad.turns[:-1] if t.crop]
    rest = [t for t in good.turns[shared:] if not (t.crop and any(near(t.call, seen.call, min_distance) for seen in looks))]
    if len(looks) <= shared or not any(t.crop for t in rest):
        return None                                    # nothing wrong was looked at, or nothing new after it
    texts = [t.text for t in rest]
    return [t.text for t in looks] + [texts[0].replace("<think>", "<think>" + BACKTRACK, 1)] + texts[1:]


def join_steps(node, bad, good, min_distance):
    """The same for a single turn: the wrong trace's thought, the sentence, what the right trace says after the shared prefix."""
    begun = node.trace.prefix
    wrong, right = bad.turns[0], good.turns[0]
    if not wrong.thought or not right.text.turn_startswith(begun):
        return None
    rest = right.text[len(begun):] if begun else right.text.removeprefix("<think>")
    return [f"<think>{wrong.thought} {BACKTRACK}{rest.lstrip()}"]


def to_multi_turn(text, max_crops=4, later=0.3, rng=random):
    """A single-turn chain as turns of the mode `zoom` (paper: multi-turn): cut at its points, each new point becomes a look,
    at most `max_crops`; what is left of the thought goes with the answer. With probability `later` the first look comes after the
    second, so that looking again after a miss is seen too. -> the turns' texts; without points or answer, the text as it is."""
    turn = parse_turn(text)
    steps, last = [], 0
    for found in POINT_STEP.finditer(turn.thought):
        point = parse_points(found[0])[0]
        if len(steps) < max_crops and not any(near(point, p, 1) for _, p in steps):
            steps.append((turn.thought[last:found.end()].strip(), point))
            last = found.end()
    if not steps or not turn.answer:
        return [text]
    if len(steps) > 1 and rng.random() < later:
        steps[0], steps[1] = steps[1], steps[0]
    rest = turn.thought[last:].strip()
    turns = [f"<think>{thought}</think>\n{format_call(point)}" for thought, point in steps]
    return turns + [f"<think>{rest}</think>\n<answer>{turn.answer}</answer>"]


def replay(policy, dialogue, question, texts):
    """Turns' texts as a Trace, with the close-ups that the tool really gives. Tokens of the policy's turns count as sampled."""
    trace = dialogue.start(policy, question, 1)[0]
    for text in texts:
        if trace.ended:
            break
        trace.add(Chunk(policy.encode(text) + [policy.tokenizer.eos_token_id]), sampled=True)
        if chunk := dialogue.on_turn(policy, trace, truncated=False):
            trace.add(chunk)
    return trace


# ------------------------------------------------------------------------------------------------ traces on disk

def describe_tree(node, above="", depth=0):
    """A tree as indented text, a node a line: visits, value, and the step that leads to it."""
    path = "".join(turn.text for turn in node.trace.turns) + node.trace.prefix
    step = in_a_line(path[len(above):] or node.trace.question.text)
    lines = [f"{'  ' * depth}{node.visits} visits, value {node.value:.2f}: {step}"]
    lines += [describe_tree(child, path, depth + 1) for child in node.children]
    return "\n".join(lines)


def in_a_line(text):
    """Turns' text without tags, and of a zoom call only its point."""
    text = re.sub(r'\{"name".*?(\[[^\]]*\])\}\}', r"zoom \1", text)
    return " ".join(re.sub(r"</?\w+>", " ", text).split())[:300]


def write_traces(path, chains):
    """chains: [(question, turns' texts)] -> JSON lines that a person can read, written whole."""
    rows = [json.dumps({"id": q.id, "question": q.text, "answer": q.answer, "turns": turns}, ensure_ascii=False, default=str)
            for q, turns in chains]
    write_text(path, "\n".join(rows) + "\n")


def read_traces(path, questions):
    """The chains of a file that `write_traces` wrote, with the questions of the same ids. Raises UserError."""
    by_id, chains = {q.id: q for q in questions}, []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            turns, question = row["turns"], by_id[row["id"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no trace of this task ({error!r}); it needs 'turns' and the 'id' of one of "
                            f"the first {len(by_id)} training questions (--search-questions)") from None
        if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
            raise UserError(f"{path}, line {number}: 'turns' must be a list of texts")
        chains.append((question, turns))
    if not chains:
        raise UserError(f"{path}: holds no traces")
    return chains


# ------------------------------------------------------------------------------------------------ (d) supervised fine-tuning

def fine_tune(policy, traces, optimizers, *, steps, batch, seed, micro_tokens=16_384, clip=1.0, log=print, **decay):
    """Maximises the likelihood of the policy's own tokens of `traces`, `batch` a step. decay: options of `learning_rate`."""
    rng, order, started = random.Random(f"fine-tuning {seed}"), [], time.time()
    policy.model.train()
    for step in range(steps):
        while len(order) < batch:
            order += rng.sample(traces, len(traces))
        groups, order = [[trace] for trace in order[:batch]], order[batch:]
        tokens, own_loss = sum(sum(trace.sampled) for (trace,) in groups), 0.0
        spare = groups[:1] if is_sharded(policy) else None
        for micro in micro_batches(groups[rank()::world_size()], micro_tokens, spare):
            loss = -policy.log_probs(micro.groups).sum() / tokens
            (loss * micro.weight * world_size()).backward()       # gradients are averaged over processes
            own_loss += loss.item() * micro.weight
        loss, = sum_over_processes([own_loss])
        factor = learning_rate(step, steps, max(1, steps * 0.03), **decay)
        norm = optimizer_step(policy.trainable(), optimizers, factor, clip)
        if step % 20 == 19 or step + 1 == steps:
            log(f"sft {step + 1}/{steps}  loss {loss:.3f}  grad norm {norm:.2f}  {remaining(started, step + 1, steps)}")
    policy.model.eval()


# ------------------------------------------------------------------------------------------------ the command line

def configure_training(given, script):
    """The Config of a training script. Raises UserError; a missing --model is named before all else."""
    if given.get("model"):
        read_config(given["model"])
    return configure(given, script)


def load_trainable(config, path):
    """A checkpoint to be trained, shared out if it is large: all processes have to call it. On a
    GPU, activations are computed again in the backward pass instead of kept."""
    policy = load(str(path), **config.input_limits())
    policy.train_vision = config.train_vision
    if policy.device.type == "cuda":
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shard_if_large(policy)
    return policy


def folder_of(config):
    return Path(config.out or f"runs/{Path(config.task).stem}-{config.mode}")


def make_base(config, log):
    """The checkpoint to start from: --model, or the tiny base, which all processes make together,
    once a seed. -> its path"""
    if config.model:
        return config.model
    folder = Path(f"runs/tiny/seed-{config.seed}-steps-{config.base_steps}")
    if gather(folder.is_dir())[0]:
        log(f"base: {folder} is there")
        return str(folder)
    if world_size() > BATCH:
        raise UserError(f"the tiny base is made by {BATCH} processes at most, a lesson each; give --processes {BATCH}")
    log(f"base: making {folder} from random weights")
    started = time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    start = folder.with_name(folder.name + "-random")
    make_tiny(start, tiny_strings())
    gather(None)                                # the first process has written it
    policy = load(str(start))
    gather(None)                                # all have read it
    if rank() == 0:
        shutil.rmtree(start)
    found = pretrain(policy, config.base_steps, config.seed, log=log)
    policy.save(folder, notes={"minutes": (time.time() - started) / 60, "exam": found}, dialogue=TINY.to_json())
    gather(None)
    return str(folder)


def make_traces(config, base, out, log):
    """Chains for fine-tuning, [(question, turns' texts)]: from --traces, from the run's own file, or searched for now."""
    questions = questions_of(config, "train", config.search_questions)
    path = Path(config.traces) if config.traces else out / "search.jsonl"
    if config.traces or path.is_file():
        log(f"traces: reading {path}")
        return read_traces(path, questions)
    teacher = load(config.teacher or base, **config.input_limits())
    log(f"traces: searching {len(questions)} questions with {config.teacher or base}")
    dialogue = make_dialogue(config, base, teacher)
    if config.mode == "zoom":
        dialogue.mode = config.search_mode
    seeds = [f"search {config.seed} {i}" for i in range(len(questions))]
    mine = slice(rank(), None, world_size())
    roots = search(teacher, questions[mine], dialogue, seeds[mine], config.sampling(), simulations=config.simulations, log=log)
    found = gather_shares([(linearise(root), describe_tree(root)) for root in roots])
    rng, chains, trees = random.Random(f"chains {config.seed}"), [], []
    for question, (its, tree) in zip(questions, found, strict=True):
        taken = rng.sample(its, min(config.chains, len(its)))
        chains += [(question, chain) for chain in taken]
        trees.append("\n".join([tree, *(f"taken: {in_a_line(''.join(chain))}" for chain in taken)]))
    log("\n\n".join(trees[:config.show_trees]))
    if rank() == 0:
        write_text(out / "trees.txt", "\n\n".join(trees) + "\n")
    if not chains:
        raise UserError(f"the search found no right trace in {len(questions)} questions; give a stronger --teacher or more "
                        "--search-questions")
    if rank() == 0:
        write_traces(path, chains)
    return chains


def warm_start(config, log):
    """Makes the run's `sft/` unless it is there: base, traces, fine-tuning. -> the base's path"""
    out = folder_of(config)
    out.mkdir(parents=True, exist_ok=True)
    base = make_base(config, log)
    if gather((out / "sft").is_dir())[0]:
        log(f"sft: {out / 'sft'} is there")
        return base
    started = time.time()
    chains = make_traces(config, base, out, log)
    policy = load_trainable(config, base)
    dialogue = make_dialogue(config, base, policy)
    if config.mode == "zoom":
        chains = [(q, texts if len(texts) > 1 else to_multi_turn(texts[0], config.max_crops, rng=random.Random(f"looks {q.id}")))
                  for q, texts in chains]
    traces = [replay(policy, dialogue, question, texts) for question, texts in chains]
    fit = [t for t in traces if t.ended == "answer" and is_correct(t)]
    log(f"sft: {len(fit)} of {len(traces)} traces are whole and right; "
        f"{sum(len(t.zoom_points) > 1 for t in fit)} of them look more than once")
    if not fit:
        raise UserError(f"none of the {len(traces)} traces is whole and right in the mode {config.mode}; look at them in "
                        f"{config.traces or out / 'search.jsonl'}, or give others by --traces")
    optimizers = make_optimizers(policy, "adamw", config.sft_lr)
    steps = config.sft_steps or math.ceil(len(fit) / config.sft_batch)
    fine_tune(policy, fit, optimizers, steps=steps, batch=config.sft_batch, seed=config.seed,
              micro_tokens=config.micro_tokens, final=0.0 if config.model else 0.1, cosine=bool(config.model), log=log)
    policy.save(out / "sft", notes={"minutes": (time.time() - started) / 60}, dialogue=dialogue.to_json())
    gather(None)
    return base


def main(given):
    config = configure_training(given, "train_sft")
    out = folder_of(config)
    print(describe_config(config, "train_sft"))
    if (out / "sft").is_dir() and not config.resume:
        raise UserError(f"{out / 'sft'} is there already; give --resume to keep it, or another --out")
    warm_start(config, print)
    print(f"done: {out / 'sft'}")


if __name__ == "__main__":
    run("train_sft", "Warm start: search for right traces, then supervised fine-tuning on them.", main)
