"""Makes the tiny base: a Qwen2.5-VL of 0.6 million parameters that sees the drawn scenes and speaks
the grammar of the dialogues, but decides without sense. When to look on and when to answer is what
reinforcement learning is to teach it.

    python tests/tiny/make_base.py                       # tests/tiny/base, from random weights
    python tests/tiny/make_base.py --base tests/tiny/base --out tests/tiny/web-base

The second goes on with a base, with the words and lessons of the drawn site, too.

First the vision tower alone learns to tell what its tokens show; then, with the tower frozen, the
language model takes lessons: lists of cards, dialogues, answers. An exam on scenes that no lesson
showed decides whether that was enough.
"""
import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from make_data import (  # noqa: E402
    ANSWERS,
    BLOCK,
    CELL,
    CLICK,
    CLICK_ALIKE,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    FACES,
    IS_THE,
    JITTER,
    MOVED,
    NOTHING,
    PATTERNS,
    RELATION,
    SEARCH,
    SHOWN,
    SIDE,
    Scene,
    Site,
    Step,
    ask,
    ask_screen,
    ask_spatial,
    element,
    own_action,
    place_cards,
    search_scene,
    windows_of,
)

from model import Chunk, Policy, Sequence, load  # noqa: E402
from reward import format_fault, parse_action  # noqa: E402
from rollout import (  # noqa: E402
    Dialogue,
    Frame,
    Question,
    crop_box,
    format_call,
    format_point,
    parse_points,
    rollout,
    zoom,
)

# ---------------------------------------------------------------------------- wording and tokenizer

SEEN = 64                              # px, side of the model's input, of drawings and of crops
DIALOGUE = {
    "system_prompts": {"direct": "Answer.", "think": "Think.", "grounded": "Point.",
                       "zoom": "Zoom."},
    "before_crop": "<observation>\n",
    "before_dotted": "<observation>\n",
    "after_crop": "\n</observation>",
    "no_calls_left": "There are no looks left.",
    "forced_answer": "<think></think>\n<answer>",
    "hints": False,                    # questions are asked as the lessons have them
    "coordinates": "input",
    "crop_half": 32,
    "crop_size": 64,
    "crop_dot": False,
    "max_crops": 4,
}
SHOW = ("Show each", " card.")         # in lessons: to zoom into all cards of a colour
LIST = "List the cards."
COMPARE = "Compare the cards."
MARKED = "Read the marks."
BACKTRACK = "That was not it."
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def strings(web=False):
    """What the tokenizer has as single tokens: the fixed strings of the grammar, and the words of
    the questions, of the site's, too, where `web` is set. A word has its blank in front, as in a
    real vocabulary."""
    before, after = format_call((0, 0)).split("[0, 0]")
    tags = [f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call", "observation")
            for slash in ("", "/")]
    grammar = [DIALOGUE["before_crop"], DIALOGUE["after_crop"], f"</think>\n{before}[",
               f"]{after}", "</think>\n<answer>", " </answer>", "system\n", "user\n",
               "assistant\n"]
    questions = [*SHOW, *SEARCH, IS_THE, *RELATION.values(), *MOVED.values(), " card?",
                 *dict.fromkeys(CLICK + CLICK_ALIKE)]
    words = [*DIALOGUE["system_prompts"].values(), *questions, LIST, COMPARE, " Card ", "Card ",
             " at (", " (", ", ", ").", " None.", "Nothing.", ":", f" {BACKTRACK}",
             f"{BACKTRACK} "]
    said = [f" {word}" for word in (*COLOURS, *PATTERNS, *DIRECTIONS)]
    patterns = [f"{pattern.capitalize()}." for pattern in PATTERNS]
    asked = ["OBJECTIVE: ", *SHOWN, "\n\nPREVIOUS ACTIONS: ", "None", "\n\nIMAGE:", MARKED,
             "Here is a", " Here is a", " card"]
    done = [f" click {element(colour)}" for colour in COLOURS]
    actions = [*(f" click [{number}]" for number in DIGITS), " scroll [down]", " go_back",
               *(f" stop [{pattern}]" for pattern in ANSWERS)]
    base = tags + grammar + words + said + patterns
    return base + asked + done + actions if web else base


def make_tiny(folder, strings, *, image_px=SEEN, hidden=96, layers=4, heads=3, vision_hidden=64):
    """Writes a tiny Qwen2.5-VL with random weights (torch's seed) as a checkpoint folder.

    strings: single tokens, besides special ones and bytes. image_px: side of the square model
    input, of patches of 8 px, merged 2x2."""
    alphabet = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(string, normalized=False) for string in strings])
    tokenizer.chat_template = CHAT_TEMPLATE
    pad, _, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(
        SPECIAL_TOKENS)
    half = hidden // heads // 2
    side = half * 3 // 8
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[half - 2 * side, side, side])
    text = dict(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                max_position_embeddings=2048, initializer_range=0.1, rope_parameters=rope,
                tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=pad)
    vision = dict(depth=2, hidden_size=vision_hidden, intermediate_size=2 * vision_hidden,
                  num_heads=4, out_hidden_size=hidden, patch_size=8, spatial_merge_size=2,
                  temporal_patch_size=2, window_size=64, fullatt_block_indexes=[0, 1],
                  initializer_range=0.1)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=vision_start, vision_end_token_id=vision_end,
        tie_word_embeddings=True))
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    box_filter = 4                               # exact means over blocks
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=image_px**2,
        max_pixels=image_px**2, resample=box_filter, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    Policy(model, tokenizer, processor).save(folder)


