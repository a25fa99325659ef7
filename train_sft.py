"""Warm start: tree search for traces, linearising, supervised fine-tuning.

In:  a checkpoint and a file of questions; or, instead of the search, traces in the release's form.
Out: a run folder: args.json, search.jsonl (the chains that the search found), trees.txt (for
     people) and a checkpoint, sft/.

    python train_sft.py                                    (the tiny run of tests/tiny/recipe.json)
    python train_sft.py --model PATH --task FILE --teacher PATH
    python train_sft.py --model PATH --task FILE --traces FILE

Departures from the paper: in the mode `zoom` a step of the search is a turn with its real crop, so
that its value depends on what the crop shows (--search-mode grounded: the paper's way, single turns
that are converted); without --teacher the policy is its own.
"""
import argparse
import gc
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from evaluate import below, make_question, open_file, read_rows, read_sft, settle, usable
from model import (
    COORDINATES,
    Chunk,
    UserError,
    gather,
    gather_shares,
    is_sharded,
    load,
    rank,
    read_json,
    reading,
    shard_if_large,
    split_by_size,
    sum_gradients,
    sum_over_processes,
    world_size,
    write_text,
)
from reward import SAME_PLACE, is_correct, score
from rollout import (
    POINT,
    Trace,
    describe_settings,
    fingerprint,
    first_line,
    format_call,
    input_limits,
    make_dialogue,
    number,
    open_lock,
    parse,
    parse_points,
    parse_turn,
    read_image,
    run_script,
    run_traces,
    sampling_of,
    shared_flags,
    whole,
    writing,
)


def sft_flags(parser):
    """Adds the flags of the warm start, and those that all training has."""
    add = parser.add_argument_group("run, tree search and fine-tuning").add_argument
    switch = argparse.BooleanOptionalAction
    add("--out", default="runs/new", help="folder of the run")
    add("--resume", action=switch, default=False, help="go on with the run in --out")
    add("--micro-tokens", type=whole(1), default=16_384,
        help="in a forward and backward pass at most")
    add("--teacher", default="", help="checkpoint that searches, instead of --model")
    add("--traces", default="", help="file of traces in the release's form, instead of a search")
    add("--search-mode", choices=("zoom", "grounded"), default="zoom",
        help="with --mode zoom: search in turns with real crops, or in single turns")
    add("--search-questions", type=whole(1), default=128, help="training questions to search")
    add("--simulations", type=whole(1), default=8, help="of the tree search, a question")
    add("--chains", type=whole(1), help="traces kept a question at most (None: all)")
    add("--backtrack", action=switch, default=True, help="also traces that correct a wrong one")
    add("--sft-steps", type=whole(0),
        help="of fine-tuning, of 32 traces each (None: one epoch; 0: none)")
    add("--sft-lr", type=number(most=1e30), default=1e-6, help="peak learning rate of fine-tuning")


# ------------------------------------------------------------------------------- what training asks

def questions_of(args, split, n, first=0):
    """`n` questions of the task, from number `first` on, of the split "train" or "test". -> list

    With --eval-task, a flag of train_rl.py, it is the test, and all of --task trains. Otherwise a
    tenth is held out, by a hash of each row, so that other rows may come and go. The seed decides
    the order; after the last question of "train" it begins again, and what cannot be asked is left
    out (of "test", `evaluate` does so)."""
    other = vars(args).get("eval_task")
    if split == "test" and other:
        return open_file(other, args.image_root).part(n)
    held_out = split == "test"
    found = [question for question in open_file(args.task, args.image_root)
             if other or (int(question.key, 16) % 10 == 0) == held_out]
    found.sort(key=lambda question: random.Random(f"order {args.seed} {question.key}").random())
    if not found:
        raise UserError(f"{args.task}: too few questions to hold some of them out; give a larger "
                        "file, or one for the test as --eval-task")
    if held_out:
        return found[:n]
    wanted = [found[i % len(found)] for i in range(first, first + n)]
    questions = []
    for part in usable(wanted):
        for question in part:
            question.release()
        questions += part
    if not questions:
        raise UserError(f"{args.task}: none of {n} questions can be asked, see above")
    return questions


# ---------------------------------------------------------------------------------- (a) tree search

