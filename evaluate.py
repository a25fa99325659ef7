"""Benchmarks: where questions come from, and how well a policy does.

In:  a checkpoint and a task (a name, or a file of one of the real data sets), or one image and a question.
Out: accuracy with its interval, with and without the tool, the behaviours that the paper counts, pictures of traces.

    python evaluate.py --model runs/toy-search-zoom/rl --task toy-search
    python evaluate.py --model runs/toy-search-zoom/rl --image my.png --question "..." --save trace.png

The task `toy-search` is V*Bench's idea in miniature. Of 4 to 6 coloured cards, 1 to 3 have the colour that is asked about, and
exactly one of these bears a pattern. Which one it is, and which pattern, cannot be known from the image as the policy first sees
it: each pattern has a mean of zero over every block of 4x4 px, the cards' edges lie on block edges, and the policy sees the means
of the blocks. So it has to look at a candidate, see whether it is plain, and look at the next.
"""
import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import model as models
from model import UserError
from reward import distinct_crops, score
from rollout import MODES, Dialogue, Question, rollout, window

# ------------------------------------------------------------------------------------------------ toy-search: drawn scenes

BLOCK = 4                       # px of the drawing that become one px of what the policy sees
SIDE = 256                      # px, width and height of the drawing
CELL, CARD = 64, 40             # px: the cards lie in a 4x4 grid of cells, moved by one of JITTER in each direction
JITTER = (-12, 0, 12)           # px
COLOURS = {"red": (190, 50, 50), "green": (50, 170, 70), "blue": (60, 80, 200), "yellow": (200, 190, 50),
           "purple": (150, 50, 180), "cyan": (60, 180, 190)}
_row, _column = np.mgrid[:BLOCK, :BLOCK]
PATTERNS = {                    # added to a card's colour, times CONTRAST; each block sums to zero
    "plain": np.zeros((4, 4)),
    "horizontal": np.where(_row < 2, 1.0, -1.0),
    "vertical": np.where(_column < 2, 1.0, -1.0),
    "checked": np.where((_row < 2) == (_column < 2), 1.0, -1.0),
    "rising": np.where((_row + _column) % 4 < 2, 1.0, -1.0),
    "falling": np.where((_row - _column) % 4 < 2, 1.0, -1.0),
    "dotted": np.where((_row % 3 > 0) & (_column % 3 > 0), 1.5, -0.5),
}
CONTRAST = 36
ANSWERS = tuple(p for p in PATTERNS if p != "plain")
QUESTION = ("One", " card bears a pattern. Which?")     # the colour stands between