# --------------------------------------------------------------------------------------- optimizers

def make_optimizers(parameters, rates, outer=()):
    """Muon for hidden matrices: about twice as fast as AdamW alone, which takes the rest. rates: of
    both. outer: matrices of the vocabulary, which are not hidden."""
    hidden = []
    rest = []
    for p in parameters:
        is_outer = any(p is matrix for matrix in outer)
        (hidden if p.ndim == 2 and not is_outer else rest).append(p)
    muon = torch.optim.Muon(hidden, lr=rates[0], weight_decay=0.01, ns_steps=3)
    return [muon, torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0)]


def step_along(parameters, optimizers, factor):
    """One step along the gradients, at `factor` times each optimizer's own learning rate."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()


def factor_at(step, steps, warm_up, final):
    """Of the learning rate: a linear warm-up, and a linear decay to `final` at the end."""
    return min(1, (step + 1) / warm_up) * (1 - (1 - final) * step / steps)


# --------------------------------------------------------------------------------- the vision tower

TOWER_STEPS = 600                      # at most, of 32 images each
TOWER_RATES = (0.02, 5e-3)             # peak learning rates: of Muon, of AdamW
IN_WINDOWS = 0.3                       # share of the tower's drawings that have windows
TILE = 16                              # px of the model input that a token of the image stands for
PLACES = [cell * CELL + CELL // 2 + shift for cell in range(SIDE // CELL) for shift in JITTER]

# What a token of the tower tells: colour or that there is no card, pattern, place of the card in x
# and in y (one of PLACES, px), which card of its colour it is, in reading order, and its mark.
CLASSES = (len(COLOURS) + 1, len(PATTERNS), len(PLACES), len(PLACES), 3, len(DIGITS))
UNASKED = -1
NOT_ASKED = (UNASKED,) * len(CLASSES)
NO_CARD = (len(COLOURS), *NOT_ASKED[1:])


def face_truth(colour, pattern):
    """Of a token that a card fills."""
    return (list(COLOURS).index(colour), list(PATTERNS).index(pattern), *NOT_ASKED[2:])


def overview(drawing):
    """A drawing as the model sees it: the means of its blocks, as by the box filter of its image
    processor."""
    return drawing.reduce(SIDE // SEEN)


def mixed_scene(rng, fewest=4, most=9, copies=(1, 2, 3, 3), in_windows=0.0):
    """`fewest` to `most` cards, of each colour as many as a draw from `copies` says; with
    probability `in_windows` there are windows, too."""
    colours = []
    for colour in rng.sample(list(COLOURS), 6):
        colours += [colour] * rng.choice(copies)
    colours = colours[:rng.randint(fewest, most)]
    faces = [(colour, rng.choice(("plain", *PATTERNS))) for colour in colours]
    windows = windows_of(rng) if rng.random() < in_windows else ()
    return Scene(place_cards(rng, faces, windows), colours[0], windows=windows)


def marked(rng, scene, share=1.0):
    """The scene, with a mark on each card, or on a share of them."""
    cards = [replace(card, mark=rng.choice(list(DIGITS)) if rng.random() < share else 0)
             for card in scene.cards]
    return replace(scene, cards=tuple(cards))


def tile_truths(rng):
    """-> an image of tiles, a colour and a pattern each, in half of the images at any phase; and of
    each of its tokens the numbers of its CLASSES."""
    step = rng.choice((1, BLOCK))
    image = np.empty((SEEN, SEEN, 3), np.uint8)
    truths = []
    for top in range(0, SEEN, TILE):
        for left in range(0, SEEN, TILE):
            colour = rng.choice(list(COLOURS))
            pattern = rng.choice(list(PATTERNS))
            y = rng.randrange(0, BLOCK, step)
            x = rng.randrange(0, BLOCK, step)
            face = FACES[colour, pattern][y:y + TILE, x:x + TILE]
            image[top:top + TILE, left:left + TILE] = face
            truths.append(face_truth(colour, pattern))
    return Image.fromarray(image), truths


def cell_truths(rng):
    """-> an overview of many cards, and of each of its tokens the numbers of its CLASSES; the
    pattern cannot be seen in it."""
    scene = mixed_scene(rng, 9, 16, in_windows=IN_WINDOWS)
    scene = marked(rng, scene, rng.choice((0, 0.7)))
    cards = {card.cell: card for card in scene.cards}
    seen = []
    truths = []
    for cell in product(range(4), repeat=2):                 # in reading order
        card = cards.get(cell)
        if card is None:
            truths.append(NO_CARD)
            continue
        colour = list(COLOURS).index(card.colour)
        place = PLACES.index(card.x), PLACES.index(card.y)
        mark = card.mark - 1 if card.mark else UNASKED
        truths.append((colour, UNASKED, *place, seen.count(colour), mark))
        seen.append(colour)
    return overview(scene.draw()), truths


def crop_truths(rng):
    """-> a crop near a card, and of each of its tokens the numbers of its CLASSES: of what fills
    it, a card or the ground."""
    scene = mixed_scene(rng, in_windows=IN_WINDOWS)
    card = rng.choice(scene.cards)
    point = card.x + rng.randint(-24, 24), card.y + rng.randint(-24, 24)
    left, top, right, bottom = box = crop_box((SIDE, SIDE), point, SEEN // 2)
    truths = []
    for y in range(top, bottom, TILE):
        for x in range(left, right, TILE):
            corners = product((x + 0.5, x + TILE - 0.5), (y + 0.5, y + TILE - 0.5))
            cards = {next((card for card in scene.cards if card.contains(corner)), None)
                     for corner in corners}
            card = cards.pop()
            if cards:                                        # at an edge
                truths.append(NOT_ASKED)
            else:
                truths.append(face_truth(card.colour, card.pattern) if card else NO_CARD)
    return scene.draw().crop(box), truths


def tower_directions(seed, hidden):
    """The unit vectors at right angles by which the tower's tokens tell their CLASSES, (classes,
    hidden), and those of x and y, (2, hidden): places also lie along these, by column and row."""
    torch.manual_seed(seed)
    directions = torch.nn.init.orthogonal_(torch.empty(sum(CLASSES) + 2, hidden))
    others, axes, marks = directions.split([sum(CLASSES[:-1]), 2, CLASSES[-1]])
    directions = torch.cat([others, marks])
    cells = torch.arange(len(PLACES)) // len(JITTER) / 1.5 - 1                   # from -1 to 1
    for axis, places in zip(axes, directions.split(CLASSES)[2:4], strict=True):
        places += cells[:, None] * axis
    return directions, axes


def train_tower(policy, seed, directions, steps, peak=1.0):
    """Teaches the vision tower alone. peak: of the learning rates, as a share of TOWER_RATES.

    Its tokens tell their CLASSES along fixed directions: what is told fills the token. (With linear
    heads that learn it can hide in a small part of the token, where the language model does not
    find it.)"""
    hidden = policy.text_config.hidden_size
    tower = list(policy.model.model.visual.parameters())
    optimizers = make_optimizers(tower, TOWER_RATES)
    started = time.time()
    for step in range(steps):
        kinds = [tile_truths] * 8 + [crop_truths] * 8 + [cell_truths] * 16
        if step >= steps // 4:                               # what is left to learn is to count
            kinds = [tile_truths] * 2 + [crop_truths] * 4 + [cell_truths] * 26
        pictures = []
        truths = []
        for i, kind in enumerate(kinds):
            image, truth = kind(random.Random(f"tower {seed} {step} {i}"))
            pictures.append(policy.picture(image))
            truths += truth
        tokens = F.normalize(torch.cat(policy.run_vision_tower(pictures)), dim=-1) * hidden**0.5
        logits = (tokens @ directions.T).split(CLASSES, -1)  # (images * 16, classes) each
        loss = torch.zeros(())
        for x, target in zip(logits, torch.tensor(truths).T, strict=True):
            asked = (target != UNASKED).sum().clamp(min=1)
            loss = loss + F.cross_entropy(x, target, ignore_index=UNASKED,
                                          reduction="sum") / asked
        loss.backward()
        step_along(tower, optimizers, peak * factor_at(step, steps, 20, 0.05))
        if step % 50 == 49:
            print(f"vision tower {step + 1}/{steps}  loss {loss.item():.3f}  "
                  f"{time.time() - started:.0f} s", flush=True)


def align_words(policy, directions, axes, words):
    """Adds to the embeddings of those words that name something its directions. So what an image
    shows is found by its word, and named by it, before there was a lesson (CLIP's idea)."""
    colours, patterns, *_, marks = directions.split(CLASSES)
    rows = {f" {colour}": row for colour, row in zip(COLOURS, colours, strict=False)}
    for pattern, row in zip(PATTERNS, patterns, strict=True):
        rows |= {f" {pattern}": row, f"{pattern.capitalize()}.": row, f" stop [{pattern}]": row}
    rows |= {f" click [{number}]": row for number, row in zip(DIGITS, marks, strict=True)}
    rows |= {"Nothing.": colours[-1], " left": -axes[0], " right": axes[0], " above": -axes[1],
             " below": axes[1]}
    with torch.no_grad():
        for word in rows.keys() & set(words):
            row = rows[word]
            token, = policy.encode(word)
            policy.model.model.language_model.embed_tokens.weight[token] += row


# ------------------------------------------------------------------------------------------ lessons

LANGUAGE_RATES = (0.01, 5e-3)          # peak learning rates: of Muon, of AdamW
LOWER_RATE = 0.5                       # share of the rates for a base that goes on
KEPT = 0.12                            # of the weights of such a base, in the end
BATCH = 16                             # lessons a step at least
GO_ON = 0.4                            # probability that a dialogue goes on, whatever a crop showed
BACK = 0.15                            # that it then says that this was not it, after a plain card
INSTRUCTED = 0.6                       # share of dialogues that show all cards of a colour
ASTRAY = 0.08                          # share of zoom calls to any place
GUESSES = 0.05                         # share of the other dialogues that answer at once, blindly
KNOWS = 0.4                            # share of questions on directions with a right answer
AT_ONCE = 0.3                          # share of those on screens that answer without a zoom call
SEEN_GOAL = 0.6                        # share of looks at the goal's card, if it is shown
TWO_LOOKS = 0.2                        # share of steps with a second look after a wrong one
ANYWHERE = ("scroll [down]", "go_back")
FRAME = Frame((SEEN, SEEN), (SIDE, SIDE))


class Lesson(Sequence):
    """A sequence as it is written: text that is learned, text that is only read, and images."""

    def __init__(self, policy, mode, user, *images):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": user}]
        system = DIALOGUE["system_prompts"][mode]
        super().__init__(policy.prompt([{"role": "system", "content": system},
                                        {"role": "user", "content": content}], list(images)))
        self.policy = policy

    def write(self, text, learned=True):
        return self.add(Chunk(self.policy.encode(text)), sampled=learned)

    def end_turn(self):
        return self.write(self.policy.tokenizer.eos_token)

    def ask_again(self, before, image, after):
        """Ends the turn; the next one answers a user turn with an image in it."""
        content = [{"type": "text", "text": before}, {"type": "image"},
                   {"type": "text", "text": after}]
        content = [part for part in content if part.get("text") != ""]
        self.end_turn().add(self.policy.reply(content, [image]))

    def show_crop(self, drawing, point):
        """Ends the turn, which has called the zoom tool."""
        crop = zoom(drawing, point, SEEN // 2, SEEN)
        self.ask_again(DIALOGUE["before_crop"], crop, DIALOGUE["after_crop"])


def card_text(number, point=None):
    return f"Card {number} at {format_point(point)}." if point else f"Card {number}."


def here_text(card):
    return f"Here is a {card.colour} card at {format_point(FRAME.to_input((card.x, card.y)))}."


def look_text(card, goal):
    """What a step on a site says of a card, the goal's or not."""
    return here_text(card) if card.colour == goal else f"{here_text(card)} {BACKTRACK}"


def answer_text(answer):
    return f"<answer> {answer} </answer>"


def lesson_list(policy, rng, share=1.0):
    """Locate: list the cards of every colour, in reading order, and say where there is none (or no
    more)."""
    scene = mixed_scene(rng, **list_kind(share))
    lesson = Lesson(policy, "grounded", LIST, overview(scene.draw()))
    present = {card.colour for card in scene.cards}
    absent = [colour for colour in COLOURS if colour not in present]
    colours = sorted(present) + absent[:1]
    for colour in rng.sample(colours, len(colours)):
        lesson.write(f" {colour}:", learned=False)
        for number, card in enumerate(replace(scene, colour=colour).candidates, 1):
            lesson.write(" " + card_text(number, FRAME.to_input((card.x, card.y))))
        lesson.write(" None.")
    return lesson


def list_kind(share):
    """The scenes of lessons that list cards: few colours once each, then more cards, then alike, in
    an eighth of the time."""
    u = min(1, share / 0.12)
    if u < 0.33:
        return dict(fewest=1, most=1 + int(5 * u / 0.33), copies=(1,))
    if u < 0.66:
        return dict(fewest=2, most=7, copies=(1, 2, 2, 3))
    return dict(fewest=4, most=5 + int(4 * u), copies=(1, 2, 3, 3))


def lesson_compare(policy, rng, share=1.0):
    """Compare: where are two cards, where does the first lie, seen from the second, along the axis
    that is asked for, and what does that answer? Four pairs of an overview, in the end neighbours,
    as in questions: they are the hardest."""
    scene = mixed_scene(rng, most=6, copies=(1,))
    lesson = Lesson(policy, "grounded", COMPARE, overview(scene.draw()))
    most = 1 if share >= 1 else 3                            # rows or columns between them
    pairs = []
    for one, other in permutations(scene.cards, 2):
        steps = one.steps_from(other)
        near = [name for name in one.directions_from(other) if steps[name] <= most]
        if near:
            pairs.append(((one, other), near))
    for pair, directions in rng.sample(pairs, min(4, len(pairs))):
        answer = rng.choice(directions)
        axis = next(axis for axis in RELATION if answer in axis)
        asked = rng.choice((RELATION, MOVED))[axis]
        early = rng.random() < 0.5                           # as in questions; late is easier
        colours = "".join(f" {card.colour}" for card in pair)
        lesson.write(colours + (asked if early else "") + ":", learned=False)
        for number, card in enumerate(pair, 1):
            lesson.write(" " + card_text(number, FRAME.to_input((card.x, card.y))))
        if not early:
            lesson.write(asked, learned=False)
        lesson.write(f" {answer}." + answer_text(answer))
    return lesson


def lesson_read(policy, rng, share=1.0):
    """Read: what is on the card in the crop? Up to four of them in turn."""
    scene = mixed_scene(rng)
    drawing = scene.draw()
    lesson = None
    for card in rng.sample(scene.cards, min(4, len(scene.cards))):
        point = card.x + rng.randint(-16, 16), card.y + rng.randint(-16, 16)
        crop = zoom(drawing, point, SEEN // 2, SEEN)
        user = f"{SEARCH[0]} {card.colour}{SEARCH[1]}"
        if lesson:
            lesson.ask_again("", crop, user)
        else:
            lesson = Lesson(policy, "direct", user, crop)
        lesson.write(answer_text(card.pattern))
    return lesson.end_turn()


def lesson_answer(policy, rng, share=1.0, modes=("direct", "think", "grounded")):
    """The modes of one turn: names what is asked about, with or without its place, or nothing; then
    answers. In a share KNOWS of the lessons the thought says how the two cards lie, along the axis
    that is asked for, and the answer follows from it; else it is a guess. Of a screen it points at
    the first of the candidates, whichever is asked for."""
    mode = rng.choice(modes)
    asked = rng.choice((ask_spatial, ask_spatial, ask_screen))(rng)
    scene = asked.scene
    places = [FRAME.to_input((card.x, card.y)) for card in scene.named or scene.candidates[:1]]
    thoughts = [card_text(number, place if mode == "grounded" else None)
                for number, place in enumerate(places, 1)]
    if not scene.named:
        answer = format_point(places[0])
    elif rng.random() < KNOWS:
        answer = asked.answer
        thoughts.append(f"{answer}.")
    else:
        answer = rng.choice(next(axis for axis in RELATION if asked.answer in axis))
    lesson = Lesson(policy, mode, asked.text, *map(overview, asked.draw()))
    if mode != "direct":
        lesson.write(f"<think>{' '.join(thoughts)}</think>\n")
    return lesson.write(answer_text(answer)).end_turn()


def lesson_marks(policy, rng, share=1.0, places=True):
    """Read: where is the card of a colour, and what number has it? All cards of a screen. places:
    are learned, too."""
    scene = marked(rng, mixed_scene(rng, 2, 6, copies=(1,), in_windows=0.5))
    lesson = Lesson(policy, "grounded", MARKED, overview(scene.draw()))
    for card in rng.sample(scene.cards, len(scene.cards)):
        before, place = here_text(card).split("(")
        lesson.write(f" {before}(", learned=False).write(place, learned=places)
        lesson.write(f" click [{card.mark}]")
    return lesson


def lesson_web(policy, rng, share=1.0):
    """A step on a drawn site: points at a card, and says it where that is not the goal's; now and
    then at another one, too. Then it does something, whatever was said: often what such a screen
    is left by."""
    site = Site(rng, rng.randrange(4))
    screen = rng.choice(("top", "bottom", *rng.sample(list(COLOURS), 2)))
    cards = site.screens[screen].cards
    colours = rng.sample(list(COLOURS), 2)
    history = rng.sample([f"click {element(colours[0])}", f"click {element(colours[1])}",
                          "scroll [down]", "go_back", "go_back"], rng.randrange(4))
    asked = site.ask(screen, history)
    looks = []
    for _ in range(1 + (rng.random() < TWO_LOOKS)):
        if not looks or looks[-1].colour != site.goal:
            at_goal = rng.random() < SEEN_GOAL
            looks += (at_goal and asked.scene.candidates) or [rng.choice(cards)]
    thought = " ".join(look_text(card, site.goal) for card in looks)
    scrolls, goes_back = (4, 2) if looks[-1].mark else (2, 4)
    action = rng.choices((own_action(looks[-1]), *ANYWHERE), (4, scrolls, goes_back))[0]
    lesson = Lesson(policy, "grounded", asked.text, overview(asked.scene.draw()))
    lesson.write(f"<think>{thought}</think>\n")
    return lesson.write(answer_text(action)).end_turn()


def patterned(rng, colour=None, candidates=None):
    """A scene as the search has, but any candidate may bear a pattern, or all, or none."""
    scene = search_scene(rng, colour, candidates)
    new = {}
    for card in scene.candidates:
        new[card] = replace(card, pattern=rng.choice(("plain", "plain", *ANSWERS)))
    return replace(scene, cards=tuple(new.get(card, card) for card in scene.cards))


def lesson_dialogue(policy, rng, share=1.0):
    """The dialogue of the mode `zoom`, with decisions that are not sensible.

    After each crop, whatever it showed, it goes on to the next candidate (or back to the one that
    it missed) with probability GO_ON, and otherwise answers, if need be with any pattern. So the
    base learns the grammar, where cards are and what a crop shows, but not when to go on. Where a
    zoom call goes astray its point is not learned: the base learns to say that nothing is there."""
    others = 1 - INSTRUCTED
    kind = rng.choices((SHOW, SEARCH, CLICK), (INSTRUCTED, others / 2, others / 2))[0]
    if kind is CLICK:
        asked = ask_screen(rng)
        scene, text = asked.scene, asked.text
    else:
        scene = patterned(rng, candidates=rng.choice((1, 2, 3, 3)))
        text = f"{kind[0]} {scene.colour}{kind[1]}"
    drawing = scene.draw()
    candidates = scene.candidates
    lesson = Lesson(policy, "zoom", text, overview(drawing))
    anything = rng.choice(ANSWERS)
    if kind is CLICK:
        anything = format_point(FRAME.to_input((candidates[0].x, candidates[0].y)))
    if kind is not SHOW and rng.random() < GUESSES:
        lesson.write(DIALOGUE["forced_answer"], learned=False)
        return lesson.write(f" {anything} </answer>").end_turn()
    if kind is CLICK and rng.random() < AT_ONCE:
        thought = f"Card 1 at {anything}."
        return lesson.write(f"<think>{thought}</think>\n{answer_text(anything)}").end_turn()
    number = 0
    thought = ""
    for turn in range(DIALOGUE["max_crops"]):
        astray = rng.random() < ASTRAY
        if astray:
            target = point = rng.randrange(SIDE), rng.randrange(SIDE)
        else:
            target = candidates[number].x, candidates[number].y
            point = shifted(target, rng)
        spot = FRAME.to_input(target)
        lesson.write(f"<think>{thought}Card {number + 1} at (")
        lesson.write(f"{format_point(spot)[1:]}.", learned=not astray)
        lesson.write(f"</think>\n{format_call(spot)}")
        lesson.show_crop(drawing, point)
        face = scene.face_in(crop_box(drawing.size, point, SEEN // 2))
        said = f"{face.capitalize()}."
        more = face == NOTHING or number + 1 < len(candidates)
        if turn == 3 or not more or not (kind is SHOW or rng.random() < GO_ON):
            break
        thought = f"{said} "
        if face in ("plain", NOTHING) and rng.random() < BACK:
            thought += f"{BACKTRACK} "
        if face != NOTHING:
            number += 1
    answer = anything
    if kind is CLICK and face != NOTHING:
        answer = format_point(spot)
    elif face in ANSWERS:
        answer = face
    return lesson.write(f"<think>{said}</think>\n{answer_text(answer)}").end_turn()


def shifted(point, rng):
    """A point some px beside, in either direction or not, inside the drawing."""
    moved = [value + rng.choice((0, rng.randint(-16, 16))) for value in point]
    return [min(max(value, 0), SIDE - 1) for value in moved]


def lesson_mix(share, dialogues=True, web=False):
    """The lessons of a step at `share` of the whole: lists first, then ever more dialogues; in the
    end, more of all else. dialogues False: no thought that points, and no zoom call; web: the drawn
    site's, too."""
    if share < 0.2:
        return [lesson_read] + [lesson_list] * (BATCH - 1)
    if not dialogues:
        answers = partial(lesson_answer, modes=("direct", "think"))
        kinds = [lesson_read] * 3 + [answers] * 4 + [lesson_compare] * 4
        return kinds + [lesson_list] * (BATCH - len(kinds))
    kinds = [lesson_read] + [lesson_dialogue] * (4 if share < 0.45 else 8)
    kinds += [lesson_answer] * 4 + [lesson_compare] * (3 if share < 1 else 5)
    kinds += [lesson_list] * (max(2, BATCH - len(kinds)) if share < 1 else 4)
    return kinds + [lesson_marks] * 2 + [lesson_web] * 6 if web else kinds


def learn(policy, first, length, steps, peak, seed, mix):
    """`length` lesson steps from number `first` on. The learning rate decays; what is left in the
    end is the exponential moving average of the weights, over a sixteenth of `steps`."""
    language = policy.model.model.language_model
    weights = list(language.parameters())                    # of the head, too: it is tied
    optimizers = make_optimizers(weights, LANGUAGE_RATES, [language.embed_tokens.weight])
    averages = [weight.detach().clone() for weight in weights]
    average = get_ema_multi_avg_fn(max(0, 1 - 16 / steps))
    started = time.time()
    for step in range(first, first + length):
        share = step / steps
        lessons = [[kind(policy, random.Random(f"lesson {seed} {step} {i}"), share)]
                   for i, kind in enumerate(mix(share))]
        loss = -policy.log_probs(lessons).mean()
        loss.backward()
        step_along(weights, optimizers, peak * factor_at(step - first, length, 30, 0.03))
        average(averages, weights, step)
        if step % 50 == 49:
            print(f"lessons {step + 1}/{first + length}  loss {loss.item():.3f}  "
                  f"{time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        for weight, averaged in zip(weights, averages, strict=True):
            weight.copy_(averaged)


def train(policy, steps, seed, words, done=0, dialogues=True, web=False):
    """Teaches the base to see and to speak. -> the marks of its last exam, and the lesson steps

    After `steps` steps comes the exam. A base that fails it goes on for two fifths of the steps,
    from a lower rate, and tries again, at most three times. words: of the tokenizer that are new.
    done: lesson steps that the base has behind it; one that has some begins with going on. Without
    dialogues there is no exam."""
    directions, axes = tower_directions(seed, policy.text_config.hidden_size)
    if done == 0:
        for layer in policy.model.model.language_model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # at first a layer adds nothing to
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)     # what the tower tells
    if words:
        peak = LOWER_RATE if done else 1.0
        train_tower(policy, seed, directions, min(TOWER_STEPS, steps), peak)
    align_words(policy, directions, axes, words)
    mix = partial(lesson_mix, dialogues=dialogues, web=web)
    more = max(1, 2 * steps // 5)
    last = max(done, steps) + 3 * more
    while True:
        if done == 0:
            learn(policy, 0, steps, steps, 1.0, seed, mix)
            done = steps
            if not dialogues:
                return {}, done
        else:
            learn(policy, done, more, steps, LOWER_RATE, seed, mix)
            done += more
        marks = exam(policy, f"{seed}", min(1024, 8 * steps), web)
        print("exam: " + "  ".join(f"{name} {mark:.3f}" for name, mark in marks.items()))
        failed = [name for name, mark in marks.items() if mark < PASSES[name.split()[0]]]
        if failed:
            print(f"exam: NOT PASSED in {', '.join(failed)}", flush=True)
        if not failed or done >= last:
            return marks, done


# ----------------------------------------------------------------------------------------- the exam

# The least share of right marks, by part of the exam.
PASSES = {"says": 0.995, "target": 0.995, "lists": 0.97, "relation": 0.95, "moved": 0.95,
          "compare": 0.95, "screen": 0.95, "marks": 0.95, "actions": 0.97, "steps": 0.8}


def exam(policy, seed, n=1024, web=False):
    """What the base has to know, on scenes that no lesson showed. -> {part: share}

    Probabilities at temperature 1, which tell more than samples: says PATTERN: of naming the
    pattern of a card that a crop shows; target 1, 2, 3: of pointing at the first, second and third
    candidate (its centre); lists: of listing all cards of a scene without a mistake; marks: of
    reading the mark of a card behind its colour and place.
    Shares of sampled traces of the mode `grounded`: relation, moved, screen: that point at what is
    asked about, and answer; compare: of their comparisons, those that are true and answered
    accordingly; actions: that are well-formed and say an action; steps: that do, and name a card
    that is shown, point at it, tell whether it is the goal's, and do what can be done there. The
    last two, and marks, are of the drawn site: where `web` is set."""
    marks = []                                               # (part, its probability, or 0 or 1)
    with torch.no_grad():
        for first in range(0, n, BATCH):
            block = range(first, min(first + BATCH, n))
            marks += examine_dialogues(policy, [random.Random(f"exam {seed} {i}") for i in block])
        for i in range(n // 8):
            lesson = lesson_list(policy, random.Random(f"exam list {seed} {i}"))
            marks.append(("lists", policy.log_probs([[lesson]]).sum().exp().item()))
            if web:
                rng = random.Random(f"exam marks {seed} {i}")
                found = policy.log_probs([[lesson_marks(policy, rng, places=False)]]).exp()
                marks += [("marks", p) for p in found.tolist()]
    asked = [ask("spatial", "exam", seed, i) for i in range(n // 2)]
    for task in ("gui", "web") if web else ("gui",):
        asked += [ask(task, "exam", seed, i) for i in range(n // 4)]
    questions = [Question(one.text, one.draw(), one.answer) for one in asked]
    grounded = Dialogue(mode="grounded", **DIALOGUE)
    seeds = [f"exam {seed} {i}" for i in range(len(asked))]
    groups = rollout(policy, questions, grounded, 1, seeds, turn_tokens=48)
    for one, (trace,) in zip(asked, groups, strict=True):
        marks += examine_answer(one, trace)
    by_part = defaultdict(list)
    for name, mark in marks:
        by_part[name].append(mark)
    names = ["lists", *(f"says {pattern}" for pattern in PATTERNS), "target 1", "target 2",
             "target 3", "relation", "moved", "compare", "screen"]
    names += ["marks", "actions", "steps"] if web else []
    return {name: sum(by_part[name]) / max(1, len(by_part[name])) for name in names}


def examine_dialogues(policy, rngs):
    """The marks of some dialogues that show all candidates, [(part of the exam, probability)]: of
    each place and each pattern, after what was right before it."""
    lessons, names, lengths = [], [], []
    for rng in rngs:
        scene = patterned(rng)
        drawing = scene.draw()
        text = f"{SHOW[0]} {scene.colour}{SHOW[1]}"
        lesson = Lesson(policy, "zoom", text, overview(drawing)).write("<think>", learned=False)
        for number, card in enumerate(scene.candidates, 1):
            spot = FRAME.to_input((card.x, card.y))
            lesson.write(f"{'' if number == 1 else ' '}Card {number} at (", learned=False)
            place = f"{format_point(spot)[1:]}."
            lesson.write(place)
            names.append(f"target {number}")
            lengths.append(len(policy.encode(place)))
            lesson.write(f"</think>\n{format_call(spot)}", learned=False)
            lesson.show_crop(drawing, (card.x, card.y))      # with a learned end token:
            lengths.append(1)
            names.append("end")
            lesson.write("<think>", learned=False)
            lesson.write(f"{card.pattern.capitalize()}.")
            names.append(f"says {card.pattern}")
            lengths.append(1)
        lessons.append([lesson])
    parts = policy.log_probs(lessons).split(lengths)
    return [(name, part.sum().exp().item()) for name, part in zip(names, parts, strict=True)]


def is_action(text):
    try:
        parse_action(text)
    except ValueError:
        return False
    return True


def examine_answer(asked, trace):
    """The marks of a trace of the mode `grounded`: whether it points at what is asked about, in
    order, and answers by a direction, right or wrong, or by a point on a candidate; whether a
    comparison in its thought is true, and the answer follows from it; whether a step on a
    site says an action, and one that can be done with the card that it names and points at."""
    scene = asked.scene
    turn = trace.turns[0]
    answer = turn.answer or ""
    points = [FRAME.to_original(point) for point in turn.points]
    if isinstance(asked, Step):
        said_well = is_action(answer) and not format_fault(trace)
        named = [card for card in scene.cards
                 if turn.thought.endswith(look_text(card, scene.colour))]
        doable = [action for card in named for action in (own_action(card), *ANYWHERE)]
        return [("actions", said_well), ("steps", said_well and answer in doable)]
    if not scene.named:
        points += [FRAME.to_original(point) for point in parse_points(answer)]
        hits = [any(card.contains(point) for card in scene.candidates) for point in points]
        return [("screen", hits == [True, True])]
    on_cards = [card.contains(point) for card, point in zip(scene.named, points, strict=False)]
    marks = [(asked.category, on_cards == [True, True] and answer in DIRECTIONS)]
    said = set(re.findall(r"\w+", turn.thought)) & set(DIRECTIONS)
    if said:
        marks.append(("compare", said == {asked.answer} == {answer}))
    return marks


# --------------------------------------------------------------------------------------- the script

def with_words(policy, words, folder):
    """The policy with these words as tokens, too, by way of a folder."""
    tokens = [AddedToken(word, normalized=False) for word in words]
    policy.tokenizer.add_tokens(tokens)
    policy.model.resize_token_embeddings(len(policy.tokenizer), mean_resizing=False)
    policy.save(folder)
    return load(folder)


def blend(policy, base):
    """Moves the weights a bit back to those of the base that it went on with: the mean of both
    knows the earlier lessons better than either."""
    old = load(base).model.state_dict()
    with torch.no_grad():
        for name, weight in policy.model.state_dict().items():
            weight[:len(old[name])].lerp_(old[name], KEPT)   # the base had fewer words


def make_base(folder, steps, seed, base="", dialogues=True):
    """Makes the base from random weights, or from another base, and writes it to a folder."""
    started = time.time()
    torch.manual_seed(seed)
    web = bool(base)
    words = strings(web)
    done = 0
    with TemporaryDirectory() as start:
        if base:
            policy = load(base)
            words = [word for word in words if len(policy.encode(word)) > 1]
            policy = with_words(policy, words, start)
            done = json.loads((Path(base) / "notes.json").read_text())["steps"]
        else:
            make_tiny(start, words)
            policy = load(start)
    marks, done = train(policy, steps, seed, words, done, dialogues, web)
    if base:
        blend(policy, base)
        marks = exam(policy, f"{seed}", min(1024, 8 * steps), web=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    notes = {"commit": commit.stdout.strip(), "seed": seed, "steps": done,
             "minutes": round((time.time() - started) / 60, 1),
             "exam": {name: round(mark, 4) for name, mark in marks.items()}}
    policy.save(folder, notes=notes, dialogue=DIALOGUE)
    print(json.dumps(notes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="of lessons before the exam [2500]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--base", default="",
                        help="folder of a base to go on with, and to teach the drawn site")
    parser.add_argument("--no-dialogues", action="store_true",
                        help="sees, lists, names and answers, but is shown no thought that points")
    parser.add_argument("--out", default=str(HERE / "base"), help="folder [base, beside this file]")
    args = parser.parse_args()
    torch.set_num_threads(1)                                 # the matrices are too small for more
    make_base(args.out, args.steps, args.seed, args.base, not args.no_dialogues)


if __name__ == "__main__":
    main()