TREES = 64                # that a process searches at a time: their images' features are in memory
FORCED = "</think>\n<answer>"
IN_THOUGHT = r"(?:(?!</think>).)*?"
# What a step is, in the text of a single turn. What none of them matches runs to the turn's end.
STEPS = {
    "grounded": re.compile(f"{IN_THOUGHT}(?:{POINT.pattern})[.,;:!]*", re.S),
    "think": re.compile(rf"{IN_THOUGHT}[.!?](?=\s)", re.S),
    "direct": re.compile("(?!)"),
}


@dataclass(eq=False)
class Node:
    """A path of steps (paper: warm start), as text: a path is continued from what it says, however
    the tokens fell when it was sampled."""
    start: Trace                   # of the question, empty; prompt, crops and rng serve all nodes
    turns: tuple = ()              # texts of the path's whole turns
    partial: str = ""              # text of the turn that the path ends in
    parent: "Node | None" = None
    points: tuple = ()             # on the path, px of the model input
    depth: int = 0                 # number of its steps
    trace: Trace | None = None     # the complete trace, where the path has ended
    children: list = field(default_factory=list)
    # complete traces sampled from here; the one that it was cut from is its parent's
    rollouts: list = field(default_factory=list)
    visits: int = 0
    value: float = 0.0             # mean reward of all rollouts below

    def back_up(self, reward):
        node = self
        while node:
            node.visits += 1
            node.value += (reward - node.value) / node.visits
            node = node.parent

    def select(self, c):
        """The leaf that UCB1 leads to: value + c * sqrt(ln(N_parent + 1) / (N_child + 1))."""
        if not self.children:
            return self
        explore = math.log(self.visits + 1)
        best = max(self.children,
                   key=lambda child: child.value + c * math.sqrt(explore / (child.visits + 1)))
        return best.select(c)

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()


def search(policy, questions, dialogue, seeds, sampling, *, simulations=8, width=3, rollouts=2,
           depth=10, c=2.0):
    """Monte Carlo tree search for right traces of each question (paper: warm start).

    width: continuations that are sampled to expand a leaf. rollouts: from each new child, the one
    that it was cut from among them. depth: steps of a thought until its answer is asked for; turns
    are bounded by the dialogue. seeds: one a question, for all random numbers of its tree.
    -> the trees' roots"""
    roots = [Node(dialogue.start(policy, question, 1, seed)[0])
             for question, seed in zip(questions, seeds, strict=True)]
    started = time.monotonic()
    for simulation in range(simulations):
        # Select: in every tree the leaf that UCB1 leads to. One that has ended counts again.
        leaves = []
        for leaf in [root.select(c) for root in roots]:
            if leaf.trace:
                leaf.back_up(is_correct(leaf.trace))
            else:
                leaves.append(leaf)

        # Expand: the first steps of some continuations become the leaf's children. A step that
        # repeats a point is worth nothing; its trace stays a rollout of the leaf.
        complete(policy, dialogue, leaves, width, sampling)
        new = []
        for leaf in leaves:
            for trace in leaf.rollouts[-width:]:
                child = expand(leaf, trace, depth)
                if child:
                    child.back_up(is_correct(trace))
                else:
                    leaf.back_up(0)
            new += [child for child in leaf.children if not child.trace]

        # Simulate: more rollouts from each child. Back up: 1 for a right answer, 0 for a wrong one.
        complete(policy, dialogue, new, rollouts - 1, sampling)
        for child in new:
            for trace in child.rollouts:
                child.back_up(is_correct(trace))

        solved = sum(root.value > 0 for root in roots)
        print(f"search {simulation + 1}/{simulations}  {solved} of this process's {len(roots)} "
              f"trees have a right trace  {remaining(started, simulation + 1, simulations)}")
    return roots


def complete(policy, dialogue, nodes, count, sampling):
    """Samples `count` complete traces from each node's path, and adds them to its rollouts."""
    groups = []
    for node in nodes:
        # The path is said again to the real tool, and becomes a part of the prompt.
        path = replace(node.start, ids=[], sampled=[], log_probs=[], pictures=[], turns=[])
        for text in node.turns:
            path.add(whole_turn(policy, text))
            path.add(dialogue.on_turn(policy, path, truncated=False))
        partial = policy.encode(policy.clean(node.partial))
        prompt = Chunk(path.prompt.ids + path.ids + partial, path.prompt.pictures + path.pictures)
        group = []
        for _ in range(count):
            rng = random.Random(node.start.rng.getrandbits(64))      # the next number of the tree
            group.append(replace(path, prompt=prompt, ids=[], sampled=[], log_probs=[],
                                 pictures=[], turns=list(path.turns), turn_start=0,
                                 prefix=path.prefix + node.partial, rng=rng))
        groups.append(group)
    run_traces(policy, groups, dialogue, **sampling)
    for node, group in zip(nodes, groups, strict=True):
        node.rollouts += group