def _background():
    """Red rises to the right and green downwards, in steps of a block: position can be told from any patch."""
    ramp = np.round(np.linspace(-60, 60, SIDE // BLOCK)).repeat(BLOCK)
    image = np.full((SIDE, SIDE, 3), 127.0)
    image[..., 0] += ramp[None, :]
    image[..., 1] += ramp[:, None]
    return image.astype(np.uint8)


def _card(colour, pattern):
    tile = np.tile(PATTERNS[pattern], (CARD // BLOCK, CARD // BLOCK))[..., None]
    return (np.array(COLOURS[colour]) + CONTRAST * tile).astype(np.uint8)


BACKGROUND = _background()
CARDS = {(c, p): _card(c, p) for c in COLOURS for p in PATTERNS}


@dataclass(frozen=True)
class Card:
    colour: str
    pattern: str
    x: int           # centre, px of the drawing
    y: int


@dataclass(frozen=True)
class Scene:
    cards: tuple[Card, ...]
    colour: str      # the one asked about

    @property
    def candidates(self):
        """The cards of the colour asked about, in reading order of their cells."""
        return sorted((c for c in self.cards if c.colour == self.colour), key=lambda c: (c.y // CELL, c.x // CELL))

    def draw(self):
        image = BACKGROUND.copy()
        for card in self.cards:
            top, left = card.y - CARD // 2, card.x - CARD // 2
            image[top:top + CARD, left:left + CARD] = CARDS[card.colour, card.pattern]
        return Image.fromarray(image)

    def card_at(self, point):
        """The card under a point (px of the drawing), or None."""
        return next((c for c in self.cards if max(abs(point[0] - c.x), abs(point[1] - c.y)) <= CARD // 2), None)

    def shown(self, box):
        """The candidates of which the window shows at least 12x12 px, enough to read the pattern; the most central first."""
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        half = CARD // 2
        seen = [c for c in self.candidates if min(c.x + half, box[2]) - max(c.x - half, box[0]) >= 12
                and min(c.y + half, box[3]) - max(c.y - half, box[1]) >= 12]
        return sorted(seen, key=lambda c: max(abs(c.x - middle[0]), abs(c.y - middle[1])))


def place_cards(rng, faces):
    """(colour, pattern) pairs -> Cards in different cells of the grid."""
    cells = rng.sample(range(16), len(faces))
    return tuple(Card(c, p, cell % 4 * CELL + CELL // 2 + rng.choice(JITTER), cell // 4 * CELL + CELL // 2 + rng.choice(JITTER))
                 for (c, p), cell in zip(faces, cells))


def search_scene(rng, colour=None, candidates=None):
    """4 to 6 cards, 1, 2 or 3 of them candidates (in one, two and three cases of six), the first card the one that bears the pattern."""
    colour = colour or rng.choice(list(COLOURS))
    candidates = candidates or rng.choice((1, 2, 2, 3, 3, 3))
    others = [c for c in COLOURS if c != colour]
    faces = [(colour, rng.choice(ANSWERS))] + [(colour, "plain")] * (candidates - 1)
    faces += [(rng.choice(others), rng.choice(list(PATTERNS))) for _ in range(rng.randint(4, 6) - candidates)]
    return Scene(place_cards(rng, faces), colour)


def toy_search(split, seed, index):
    """Question number `index` of a split ("train", "validation", "test"); every (split, seed, index) has a stream of its own."""
    scene = search_scene(random.Random(f"toy-search {split} {seed} {index}"))
    return Question(f"{QUESTION[0]} {scene.colour}{QUESTION[1]}", [scene.draw], scene.cards[0].pattern, "string",
                    id=f"{split}-{seed}-{index}", category=str(len(scene.candidates)), scene=scene)


TOYS = {"toy-search": toy_search}


class DrawnQuestions:
    """The questions of a toy task, drawn when they are asked for."""

    def __init__(self, task, split, n, seed=0):
        self.draw, self.split, self.n, self.seed = TOYS[task], split, n, seed

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.draw(self.split, self.seed, index)


def blind_accuracy(questions, dialogue, looks, guesses=len(ANSWERS), seed=0):
    """What a player gets who looks at `looks` random places and knows the answer if it was shown, and else guesses."""
    rng, right = random.Random(seed), 0.0
    for question in questions:
        points = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(looks)]
        boxes = [window((SIDE, SIDE), point, dialogue.crop_half) for point in points]
        right += 1 if any(question.scene.cards[0] in question.scene.shown(box) for box in boxes) else 1 / guesses
    return right / len(questions)


# ------------------------------------------------------------------------------------------------ how well a policy does

@dataclass
class Report:
    """What an evaluation found. ci95: bounds of the accuracy's 95 % interval (Wilson). format: share of well-formed traces.
    on_target: share of points looked at or answered that lie on what was asked for (a candidate; the box). crops: looks a trace.
    looks_again: share of traces that looked at two or more places. by_category: accuracy, and how many questions."""
    n: int
    accuracy: float
    ci95: tuple[float, float]
    format: float
    on_target: float
    crops: float
    looks_again: float
    minutes: float
    by_category: dict


def interval(right, n, z=1.96):
    """Wilson's score interval of a share."""
    if not n:
        return 0.0, 1.0
    p, z2 = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)


def on_target(trace, point):
    """Whether a point (px as seen) lies on what the question is about; None where that is not known."""
    point = trace.frames[0].to_original(point)
    if trace.question.scene:
        card = trace.question.scene.card_at(point)
        return card is not None and card.colour == trace.question.scene.colour
    return None


def evaluate(policy, questions, dialogue, *, group=1, log=None, on_trace=None, **sampling):
    """Answers every question once. sampling: see `model.Engine`. log: called with a line now and then; on_trace: with each
    trace and its Score. -> Report"""
    started, traces, scores = time.time(), [], []
    for job in rollout(policy, questions, dialogue, group, **sampling):
        for trace in job:
            traces.append(trace)
            scores.append(score(trace))
            if on_trace:
                on_trace(trace, scores[-1])
        if log and len(traces) % 100 < group:
            spent = time.time() - started
            log(f"{len(traces)}/{len(questions) * group} questions, accuracy {mean(s.correct for s in scores):.3f}, "
                f"{spent / len(traces) * (len(questions) * group - len(traces)):.0f} s left")
    return report(traces, scores, (time.time() - started) / 60)


def report(traces, scores, minutes):
    categories = {}
    for trace, s in zip(traces, scores):
        categories.setdefault(trace.question.category, []).append(s.correct)
    hits = [on_target(t, p) for t in traces for p in t.crops]
    right = sum(s.correct for s in scores)
    return Report(len(traces), mean(s.correct for s in scores), interval(right, len(scores)), mean(s.format for s in scores),
                  mean(h for h in hits if h is not None), mean(s.crops for s in scores),
                  mean(distinct_crops(t.crops, 10) > 1 for t in traces), minutes,
                  {c: (mean(v), len(v)) for c, v in sorted(categories.items())})


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def table(rows):
    """Lists of cells -> aligned lines, the first column to the left and the others to the right."""
    rows = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows)


# ------------------------------------------------------------------------------------------------ pictures

def draw_trace(trace, width=768):
    """The image with every look and point in its order, and the close-ups in a row below. -> PIL image"""
    image = trace.question.load()[0]
    factor = width / image.width
    top = image.resize((width, round(image.height * factor)), Image.Resampling.LANCZOS)
    draw, crops = ImageDraw.Draw(top), []
    def mark(point, label, colour):
        x, y = (v * factor for v in trace.frames[0].to_original(point))
        draw.ellipse((x - 13, y - 13, x + 13, y + 13), fill=colour, outline="white", width=2)
        draw.text((x, y), label, fill="white", anchor="mm", font_size=16)
    last = None
    for number, turn in enumerate(trace.turns, 1):
        spots = [turn.call] if turn.call else turn.points
        for spot in spots:
            if last:
                a, b = ([v * factor for v in trace.frames[0].to_original(p)] for p in (last, spot))
                draw.line((*a, *b), fill="white", width=3)
            last = spot
        if turn.crop:
            draw.rectangle([v * factor for v in turn.crop], outline="white", width=3)
            crops.append((number, image.crop(turn.crop)))
    for number, turn in enumerate(trace.turns, 1):
        for i, spot in enumerate([turn.call] if turn.call else turn.points, 1):
            mark(spot, str(number) if turn.call else str(i), (200, 30, 30) if turn.call else (30, 90, 200))
    side = width // 4 - 8
    sheet = Image.new("RGB", (width, top.height + (side + 16 if crops else 0)), "white")
    sheet.paste(top)
    for i, (number, crop) in enumerate(crops[:4]):
        x, y = 8 + i * (side + 8), top.height + 8
        sheet.paste(crop.resize((side - 2, side - 2), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x + 6, y + 4), str(number), fill="white", font_size=20, stroke_width=2, stroke_fill="black")
    return sheet


# ------------------------------------------------------------------------------------------------ the command line

# What goes with a family of tasks, unless a flag says otherwise: the close-ups, the bounds of an answer, and of what is seen.
PRESETS = {
    "toy": dict(crop_half=32, crop_size=64, turn_tokens=48, response_tokens=288, cache_tokens=65_536),
}


def add_arguments(parser):
    """The flags that all three scripts share."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="checkpoint folder or hub id of the Qwen2.5-VL family")
    add("--task", default="toy-search", metavar="NAME|FILE", help=f"one of {', '.join(TOYS)} (%(default)s)")
    add("--mode", default="zoom", choices=MODES, help="how the policy answers (%(default)s)")
    add("--system-prompt", metavar="FILE", help="text to use instead of the mode's own system prompt")
    add("--seed", type=int, default=0, help="decides everything that is random (%(default)s)")
    add("--temperature", type=float, default=1.0, help="of sampling; 0: the likeliest token (%(default)s)")
    add("--crop-half", type=int, metavar="PX", help="half the side of a close-up, px of the original image (toy: 32)")
    add("--crop-size", type=int, metavar="PX", help="side of the close-up as shown (toy: 64)")
    add("--crop-dot", action="store_true", help="mark the point looked at with a red dot in the close-up")
    add("--max-crops", type=int, default=4, help="looks a trace; after that the answer is asked for (%(default)s)")
    add("--max-pixels", type=int, metavar="N", help="area that the policy sees of an image at most (the checkpoint's own)")
    add("--turn-tokens", type=int, metavar="N", help="tokens sampled a turn at most (toy: 48)")
    add("--response-tokens", type=int, metavar="N", help="tokens behind the question at most, close-ups included (toy: 288)")
    add("--cache-tokens", type=int, metavar="N", help="K/V columns of all roll-outs in flight: bounds their memory (toy: 65536)")


def finish_arguments(args):
    """Fills in what goes with the task where no flag was given."""
    if args.task not in TOYS:
        raise UserError(f"--task {args.task}: no such task; choose from {', '.join(TOYS)}")
    for name, value in PRESETS["toy"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("crop_half", "crop_size", "turn_tokens", "response_tokens", "cache_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.temperature < 0 or args.max_crops < 0:
        raise UserError("--temperature and --max-crops cannot be negative")
    return args


def dialogue_of(args, tool=True):
    prompt = None
    if args.system_prompt:
        try:
            prompt = Path(args.system_prompt).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--system-prompt {args.system_prompt}: cannot be read ({error})") from None
    return Dialogue(args.mode, args.crop_half, args.crop_size, args.crop_dot, args.max_crops, tool, prompt)


def sampling_of(args, seed, **more):
    """Arguments for `model.Engine`, with a random generator of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return dict(temperature=args.temperature, turn_tokens=args.turn_tokens, response_tokens=args.response_tokens,
                cache_tokens=args.cache_tokens, generator=torch.Generator(device).manual_seed(seed), **more)


def questions_of(args, split, n, first=0):
    """`n` questions of the task, from number `first` on."""
    return [TOYS[args.task](split, args.seed, index) for index in range(first, first + n)]


def run(main):
    """Runs a script's `main`: a UserError becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on a task, or ask it one question about one image.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add = parser.add_argument
    add("--n", type=int, default=512, help="questions (%(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that add up to this (%(default)s)")
    add("--no-tool", action="store_true", help="no looks: the answer is asked for at once")
    add("--json", metavar="FILE", help="write the figures to this file")
    add("--image", metavar="FILE", help="ask about this image")
    add("--question", metavar="TEXT", help="what to ask about --image")
    add("--save", metavar="FILE", help="with --image: draw the trace to this PNG file; else: of the first question")
    args = finish_arguments(parser.parse_args())
    if not args.model:
        raise UserError("--model PATH is needed: a checkpoint folder, such as runs/toy-search-zoom/rl, or a hub id")
    if bool(args.image) != bool(args.question):
        raise UserError("--image and --question go together")
    if args.n < 1 or not 0 < args.top_p <= 1:
        raise UserError("--n must be at least 1, and --top-p above 0 and at most 1")
    policy = models.load(args.model, max_pixels=args.max_pixels)
    dialogue, sampling = dialogue_of(args, not args.no_tool), sampling_of(args, args.seed, top_p=args.top_p)
    if args.image:
        question = Question(args.question, [args.image], "")
        trace = next(rollout(policy, [question], dialogue, 1, **sampling))[0]
        print(trace.text())
        print(f"-> {trace.answer or 'no answer'} ({trace.ended}; {len(trace.crops)} looks)")
        if args.save:
            draw_trace(trace).save(args.save)
        return
    first = []
    questions = DrawnQuestions(args.task, "test", args.n, args.seed)
    found = evaluate(policy, questions, dialogue, log=print, on_trace=lambda t, s: first or first.append(t), **sampling)
    print(first[0].text(), end="\n\n")
    low, high = found.ci95
    rows = [["", "accuracy", "95 %", "format", "on target", "looks", "looks again", "n"],
            [args.task, f"{found.accuracy:.3f}", f"{low:.3f}-{high:.3f}", f"{found.format:.3f}", f"{found.on_target:.3f}",
             f"{found.crops:.2f}", f"{found.looks_again:.3f}", found.n]]
    rows += [[f"  {c}", f"{accuracy:.3f}", "", "", "", "", "", n] for c, (accuracy, n) in found.by_category.items()]
    print(table(rows))
    if args.task == "toy-search":
        blind = [blind_accuracy(questions, dialogue, looks) for looks in (0, 1, 4)]
        print("a blind player, 0 / 1 / 4 looks at random places: " + " / ".join(f"{b:.3f}" for b in blind))
    if args.save:
        draw_trace(first[0]).save(args.save)
    if args.json:
        models.write_text(args.json, json.dumps(vars(found), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