def whole_turn(policy, text):
    """The tokens of a turn of the policy's, with its end."""
    return Chunk(policy.encode(policy.clean(text)) + [policy.tokenizer.eos_token_id])


def expand(leaf, trace, depth):
    """The child of `leaf` that the first new step of a trace leads to: a new one, or the one of the
    same text; None where the step repeats a point of the path.

    In the mode `zoom` a step is a turn with its observation. In `grounded` it is a sentence up to
    its point, in `think` a sentence; the last one keeps the answer."""
    before = len(leaf.turns)
    turns = trace.turns[:before + 1]
    partial = ""
    points = [turn.call for turn in turns[before:] if turn.crop]
    if trace.mode != "zoom":
        step = STEPS[trace.mode].match(turns[0].text, len(leaf.partial))
        if step:
            turns, partial = [], step.string[:step.end()]
            points = parse_points(step[0])
    has_ended = len(turns) == len(trace.turns)
    if any(repeats(point, leaf.points) for point in points):
        return None
    if partial and leaf.depth + 1 >= depth:                  # too deep: it has to answer
        partial += FORCED
    texts = tuple(turn.text for turn in turns)
    for sibling in leaf.children:
        if (sibling.turns, sibling.partial) == (texts, partial):
            return sibling
    child = Node(leaf.start, texts, partial, leaf, (*leaf.points, *points), leaf.depth + 1)
    if has_ended:
        child.trace = trace
    leaf.children.append(child)
    return child


def repeats(point, others):
    """Whether a point is at the same place as one of the others."""
    return any(math.dist(point, other) < SAME_PLACE for other in others)


# ------------------------------------------------------------------------ (b) from trees to chains

BACKTRACK = "That was not it. "
SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def linearise(root, dialogue, backtrack=True):
    """The chains of a tree, lists of turns' texts, in the order of their lengths, none twice: of
    each node, every right rollout, and, where `backtrack` is set, every wrong one that a right one
    corrects (paper: warm start)."""
    chains = []
    for node in root.walk():
        right, wrong = [], []
        for trace in node.rollouts:
            refused = len(trace.zoom_points) < len(trace.turns) - 1
            if trace.ended != "answer" or refused:           # it is ill-formed
                continue
            if is_correct(trace):
                right.append(trace)
                chains.append([turn.text for turn in trace.turns])
            else:
                wrong.append(trace)
        if not backtrack:
            continue
        for bad, good in product(wrong, right):
            if dialogue.mode == "zoom":
                chains.append(join_turns(node, bad, good, dialogue.max_crops))
            else:
                chains.append(join_thoughts(node, bad, good))
    unique = dict.fromkeys(map(tuple, filter(None, chains)))
    return sorted(map(list, unique), key=lambda chain: len("".join(chain)))


def join_turns(node, bad, good, max_crops=4):
    """The zoom calls of a wrong trace, and those turns of a right one that show other places. What
    the wrong one said last, of its last crop, stays before the back-tracking sentence. [] where
    nothing wrong was shown, nothing new after it, or too much in all."""
    shared = len(node.turns)
    wrong = [turn.text for turn in bad.turns if turn.crop]
    new = [turn for turn in good.turns[shared:]
           if not (turn.crop and repeats(turn.call, bad.zoom_points))]
    calls = len(wrong) + len(new) - 1                        # the last turn answers
    if len(wrong) == shared or len(new) == 1 or calls > max_crops:
        return []
    # What the right one says before it points is of another crop.
    sentences = SENTENCE_GAP.split(new[0].thought)
    while len(sentences) > 1 and not parse_points(sentences[0]):
        sentences.pop(0)
    thought = f"{bad.turns[-1].thought} {BACKTRACK}{' '.join(sentences)}".strip()
    turning = f"<think>{thought}</think>\n{format_call(new[0].call)}"
    return [*wrong, turning, *(turn.text for turn in new[1:])]


def join_thoughts(node, bad, good):
    """The same in a single turn: the wrong trace's thought, the sentence, and what the right trace
    says after the node's path."""
    path = node.partial or "<think>"
    wrong, right = bad.turns[0].thought, good.turns[0].text
    rest = right.removeprefix(path).lstrip()
    thought, closed, _ = rest.partition("</think>")
    if not (wrong and thought and closed and right.startswith(path)):
        return []
    return [f"<think>{wrong} {BACKTRACK}{rest}"]


def to_multi_turn(text, max_crops=4, later=0.3, rng=random):
    """A single-turn chain as turns of the mode `zoom` (paper: multi-turn): a zoom call behind each
    sentence with a new point, at most `max_crops`. -> the turns' texts

    A sentence is never split: of several new points in it, the first is shown. What follows the
    last call is the last thought; where nothing does, it is "The answer is ...". With probability
    `later` the first two calls change places, so that going on after a miss is seen too. A chain
    without points or answer stays as it is."""
    turn = parse_turn(text)
    turns = []
    shown = []                                   # points
    thought = []                                 # sentences since the last call
    for sentence in SENTENCE_GAP.split(turn.thought):
        thought.append(sentence)
        new = [point for point in parse_points(sentence) if not repeats(point, shown)]
        if new and len(turns) < max_crops:
            turns.append(f"<think>{' '.join(thought)}</think>\n{format_call(new[0])}")
            shown.append(new[0])
            thought = []
    if not turns or not turn.answer:
        return [text]
    if rng.random() < later:
        turns[:2] = reversed(turns[:2])
    closing = " ".join(thought) or f"The answer is {turn.answer}."
    return [*turns, f"<think>{closing}</think>\n<answer> {turn.answer} </answer>"]


def describe_tree(node, above="", depth=0):
    """A tree as indented text, a node a line: visits, value, and the step that leads to it."""
    path = "".join(node.turns) + node.partial
    step = in_a_line(path[len(above):] or node.start.question.text)
    lines = [f"{'  ' * depth}{node.visits} visits, value {node.value:.2f}: {step}"]
    lines += [describe_tree(child, path, depth + 1) for child in node.children]
    return "\n".join(lines)


def in_a_line(text):
    """Turns' text without tags, and of a zoom call only its point."""
    text = re.sub(r'\{"name".*?(\[[^\]]*\])\}\}', r"zoom \1", text)
    return " ".join(re.sub(r"</?\w+>", " ", text).split())[:300]


# ------------------------------------------------------------ (c) chains on disk, and as traces

def messages_of(dialogue, question, texts):
    """A chain as chat messages, the release's form: "<image>" stands where images are."""
    asked = "<image>" * len(question.images) + dialogue.asked(question)
    messages = [{"role": "user", "content": asked}]
    if system := dialogue.system_prompts.get(dialogue.mode):
        messages.insert(0, {"role": "system", "content": dialogue.in_unit(system)})
    observation = f"{dialogue.before}<image>{dialogue.after_crop}"
    for text in texts:
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": observation})
    return messages[:-1]                         # nothing answers the last turn


def row_of_chain(dialogue, question, texts):
    """A line of search.jsonl. Its images are the question's: the tool makes the crops again."""
    truth = question.answer
    if question.kind == "point":
        truth = str(tuple(map(round, np.ravel(truth).tolist())))
    images = [str(image if str(image).startswith("data:") else Path(image).absolute())
              for image in question.images]
    return {"id": question.id, "key": question.key, "images": images, "gt_answer": truth,
            "messages": messages_of(dialogue, question, texts)}


def read_traces(path, questions=(), image_root=""):
    """The traces of a file, .jsonl or a .json list, in the release's form.
    -> [(Question, messages, crops)]

    The question is the one of `questions` that has the row's key, or is made from the row. crops:
    paths of the images behind the question's; none where the tool has to make them. image_root:
    where images are named from, the file's folder unless given. Raises UserError."""
    by_key = {question.key: question for question in questions}
    # those that the search wrote name their images from anywhere
    folder = Path("/") if questions else Path(image_root or Path(path).parent)
    traces = []
    for line, row in read_rows(Path(path)):
        where = f"{path}:{line}"
        try:
            messages = row["messages"]
            images = [below(folder, name) for name in row["images"]]
            talk = messages[1:] if messages[0]["role"] == "system" else messages
            roles = [message["role"] for message in talk]
            asked, *later = [message["content"].count("<image>") for message in talk[::2]]
            in_turns = roles == ["user", "assistant"] * (len(talk) // 2)
            in_words = all(type(message["content"]) is str for message in messages)
            known = asked and in_turns and in_words
            if not known or len(images) not in (asked, asked + sum(later)):
                raise ValueError("its roles are not user, assistant, ..., user, assistant, its "
                                 "contents no texts, or it has not one image for each <image>")
            question = by_key.get(row.get("key")) or make_question(read_sft, row, line, where)
            question.images = images[:asked]
            traces.append((question, messages, images[asked:]))
        except Exception as error:                     # a foreign file may hold anything
            raise UserError(f"{where}: no trace ({error!r}); it needs 'messages', 'images' and "
                            "'gt_answer'; correct or remove it") from None
    if not traces:
        raise UserError(f"{path}: holds no traces; give another file")
    return traces


def replay(policy, dialogue, question, messages, crops=(), starts=None):
    """Recorded messages as a Trace, as they are: exactly the assistant's tokens count as sampled,
    end tokens too. Without crops (paths), an observation shows what our tool does. starts:
    {question: its empty Trace}, so that its traces share image and crops. Raises UserError."""
    starts = {} if starts is None else starts
    if question not in starts:
        starts[question] = dialogue.start(policy, question, 1)[0]
    first = [message["role"] for message in messages].index("assistant")
    trace = replace(starts[question], ids=[], sampled=[], log_probs=[], pictures=[], turns=[])
    chat = [{**message, "content": parts_of(policy.clean(message["content"]))}
            for message in messages[:first]]
    trace.prompt = policy.prompt(chat, trace.prompt.pictures)
    recorded = iter(crops)
    for message in messages[first:]:
        text = policy.clean(message["content"])
        if message["role"] == "assistant":
            trace.add(whole_turn(policy, text), sampled=True)
            trace.turns.append(parse_turn(text))
            continue
        shown = []
        for _ in range(text.count("<image>")):
            turn = trace.turns[-1]
            # called in any case: it notes the box in the turn
            picture = dialogue.crop(policy, trace, turn) if turn.call else None
            if crops:
                picture = read_image(next(recorded), question.where)
            if picture is None:
                raise UserError(f"{question.where}: an <image> follows a turn without a zoom call; "
                                "give its image, or remove the row")
            shown.append(picture)
        trace.add(policy.reply(parts_of(text), shown))
    trace.ended = "stopped" if trace.answer is None else "answer"
    question.release()
    return trace


def parts_of(text):
    """Text with "<image>" where images are -> the content of a chat message, a list of parts."""
    pieces = filter(None, re.split("(<image>)", text))
    return [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
            for piece in pieces]


# ----------------------------------------------------------------------- (d) supervised fine-tuning

def fine_tune(policy, traces, *, steps=None, batch=32, lr, seed, micro_tokens=16_384):
    """Maximises the likelihood of the policy's own tokens, of `batch` traces a step (paper: SFT).
    steps None: one epoch. lr: the peak, after a warm-up over 3 % of the steps; then it falls to 0
    by a cosine."""
    steps = steps or math.ceil(len(traces) / batch)
    optimizer = make_optimizer(policy, lr)
    rng = random.Random(f"fine-tuning {seed}")
    order = []
    while len(order) < steps * batch:
        order += rng.sample(traces, len(traces))
    started = time.monotonic()
    norms = []
    policy.train()
    for step in range(steps):
        chosen, order = order[:batch], order[batch:]
        mine = [[trace] for trace in chosen[rank()::world_size()]]
        filler = [chosen[:1]] if is_sharded(policy) else None
        # One denominator for the whole update, whatever the micro-batches and the processes.
        tokens = sum(sum(trace.sampled) for trace in chosen)
        own_loss = 0.0
        for groups, weight in micro_batches(mine, micro_tokens, filler):
            loss = -policy.log_probs(groups).sum() / tokens * weight
            loss.backward()
            own_loss += loss.item()
        loss, = sum_over_processes([own_loss])
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        warm_up = min(1, (step + 1) / (0.03 * steps))
        norms.append(optimizer_step(policy, optimizer, lr * warm_up * cosine, clip=1.0))
        skipped = count_skipped(norms, "--sft-lr")
        if step % 20 == 19 or step + 1 == steps:
            print(f"sft {step + 1}/{steps}  loss {loss:.3f}  grad norm {norms[-1]:.2f}  skipped "
                  f"{skipped}  {remaining(started, step + 1, steps)}")
    policy.eval()


class MicroBatch(NamedTuple):
    """Groups of Sequences in one forward and backward pass, and the weight of its loss: 0.0 for a
    filler, by which sharded processes make the same number of passes."""
    groups: list
    weight: float = 1.0


def micro_batches(groups, tokens, filler=None):
    """Groups of Sequences -> MicroBatches of at most `tokens` tokens (one group at least), those of
    similar length together.

    filler: groups to make up the number with, where weights are sharded. All processes gather these
    together, so each gets as many micro-batches as the one that has most."""
    def size(group):
        responses = sum(len(sequence.ids) for sequence in group)
        return len(group[0].prompt.ids) + responses
    parts = split_by_size(sorted(groups, key=size), size, tokens)
    batches = [MicroBatch(part) for part in parts]
    if filler:
        missing = max(gather(len(batches))) - len(batches)
        batches += [MicroBatch(filler, 0.0)] * missing
    return batches


def remaining(started, done, total):
    """"12 s, 48 s left". started: of time.monotonic()"""
    spent = time.monotonic() - started
    return f"{spent:.0f} s, {spent / done * (total - done):.0f} s left"


# ----------------------------------------------------------------------------------- (e) optimizers

def make_optimizer(policy, lr):
    """AdamW with the paper's weight decay, for all but the vision tower."""
    kind = RoundedAdamW if policy.model.dtype == torch.bfloat16 else torch.optim.AdamW
    return kind(policy.trainable(), lr=lr, weight_decay=0.01)


def optimizer_step(policy, optimizer, lr, clip):
    """One step along the accumulated gradients, at this learning rate; then they are cleared. All
    processes have to call it: gradients are summed over them.
    -> their norm before it is clipped to `clip`. Where it is not finite, no step is made."""
    parameters = policy.trainable()
    sum_gradients(parameters)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, clip)).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


MOST_SKIPPED = 5            # steps in a row


def count_skipped(norms, flag):
    """How many steps were not made, of those with these gradient norms. Raises UserError where the
    last five were not: then the run is lost, and is better stopped."""
    skipped = [not math.isfinite(norm) for norm in norms]
    if skipped[-MOST_SKIPPED:] == [True] * MOST_SKIPPED:
        raise UserError(f"{MOST_SKIPPED} gradients in a row were not finite; start again with a "
                        f"lower {flag}")
    return sum(skipped)


def check_finite(parameters):
    """Raises UserError where a weight is not a finite number: nothing is learned from it, nor is it
    saved."""
    norm = full_tensor(torch.nn.utils.get_total_norm(parameters)).item()
    if not math.isfinite(norm):
        raise UserError("the weights are not finite, and are not saved; start again with a lower "
                        "learning rate, or with another --model or --teacher")


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights, with moments in float32.

    bfloat16 numbers near 0.02 are 1e-4 apart: a step of 1e-6 would always be rounded away. So what
    is written back is rounded up or down at random, right on average. The random numbers follow
    from step and parameter alone: a resumed run goes on as it would have."""

    def __init__(self, params, lr, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """closure: None, as torch's own functions for saved states give it."""
        group, = self.param_groups
        for index, p in enumerate(group["params"]):
            if p.grad is not None:
                self.update(p, index, group["lr"], group["weight_decay"])

    def update(self, p, index, lr, weight_decay, b1=0.9, b2=0.999):
        state = self.state[p]
        if not state:
            zeros = torch.zeros_like(p, dtype=torch.float32)
            state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
        state["step"] += 1
        t = state["step"]
        generator = torch.Generator(p.device).manual_seed(t * 100_003 + index)
        w, g, m, v = map(own_part, (p, p.grad.float(), state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(g, 1 - b1)
        v.lerp_(g.square(), 1 - b2)
        spread = (v / (1 - b2**t)).sqrt()
        direction = m / (1 - b1**t) / (spread + 1e-8)
        exact = w.float() * (1 - lr * weight_decay) - lr * direction
        w.copy_(rounded(exact, generator))

    def load_state_dict(self, state_dict):
        """torch's casts the moments to the type of the weights: they are taken again as saved."""
        super().load_state_dict(state_dict)
        (group,), (saved,) = self.param_groups, state_dict["param_groups"]
        for p, name in zip(group["params"], saved["params"], strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if key != "step":
                    self.state[p][key] = value.to(p.device)


def full_tensor(x):
    """A sharded tensor, gathered (all processes have to call it); anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x):
    """Of a sharded tensor, what this process has."""
    return x.to_local() if isinstance(x, DTensor) else x


def rounded(x, generator):
    """float32 -> bfloat16, to one of the two neighbours, the nearer one the more often: the mean
    is x."""
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 2**16, generator=generator)
    return ((bits + noise) & -2**16).view(torch.float32).bfloat16()


# ----------------------------------------------------------------------------------- (f) run folder

STAGES = ("search.jsonl", "sft", "log.jsonl", "state.pt", "rl")      # in the order of their making
CAN_CHANGE = ("out", "resume", "config", "n", "eval_task", "save_every", "micro_tokens")
CONTENTS = ("model", "teacher", "traces", "dialogue")    # paths where something else may lie later


def open_run(args, last):
    """Makes or takes up the run folder, and writes its args.json. -> the open file that locks it

    A folder belongs to one run at a time, and to its settings and files: others would give the
    result of neither. last: the stages that are only taken up with --resume. Raises UserError."""
    out = Path(args.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    lock = open_lock(out / "lock", "--out")
    made = [name for name in STAGES if (out / name).exists()]
    if not args.resume and set(made) & set(last):
        raise UserError(f"{out} holds a run already; give --resume to go on with it, or another "
                        "--out")
    keys = "".join(question.key for question in open_file(args.task, args.image_root))
    settings = vars(args) | {"sha1_of_questions": hashlib.sha1(keys.encode()).hexdigest()}
    for name in CONTENTS:
        if settings[name]:
            settings[f"sha1_of_{name}"] = fingerprint(settings[name])
    if "eval_task" in args:                 # without it, a part of --task is held out
        settings["all_of_task_trains"] = bool(args.eval_task)
    earlier = check_settings(out, settings) if made or args.resume else {}
    gather(None)                            # all have read what an earlier run left
    if rank() == 0:
        with writing(out / "args.json"):
            write_text(out / "args.json", json.dumps(earlier | settings, indent=1) + "\n")
    return lock


def check_settings(out, settings):
    """Raises UserError where the run in a folder was started with others than these.
    -> those it was started with"""
    path = out / "args.json"
    if not path.is_file():
        raise UserError(f"{out} holds nothing to resume: no args.json says what was made there; "
                        "leave out --resume, or give another --out")
    with reading_back(path):
        earlier = dict(**read_json(path))
    other = [f"{name} {earlier[name]}, not {value}" for name, value in settings.items()
             if name in earlier and name not in CAN_CHANGE and earlier[name] != value]
    if other:
        raise UserError(f"{out} was started with {'; '.join(other)}; give the same, or another "
                        "--out (its sft/ may be that one's --model, its search.jsonl --traces)")
    return earlier


@contextmanager
def reading_back(path):
    """The same for a file that the run wrote, and that may be damaged."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); repair or delete it, or give "
                        "another --out") from None


# ----------------------------------------------------------------------------------- (g) warm start

def load_trainable(path, args):
    """A checkpoint to be trained, sharded if it is large: all processes have to call it. On a GPU,
    activations are computed again in the backward pass instead of kept."""
    gc.collect()                # a policy that is not used any more: it refers to itself
    policy = load(str(path), **input_limits(args))
    if policy.device.type == "cuda":
        policy.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False})
    shard_if_large(policy)
    return policy


def grow_trees(args, questions, out):
    """Searches the questions, each process its share, and writes the chains that are kept to
    search.jsonl. Raises UserError where there are none."""
    teacher = load(args.teacher or args.model, **input_limits(args))
    with reading(args.model, "config.json"):
        learner = read_json(cached_file(args.model, "config.json"))["model_type"]
    if COORDINATES.get(learner) != teacher.coordinates:
        raise UserError(f"--teacher {args.teacher} points in other coordinates than --model "
                        f"{args.model}; give a teacher of the same family")
    print(f"traces: searching {len(questions)} questions with {args.teacher or args.model}")
    dialogue = make_dialogue(args, args.model, teacher)
    if args.mode == "zoom":
        dialogue.mode = args.search_mode
    mine = range(rank(), len(questions), world_size())
    found = []                  # (rows of search.jsonl, the tree in words), of this process's share
    for first in range(0, len(mine), TREES):
        block = mine[first:first + TREES]
        seeds = [f"search {args.seed} {i}" for i in block]
        roots = search(teacher, [questions[i] for i in block], dialogue, seeds, sampling_of(args),
                       simulations=args.simulations)
        for seed, root in zip(seeds, roots, strict=True):
            chains = linearise(root, dialogue, args.backtrack)
            most = min(args.chains or len(chains), len(chains))
            chains = random.Random(seed).sample(chains, most)
            rows = [row_of_chain(dialogue, root.start.question, chain) for chain in chains]
            taken = [f"\ntaken: {in_a_line(''.join(chain))}" for chain in chains]
            found.append((rows, describe_tree(root) + "".join(taken)))
    rows_of_trees, trees = zip(*gather_shares(found), strict=True)
    rows = sum(rows_of_trees, [])
    if not rows:
        raise UserError(f"{args.task}: the search found no right trace in {len(questions)} "
                        "questions; give a stronger --teacher or more --search-questions")
    if rank() == 0:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with writing(out / "search.jsonl"):
            write_text(out / "trees.txt", "\n\n".join(trees) + "\n")
            write_text(out / "search.jsonl", "".join(lines))
    gather(None)                # it is there


def learn_traces(args, out):
    """-> the policy, fine-tuned on right, well-formed and grounded traces: those of --traces, or of
    the run's search"""
    path, questions = Path(args.traces), []
    if not args.traces:
        path = out / "search.jsonl"
        questions = questions_of(args, "train", args.search_questions)
        if gather(path.is_file())[0]:
            print(f"{path} is there")
        else:
            grow_trees(args, questions, out)
    recorded = read_traces(path, questions, args.image_root)

    policy = load_trainable(args.model, args)
    dialogue = make_dialogue(args, args.model, policy)
    traces, dropped, starts = [], Counter(), {}
    for index, (question, messages, crops) in enumerate(recorded):
        texts = [message["content"] for message in messages if message["role"] == "assistant"]
        if dialogue.mode == "zoom" and len(texts) == 1:
            rng = random.Random(f"turns {args.seed} {index}")
            texts = to_multi_turn(texts[0], dialogue.max_crops, rng=rng)
            messages = messages_of(dialogue, question, texts)
        trace = replay(policy, dialogue, question, messages, crops, starts)
        scored = score(trace)
        if scored.correct and not scored.why:            # no fault of format, nor of grounding
            traces.append(trace)
        else:
            dropped[scored.why or "its answer is wrong"] += 1
    print(f"sft: {len(traces)} of {len(recorded)} traces are right, well-formed and grounded")
    for why, times in dropped.most_common(5):
        print(f"sft: {times} dropped: {why}")
    if not traces:
        raise UserError(f"{path}: none of its {len(recorded)} traces is right, well-formed and "
                        f"grounded in the mode {args.mode}; look at them, or give other --traces")
    fine_tune(policy, traces, steps=args.sft_steps, lr=args.sft_lr, seed=args.seed,
              micro_tokens=args.micro_tokens)
    return policy


def make_sft(args):
    """Makes the run's sft/, unless it is there: search, traces, fine-tuning. -> its path"""
    out = Path(args.out)
    sft = out / "sft"
    if gather(sft.is_dir())[0]:
        print(f"{sft} is there")
        return sft
    started = time.monotonic()
    policy = load_trainable(args.model, args) if args.sft_steps == 0 else learn_traces(args, out)
    minutes = (time.monotonic() - started) / 60
    save_checkpoint(policy, make_dialogue(args, args.model, policy), minutes, sft)
    return sft


def save_checkpoint(policy, dialogue, minutes, path):
    """Saves sft/ or rl/: all processes have to call it. Raises UserError where weights are not
    finite, or the disk is full."""
    check_finite(policy.trainable())
    with writing(path):
        policy.save(path, notes={"minutes": minutes}, dialogue=dialogue.to_json())
    gather(None)                # it is there


def warm_start(args):
    """The policy to train, the frozen one that the KL penalty is relative to (None where --kl is
    0), and their Dialogue. Makes the run's sft/ unless it is there."""
    sft = make_sft(args)
    policy = load_trainable(sft, args)
    reference = load_trainable(sft, args) if args.kl else None
    return policy, reference, make_dialogue(args, sft, policy)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared_flags(parser)
    sft_flags(parser)
    args = parse(parser, "rollout", "train_sft")
    settle(args, training=True)
    print(describe_settings(args))
    with open_run(args, last=["sft"]):
        print(f"done: {make_sft(args)}")


if __name__ == "__main__":
    run_script(main)
