"""Warm start: tree search for traces, linearising, supervised fine-tuning; and the tiny base.

In:  a task, and a checkpoint to start from (by default the tiny base, made here).
Out: `search.jsonl` (the traces that the search found) and a checkpoint, `sft/`.

    python train_sft.py                                  # tiny base -> search -> fine-tuning
    python train_sft.py --model PATH --task FILE --teacher PATH
    python train_sft.py --model PATH --task FILE --traces FILE

Departures from the paper: in the mode `zoom` a step of the search is a turn with its real crop, so
that its value depends on what the crop shows; without --teacher the policy is its own; for a base
from nothing, pretraining (e) stands in for Qwen's.
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
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evaluate import configure, mean, questions_of, scored_by
from model import (
    Chunk,
    Policy,
    Sequence,
    UserError,
    average_gradients,
    full_tensor,
    gather,
    gather_shares,
    is_sharded,
    load,
    micro_batches,
    rank,
    read_config,
    shard_if_large,
    shard_like,
    sum_over_processes,
    world_size,
    write_text,
)
from reward import is_correct, score
from rollout import (
    ANSWERS,
    BLOCK,
    CELL,
    CLICK,
    CLICK_ALIKE,
    COLOURS,
    DIRECTIONS,
    FACES,
    IS_THE,
    JITTER,
    MOVED,
    NOTHING,
    PATTERNS,
    POINT,
    RELATION,
    SEARCH,
    SIDE,
    Dialogue,
    Frame,
    Question,
    Scene,
    Trace,
    ask_screen,
    ask_spatial,
    continue_traces,
    crop_box,
    describe_config,
    format_call,
    format_point,
    make_dialogue,
    parse_points,
    parse_turn,
    place_cards,
    read_image,
    rollout,
    run,
    search_scene,
    toy,
    windows_of,
    zoom,
)

# ---------------------------------------------------------------------------------- (a) tree search

TREES = 64                # that a process searches at a time: their images' features are in memory
MIN_DISTANCE = 10         # px between the points of a path, in x or in y
POINT_STEP = re.compile(f"(?:{POINT.pattern})[.,;:!]*")
SENTENCE_STEP = re.compile(r"[.!?](?=\s)")


@dataclass(eq=False)
class Node:
    """A path of steps (paper: warm start). trace: the tokens of the path."""
    trace: Trace
    parent: "Node | None" = None
    points: tuple = ()             # on the path, px of the model input
    depth: int = 0                 # number of its steps
    children: list = field(default_factory=list)
    rollouts: list = field(default_factory=list)    # complete traces sampled from here
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
           depth=10, c=2.0, log=print):
    """Monte Carlo tree search for right traces of each question (paper: warm start).

    width: continuations that are sampled to expand a leaf. rollouts: from each new child, the one
    that it was cut from among them. depth: steps until the answer is asked for. seeds: one a
    question, for all random numbers of its tree. -> the trees' roots"""
    roots = [Node(dialogue.start(policy, question, 1, seed)[0])
             for question, seed in zip(questions, seeds, strict=True)]
    started = time.time()
    for simulation in range(simulations):
        # Select: in every tree the leaf that UCB1 leads to; one that has ended counts again.
        leaves = [root.select(c) for root in roots]
        rewards = [(leaf, is_correct(leaf.trace)) for leaf in leaves if leaf.trace.ended]
        leaves = [leaf for leaf in leaves if not leaf.trace.ended]

        # Expand: the first steps of some continuations become the leaf's children.
        new = []
        for leaf, traces in continue_from(policy, dialogue, leaves, width, sampling):
            for trace in traces:
                child = expand(policy, leaf, trace, depth)
                rewards.append((child, is_correct(trace)) if child else (leaf, 0.0))
            new += [child for child in leaf.children if not child.trace.ended]

        # Simulate: more rollouts from each child.
        for child, traces in continue_from(policy, dialogue, new, rollouts - 1, sampling):
            rewards += [(child, is_correct(trace)) for trace in traces]

        # Back up: 1 for a right answer, 0 for a wrong one.
        for node, reward in rewards:
            node.back_up(reward)
        solved = sum(root.value > 0 for root in roots)
        log(f"search {simulation + 1}/{simulations}  {solved} of this process's {len(roots)} trees "
            f"have a right trace  {remaining(started, simulation + 1, simulations)}")
    return roots


def continue_from(policy, dialogue, nodes, count, sampling):
    """Samples `count` complete traces from each node's path, which is run once for them, and adds
    them to its rollouts. Yields (node, its new traces)."""
    groups = [[start_behind(node.trace) for _ in range(count)] for node in nodes]
    for _ in continue_traces(policy, groups, dialogue, **sampling):
        pass                                                     # the traces grow in place
    for node, group in zip(nodes, groups, strict=True):
        traces = [join_trace(node.trace, rest) for rest in group]
        node.rollouts += traces
        yield node, traces


def start_behind(prefix):
    """An empty trace that has the prefix as a part of its prompt, and random numbers of its own,
    seeded by the next number of the tree."""
    prompt = Chunk(prefix.prompt.ids + prefix.ids, prefix.prompt.pictures + prefix.pictures)
    rng = random.Random(prefix.rng.getrandbits(64))
    return replace(prefix, prompt=prompt, ids=[], sampled=[], log_probs=[], pictures=[], rng=rng,
                   turns=list(prefix.turns), turn_starts=[0])


def join_trace(prefix, rest):
    """The reverse, when that trace has been continued: one whose prompt is the question's."""
    starts = [len(prefix.ids) + start for start in rest.turn_starts[1:]]
    return replace(rest, prompt=prefix.prompt, ids=prefix.ids + rest.ids,
                   sampled=prefix.sampled + rest.sampled,
                   log_probs=prefix.log_probs + rest.log_probs,
                   pictures=prefix.pictures + rest.pictures,
                   turn_starts=prefix.turn_starts + starts, rng=prefix.rng)


def cut_trace(policy, trace, end):
    """The first `end` tokens of a trace (a step's end), to be continued."""
    if end >= len(trace.ids):
        return trace
    starts = [start for start in trace.turn_starts if start <= end]
    turns = trace.turns[:len(starts) - 1]
    crops = sum(turn.crop is not None for turn in turns)
    return replace(trace, ids=trace.ids[:end], sampled=trace.sampled[:end],
                   log_probs=trace.log_probs[:end], pictures=trace.pictures[:crops], turns=turns,
                   turn_starts=starts, prefix=policy.decode(trace.ids[starts[-1]:end]), ended="",
                   must_answer=False)


def first_step_end(policy, trace, begin):
    """Where the step of a complete trace ends that begins at token `begin`.

    In the mode `zoom` a step is a turn with its observation. In `grounded` it is a sentence with
    its point, in `think` a sentence, and the last one runs to the end."""
    if trace.mode == "zoom":
        return next((start for start in trace.turn_starts if start > begin), len(trace.ids))
    step = POINT_STEP if trace.mode == "grounded" else SENTENCE_STEP
    for end in range(begin + 1, len(trace.ids)):
        text = policy.decode(trace.ids[begin:end])
        if "</think>" in text:
            break
        match = step.search(text)
        if match and (match.end() < len(text) or text.endswith(").")):
            return end
    return len(trace.ids)


def expand(policy, leaf, trace, depth):
    """The child of `leaf` that the first new step of a trace leads to: a new one, or the one of the
    same tokens; None where the step repeats a point of the path."""
    start = len(leaf.trace.ids)
    step = cut_trace(policy, trace, first_step_end(policy, trace, start))
    points = []
    if trace.mode == "zoom":
        points = step.zoom_points[len(leaf.points):]
    elif not step.ended:
        points = parse_points(policy.decode(step.ids[start:]))
    if any(repeats(point, leaf.points) for point in points):
        return None
    for sibling in leaf.children:
        if sibling.trace.ids == step.ids:
            return sibling
    child = Node(step, leaf, leaf.points + tuple(points), leaf.depth + 1)
    if child.depth >= depth and not step.ended:              # too deep: it has to answer
        step.add(Chunk(policy.encode("</think>\n<answer>")))
        step.prefix += "</think>\n<answer>"
    leaf.children.append(child)
    return child


def repeats(point, others, distance=MIN_DISTANCE):
    """Whether a point is less than `distance` px from one of the others, in x and in y."""
    return any(max(abs(point[0] - x), abs(point[1] - y)) < distance for x, y in others)


# ------------------------------------------------------------ (b) from trees to traces, and on disk

BACKTRACK = "That was not it. "        # before a right rollout that follows a wrong one
SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def linearise(root, backtrack=True):
    """The chains of a tree, lists of turns' texts, the shortest first and none twice: of each node,
    every right rollout, and, where `backtrack` is set, every wrong one that a right one corrects
    (paper: warm start)."""
    join = join_turns if root.trace.mode == "zoom" else join_steps
    chains = []
    for node in root.walk():
        right = []
        wrong = []
        for trace in node.rollouts:
            if trace.ended == "answer":
                (right if is_correct(trace) else wrong).append(trace)
        for trace in right:
            chains.append([turn.text for turn in trace.turns])
        if backtrack:
            chains += [join(node, bad, good) for bad, good in product(wrong, right)]
    unique = dict.fromkeys(tuple(chain) for chain in chains if chain)
    return sorted(map(list, unique), key=lambda chain: sum(map(len, chain)))


def join_turns(node, bad, good):
    """The zoom calls of a wrong trace, a back-tracking sentence, and those turns of a right trace
    that show other places; [] where nothing wrong was shown, or nothing new after it."""
    shared = len(node.trace.turns)
    wrong = [turn.text for turn in bad.turns if turn.crop]
    new = [turn for turn in good.turns[shared:]
           if not (turn.crop and repeats(turn.call, bad.zoom_points))]
    if len(wrong) <= shared or not any(turn.crop for turn in new):
        return []
    right = [turn.text for turn in new]
    right[0] = right[0].replace("<think>", "<think>" + BACKTRACK, 1)
    return wrong + right


def join_steps(node, bad, good):
    """The same for a single turn: the wrong trace's thought, the sentence, and what the right trace
    says after the node's path."""
    path = node.trace.prefix or "<think>"
    wrong = bad.turns[0].thought
    right = good.turns[0].text
    if not wrong or not right.startswith(path):
        return []
    return [f"<think>{wrong} {BACKTRACK}{right.removeprefix(path).lstrip()}"]


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
        new = [point for point in parse_points(sentence) if not repeats(point, shown, 1)]
        if new and len(turns) < max_crops:
            turns.append(f"<think>{' '.join(thought)}</think>\n{format_call(new[0])}")
            shown.append(new[0])
            thought = []
    if not turns or not turn.answer:
        return [text]
    if rng.random() < later:
        turns[:2] = reversed(turns[:2])
    closing = " ".join(thought) or f"The answer is {turn.answer}."
    return [*turns, f"<think>{closing}</think>\n<answer>{turn.answer}</answer>"]


def replay(policy, dialogue, question, texts):
    """Turns' texts as a Trace, with the crops that the tool really gives. The tokens of the turns
    count as sampled, end tokens too."""
    trace = dialogue.start(policy, question, 1)[0]
    for text in texts:
        if trace.ended:
            break
        trace.add(Chunk(policy.encode(text) + [policy.tokenizer.eos_token_id]), sampled=True)
        if chunk := dialogue.on_turn(policy, trace, truncated=False):
            trace.add(chunk)
    return trace


@dataclass
class Recording:
    """A whole dialogue in the release's form. messages: chat messages in which "<image>" stands for
    each image; crops: paths of the images behind the question's, in their order."""
    messages: list
    crops: list


def replay_recording(policy, dialogue, question, recording):
    """A Recording as a Trace, as it is: text and crops are its own, and exactly the assistant's
    tokens count as sampled, end tokens too."""
    first = [message["role"] for message in recording.messages].index("assistant")
    chat = [{**message, "content": content_of(policy.clean(message["content"]))}
            for message in recording.messages[:first]]
    trace = dialogue.start(policy, question, 1)[0]
    trace.prompt = policy.prompt(chat, trace.prompt.pictures)
    frame = trace.frames[0]
    crops = iter(recording.crops)
    for message in recording.messages[first:]:
        text = policy.clean(message["content"])
        if message["role"] == "assistant":
            trace.add(Chunk(policy.encode(text) + [policy.tokenizer.eos_token_id]), sampled=True)
            trace.turns.append(parse_turn(text))
            continue
        images = [read_image(next(crops), question.where) for _ in range(text.count("<image>"))]
        trace.add(policy.reply(content_of(text), images))
        trace.turn_starts.append(len(trace.ids))
        turn = trace.turns[-1]
        if turn.call and images:                 # the box that our tool would have shown
            point = frame.to_original(turn.call)
            turn.crop = crop_box(frame.original_size, point, dialogue.crop_half)
    trace.ended = "stopped" if trace.answer is None else "answer"
    return trace


def content_of(text):
    """Text with "<image>" where images are -> the content of a chat message, a list of parts."""
    parts = []
    for piece in re.split("(<image>)", text):
        if piece == "<image>":
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


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
    """chains: [(question, turns' texts)] -> JSON lines that a person can read."""
    lines = ""
    for question, turns in chains:
        row = {"id": question.id, "question": question.text, "answer": question.answer,
               "turns": turns}
        lines += json.dumps(row, ensure_ascii=False, default=str) + "\n"
    write_text(path, lines)


def read_traces(path, questions, image_root=""):
    """The chains of a file, [(question, turns)]. Raises UserError.

    In a file that `write_traces` wrote, turns are texts, and the question is that of the same id.
    In one of the release's form, they are a Recording; images are looked for in `image_root` and
    beside the file."""
    try:
        text = Path(path).read_text()
        rows = json.loads(text) if text.startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    roots = [Path(image_root), Path(path).parent]
    by_id = {question.id: question for question in questions}
    chains = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        try:
            if isinstance(row, str):
                row = json.loads(row)
            if "messages" in row:
                chain = read_recording(row, roots, where)
            elif isinstance(row["turns"], list) and set(map(type, row["turns"])) == {str}:
                chain = by_id[row["id"]], row["turns"]
            else:
                raise ValueError("'turns' must be a list of texts")
            chains.append(chain)
        except Exception as error:                     # a foreign file may hold anything
            raise UserError(
                f"{where}: no trace of this task ({error!r}); it needs 'turns' and the 'id' of one "
                f"of the first {len(by_id)} training questions (--search-questions), or "
                "'messages', 'images' and 'gt_answer'; correct or remove it") from None
    if not chains:
        raise UserError(f"{path}: holds no traces")
    return chains


def read_recording(row, roots, where):
    """A row of the release -> (Question, Recording). Raises what a bad row raises."""
    images = row["images"]
    messages = row["messages"]
    talk = messages[1:] if messages[0]["role"] == "system" else messages
    places = [message["content"].count("<image>") for message in talk[::2]]
    roles = [message["role"] for message in talk]
    if roles != ["user", "assistant"] * (len(roles) // 2) or sum(places) != len(images):
        raise ValueError("the roles must be user, assistant, user, ..., assistant, and the user's "
                         "messages must have one <image> for each image")
    root = next((root for root in roots if (root / images[0]).exists()), roots[-1])
    images = [root / name for name in images]
    text = talk[0]["content"].replace("<image>", "").strip()
    question = Question(text, images[:places[0]], id=where, where=where,
                        **scored_by(text, row["gt_answer"]))
    return question, Recording(messages, images[places[0]:])


def export_traces(path, traces, dialogue):
    """Writes traces in the release's form, a JSON list, with their images in a folder beside it.

    Images are written as the policy saw them: points, and a box that is the answer, are in px of
    the files."""
    path = Path(path)
    folder = path.with_name(path.stem + "_images")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, trace in enumerate(traces):
        names = []
        for i, picture in enumerate(trace.prompt.pictures + trace.pictures):
            image = picture.image
            if i < len(trace.frames):
                image = image.resize(trace.frames[i].input_size)
            names.append(f"{folder.name}/{number}-{i}.png")
            image.save(path.parent / names[-1])
        rows.append({"messages": messages_of(trace, dialogue), "images": names,
                     "gt_answer": truth_of(trace)})
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def messages_of(trace, dialogue):
    """A trace as chat messages, "<image>" where images are."""
    question = trace.question
    asked = "<image>" * len(trace.frames) + question.text
    if dialogue.hints and question.hint:
        asked += "\n" + question.hint
    messages = [{"role": "user", "content": asked}]
    if system := dialogue.system_prompts.get(trace.mode):
        messages.insert(0, {"role": "system", "content": system})
    before = dialogue.before_dotted if dialogue.crop_dot else dialogue.before_crop
    observation = {"role": "user", "content": f"{before}<image>{dialogue.after_crop}"}
    for turn in trace.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.crop:
            messages.append(observation)
    return messages


def truth_of(trace):
    """The right answer as text; of a region, its corners in px of the model input."""
    truth = trace.question.answer
    if trace.question.kind != "point":
        return truth
    numbers = []
    for corner in np.reshape(truth, (-1, 2)):                # of a box or a polygon
        numbers += map(round, trace.frames[0].to_input(corner))
    return str(tuple(numbers))


# ----------------------------------------------------------------------- (c) supervised fine-tuning

def fine_tune(policy, traces, optimizers, *, steps, batch, seed, micro_tokens=16_384, log=print,
              **decay):
    """Maximises the likelihood of the policy's own tokens, of `batch` traces a step. decay: options
    of `learning_rate`."""
    rng = random.Random(f"fine-tuning {seed}")
    order = []
    while len(order) < steps * batch:
        order += rng.sample(traces, len(traces))
    started = time.time()
    policy.model.train()
    for step in range(steps):
        chosen = order[step * batch:(step + 1) * batch]
        tokens = sum(sum(trace.sampled) for trace in chosen)
        mine = [[trace] for trace in chosen[rank()::world_size()]]
        spare = [chosen[:1]] if is_sharded(policy) else None
        own_loss = 0.0
        for micro, weight in micro_batches(mine, micro_tokens, spare):
            loss = -policy.log_probs(micro).sum() / tokens * weight
            (loss * world_size()).backward()         # gradients are averaged over processes
            own_loss += loss.item()
        loss, = sum_over_processes([own_loss])
        factor = learning_rate(step, steps, steps * 0.03, **decay)
        norm = optimizer_step(policy.trainable(), optimizers, factor)
        if step % 20 == 19 or step + 1 == steps:
            log(f"sft {step + 1}/{steps}  loss {loss:.3f}  grad norm {norm:.2f}  "
                f"{remaining(started, step + 1, steps)}")
    policy.model.eval()


def usable(traces, log):
    """The traces to fine-tune on: right, well-formed and grounded by our own reward."""
    kept = []
    dropped = Counter()
    for trace in traces:
        if fault := fault_of(score(trace)):
            dropped[fault] += 1
        else:
            kept.append(trace)
    several = sum(len(trace.zoom_points) > 1 for trace in kept)
    log(f"sft: {len(kept)} of {len(traces)} traces are right, well-formed and grounded, {several} "
        f"of them with several zoom calls; dropped: {dict(dropped) or 'none'}")
    return kept


def fault_of(scored):
    """Why a trace with this Score is not learned from, or ""."""
    if not scored.correct:
        return "wrong"
    if not scored.format:
        return "ill-formed"
    return "" if scored.grounded else "not grounded"


# ------------------------------------------------------------------------------- (d) the tiny model

SEEN = 64                 # px, side of the tiny base's input, of drawings and of crops
TINY_PROMPTS = {"direct": "Answer.", "think": "Think.", "grounded": "Point.", "zoom": "Zoom."}
TINY = Dialogue(system_prompts=TINY_PROMPTS)
SHOW = ("Show each", " card.")         # in lessons: an instruction to show all of a colour
LIST = "List the cards."
COMPARE = "Compare the cards."
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_strings():
    """What the tiny tokenizer has as single tokens: the fixed strings of the grammar, and the words
    of the synthetic questions."""
    before, after = format_call((0, 0)).split("[0, 0]")
    tags = [f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call", "observation")
            for slash in ("", "/")]
    grammar = [TINY.before_crop, TINY.after_crop, f"</think>\n{before}[", f"]{after}",
               "</think>\n<answer>", "system\n", "user\n", "assistant\n"]
    questions = [*SHOW, *SEARCH, IS_THE, *RELATION.values(), *MOVED.values(), " card?"]
    questions += dict.fromkeys(CLICK + CLICK_ALIKE + DIRECTIONS)
    words = [*TINY_PROMPTS.values(), *questions, LIST, COMPARE, " Card ", "Card ",
             " at (", ", ", ").", " None.", "Nothing.", ":", BACKTRACK]
    colours = [f" {colour}" for colour in COLOURS]
    patterns = [f"{pattern.capitalize()}." for pattern in PATTERNS]
    return tags + grammar + words + colours + list(PATTERNS) + patterns


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


# --------------------------------------------------------------------- (e) its lessons and its exam

TOWER_STEPS = 600                      # of the vision tower at most, of 32 images each
TOWER_RATES = (0.02, 5e-3)             # peak learning rates: of Muon, of AdamW
LANGUAGE_RATES = (0.01, 5e-3)
BATCH = 16                             # lessons a step
GO_ON = 0.2                            # probability that a dialogue goes on, whatever a crop showed
INSTRUCTED = 0.6                       # share of dialogues that show all cards of a colour
ASTRAY = 0.08                          # share of zoom calls to any place
GUESSES = 0.05                         # share of the other dialogues that answer at once, blindly
KNOWS = 0.4                            # share of questions on directions with a right answer
AT_ONCE = 0.3                          # share of those on screens that answer without a zoom call
IN_WINDOWS = 0.3                       # share of the tower's drawings that have windows
# The least share of right marks, by part of the exam.
PASSES = {"says": 0.98, "target": 0.98, "relation": 0.9, "moved": 0.9, "compare": 0.9,
          "screen": 0.9, "lists": 0.7}

TILE = 16                              # px of the model input that a token of the image stands for
FRAME = Frame((SEEN, SEEN), (SIDE, SIDE))
PLACES = [cell * CELL + CELL // 2 + shift for cell in range(SIDE // CELL) for shift in JITTER]

# What a token of the vision tower tells: colour or that there is no card, pattern, place of the
# card in x and in y (one of PLACES, px), and which card of its colour it is, in reading order.
CLASSES = (len(COLOURS) + 1, len(PATTERNS), len(PLACES), len(PLACES), 3)
UNASKED = -1
NO_CARD = (len(COLOURS), UNASKED, UNASKED, UNASKED, UNASKED)
NOT_ASKED = (UNASKED,) * 5


def face_truth(colour, pattern):
    """Of a token that a card fills."""
    return (list(COLOURS).index(colour), list(PATTERNS).index(pattern), UNASKED, UNASKED, UNASKED)


def overview(draw):
    """A drawing as the tiny base sees it: the means of its blocks, as by the box filter of its
    image processor."""
    return draw().reduce(SIDE // SEEN)


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


def patterned(rng, colour=None, candidates=None):
    """A scene as toy-search has, but any candidate may bear a pattern, or all, or none."""
    scene = search_scene(rng, colour, candidates)
    new = {}
    for card in scene.candidates:
        new[card] = replace(card, pattern=rng.choice(("plain", "plain", *ANSWERS)))
    return replace(scene, cards=tuple(new.get(card, card) for card in scene.cards))


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
    seen = []
    truths = []
    for card in scene.cells():
        if card is None:
            truths.append(NO_CARD)
            continue
        colour = list(COLOURS).index(card.colour)
        place = PLACES.index(card.x), PLACES.index(card.y)
        truths.append((colour, UNASKED, *place, seen.count(colour)))
        seen.append(colour)
    return overview(scene.draw), truths


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
            cards = {scene.card_at(corner) for corner in corners}
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
    directions, axes = directions.split([sum(CLASSES), 2])
    cells = torch.arange(len(PLACES)) // len(JITTER) / 1.5 - 1                   # from -1 to 1
    for axis, places in zip(axes, directions.split(CLASSES)[2:4], strict=True):
        places += cells[:, None] * axis
    return directions, axes


def align_words(policy, directions, axes):
    """Adds to the embeddings of words the directions of what they name. So what an image shows is
    found by its word, and named by it, before there was a lesson (CLIP's idea)."""
    colours, patterns, *_ = directions.split(CLASSES)
    rows = {f" {colour}": row for colour, row in zip(COLOURS, colours, strict=False)}
    for pattern, row in zip(PATTERNS, patterns, strict=True):
        rows |= {pattern: row, f"{pattern.capitalize()}.": row}
    rows |= {"Nothing.": colours[-1], "left": -axes[0], "right": axes[0], "above": -axes[1],
             "below": axes[1]}
    with torch.no_grad():
        for word, row in rows.items():
            token, = policy.encode(word)
            policy.model.model.language_model.embed_tokens.weight[token] += row


def train_tower(policy, seed, directions, *, steps, log=print):
    """Teaches the vision tower alone.

    Its tokens tell their CLASSES along fixed directions: what is told fills the token. (With linear
    heads that learn it can hide in a small part of the token, where the language model does not
    find it.)"""
    hidden = policy.text_config.hidden_size
    tower = list(policy.model.model.visual.parameters())
    optimizers = make_optimizers(policy, "muon", *TOWER_RATES, parameters=tower, newton_schulz=3)
    policy.train_vision = True
    started = time.time()
    for step in range(steps):
        kinds = [tile_truths] * 8 + [crop_truths] * 8 + [cell_truths] * 16
        if step >= steps // 4:                               # what is left to learn is to count
            kinds = [tile_truths] * 2 + [crop_truths] * 4 + [cell_truths] * 26
        pictures = []
        truths = []
        for i in range(rank(), len(kinds), world_size()):
            image, truth = kinds[i](random.Random(f"tower {seed} {step} {i}"))
            pictures.append(policy.picture(image))
            truths += truth
        tokens = F.normalize(torch.cat(policy.features(pictures)), dim=-1) * hidden**0.5
        logits = (tokens @ directions.T).split(CLASSES, -1)  # (images * 16, classes) each
        targets = torch.tensor(truths).T                     # (parts, images * 16)
        asked = sum_over_processes((targets != UNASKED).sum(1).tolist())
        loss = torch.zeros(())
        for x, target, n in zip(logits, targets, asked, strict=True):
            summed = F.cross_entropy(x, target, ignore_index=UNASKED, reduction="sum")
            loss = loss + summed / max(1, n)
        (loss * world_size()).backward()                     # gradients are averaged over processes
        optimizer_step(tower, optimizers, learning_rate(step, steps, 20, 0.05))
        if step % 50 == 49:
            total, = sum_over_processes([loss.item()])
            log(f"vision tower {step + 1}/{steps}  loss {total:.3f}  "
                f"{remaining(started, step + 1, steps)}")
    policy.train_vision = False


class Lesson(Sequence):
    """A pretraining sequence as it is written: text that is learned, text that is only read, and
    images."""

    def __init__(self, policy, mode, user, *images):
        content = content_of("<image>" * len(images) + user)
        super().__init__(policy.prompt([{"role": "system", "content": TINY_PROMPTS[mode]},
                                        {"role": "user", "content": content}], images))
        self.policy = policy

    def write(self, text, learned=True):
        return self.add(Chunk(self.policy.encode(text)), sampled=learned)

    def end_turn(self):
        return self.write(self.policy.tokenizer.eos_token)

    def show(self, text, image):
        """Ends the turn; the next one answers a user turn."""
        self.end_turn().add(self.policy.reply(content_of(text), [image]))


def card_text(number, point=None):
    return f"Card {number} at {format_point(point)}." if point else f"Card {number}."


def lesson_list(policy, rng, share=1.0):
    """Locate: list the cards of every colour, in reading order, and say where there is none (or no
    more)."""
    scene = mixed_scene(rng, **list_kind(share))
    lesson = Lesson(policy, "grounded", LIST, overview(scene.draw))
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
    """Compare: where are two cards, where does the first lie, seen from the second, and what does
    that answer? Four pairs of an overview."""
    scene = mixed_scene(rng, most=6, copies=(1,))
    lesson = Lesson(policy, "grounded", COMPARE, overview(scene.draw))
    for pair in rng.sample(list(permutations(scene.cards, 2)), 4):
        lesson.write("".join(f" {card.colour}" for card in pair) + ":", learned=False)
        for number, card in enumerate(pair, 1):
            lesson.write(" " + card_text(number, FRAME.to_input((card.x, card.y))))
        directions = pair[0].directions_from(pair[1])
        lesson.write("".join(f" {name}" for name in directions) + ".")
        answer = rng.choice(directions)
        axis = next(axis for axis in RELATION if answer in axis)
        lesson.write(rng.choice((RELATION, MOVED))[axis], learned=False)
        lesson.write(f"<answer>{answer}</answer>")
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
            lesson.show("<image>" + user, crop)
        else:
            lesson = Lesson(policy, "direct", user, crop)
        lesson.write(f"<answer>{card.pattern}</answer>")
    return lesson.end_turn()


def lesson_answer(policy, rng, share=1.0):
    """The modes of one turn: names what is asked about, with or without its place, or nothing; then
    answers. In a share KNOWS of the lessons the thought says how the two cards lie, and the answer
    follows from it; else it is a guess. Of a screen it points at the first of the candidates,
    whichever is asked for."""
    mode = rng.choice(("direct", "think", "grounded"))
    question = rng.choice((ask_spatial, ask_spatial, ask_screen))(rng)
    scene = question.scene
    cards = scene.named or scene.candidates[:1]
    places = [FRAME.to_input((card.x, card.y)) for card in cards]
    thoughts = [card_text(number, place if mode == "grounded" else None)
                for number, place in enumerate(places, 1)]
    if not scene.named:
        answer = format_point(places[0])
    elif rng.random() < KNOWS:
        answer = question.answer
        thoughts.append(" ".join(scene.directions()) + ".")
    else:
        answer = rng.choice(next(axis for axis in RELATION if question.answer in axis))
    lesson = Lesson(policy, mode, question.text, *(overview(image) for image in question.images))
    if mode != "direct":
        lesson.write(f"<think>{' '.join(thoughts)}</think>\n")
    return lesson.write(f"<answer>{answer}</answer>").end_turn()


def lesson_dialogue(policy, rng, share=1.0, screens=True):
    """The dialogue of the mode `zoom`, with decisions that are not sensible.

    After each crop, whatever it showed, it goes on to the next candidate (or back to the one that
    it missed) with probability GO_ON, and otherwise answers, if need be with any pattern. So the
    base learns the grammar, where cards are and what a crop shows, but not when to go on. Where a
    zoom call goes astray its point is not learned: the base learns to say that nothing is there."""
    others = 1 - INSTRUCTED
    weights = (INSTRUCTED, others / 2, others / 2) if screens else (INSTRUCTED, others, 0)
    kind = rng.choices((SHOW, SEARCH, CLICK), weights)[0]
    if kind is CLICK:
        question = ask_screen(rng)
        scene, text = question.scene, question.text
    else:
        scene = patterned(rng, candidates=rng.choice((1, 2, 3, 3)))
        text = f"{kind[0]} {scene.colour}{kind[1]}"
    drawing = scene.draw()
    candidates = scene.candidates
    lesson = Lesson(policy, "zoom", text, overview(scene.draw))
    anything = rng.choice(ANSWERS)
    if kind is CLICK:
        anything = format_point(FRAME.to_input((candidates[0].x, candidates[0].y)))
    if kind is not SHOW and rng.random() < GUESSES:
        lesson.write(TINY.forced_answer, learned=False)
        return lesson.write(f"{anything}</answer>").end_turn()
    if kind is CLICK and rng.random() < AT_ONCE:
        thought = f"Card 1 at {anything}."
        return lesson.write(f"<think>{thought}</think>\n<answer>{anything}</answer>").end_turn()
    number = 0
    thought = ""
    for turn in range(4):
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
        lesson.show(f"{TINY.before_crop}<image>{TINY.after_crop}",
                    zoom(drawing, point, SEEN // 2, SEEN))
        face = scene.face_in(crop_box(drawing.size, point, SEEN // 2))
        thought = f"{face.capitalize()}. "
        more = face == NOTHING or number + 1 < len(candidates)
        if turn == 3 or not more or not (kind is SHOW or rng.random() < GO_ON):
            break
        if face != NOTHING:
            number += 1
    answer = anything
    if kind is CLICK and face != NOTHING:
        answer = format_point(spot)
    elif face in ANSWERS:
        answer = face
    lesson.write(f"<think>{thought.strip()}</think>\n<answer>{answer}</answer>")
    return lesson.end_turn()


def shifted(point, rng):
    """A point some px beside, in either direction or not, inside the drawing."""
    moved = [value + rng.choice((0, rng.randint(-16, 16))) for value in point]
    return [min(max(value, 0), SIDE - 1) for value in moved]


def lesson_mix(share, all_tasks):
    """The lessons of a step at `share` of pretraining: lists first, then ever more dialogues."""
    if share < 0.2:
        return [lesson_read] + [lesson_list] * (BATCH - 1)
    dialogues = 4 if share < 0.45 else 8 if all_tasks else 11
    kinds = [lesson_read] + [partial(lesson_dialogue, screens=all_tasks)] * dialogues
    if all_tasks:
        kinds += [lesson_answer] * 2 + [lesson_compare] * 3
    return kinds + [lesson_list] * (BATCH - len(kinds))


def pretrain(policy, steps, seed, all_tasks, log=print):
    """Teaches the tiny base to see and to speak: the vision tower first, then, with the tower
    frozen, the language model. all_tasks: what toy-spatial and toy-gui need, too.
    -> the marks of the last exam

    After `steps` steps, when the learning rate has decayed, come the exponential moving average of
    the weights (over a sixteenth of the steps), and an exam. A base that fails it goes on for a
    quarter of the steps, from a lower learning rate, and tries again; twice `steps` is the bound. A
    base of few steps has a tower of as few, and a short exam."""
    for layer in policy.model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)    # at first a layer adds nothing to
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)       # what the tower tells
    directions, axes = tower_directions(seed, policy.text_config.hidden_size)
    train_tower(policy, seed, directions, steps=min(TOWER_STEPS, steps), log=log)
    align_words(policy, directions, axes)
    optimizers = make_optimizers(policy, "muon", *LANGUAGE_RATES, newton_schulz=3)
    weights = policy.trainable()
    averages = [weight.detach().clone() for weight in weights]
    average = get_ema_multi_avg_fn(max(0, 1 - 16 / steps))
    started, done, length, peak = time.time(), 0, steps, 1.0
    while True:
        policy.model.train()
        for step in range(done, done + length):
            factor = peak * learning_rate(step - done, length, 30, 0.03)
            kinds = lesson_mix(step / steps, all_tasks)
            loss = learn_lessons(policy, optimizers, kinds, step, steps, seed, factor)
            average(averages, weights, step)
            if step % 50 == 49 or step + 1 == done + length:
                loss, = sum_over_processes([loss])
                left = remaining(started, step + 1, done + length)
                log(f"pretraining {step + 1}/{done + length}  loss {loss:.3f}  {left}")
        with torch.no_grad():
            for weight, averaged in zip(weights, averages, strict=True):
                weight.copy_(averaged)
        policy.model.eval()
        done, length, peak = done + length, max(1, steps // 4), 0.4
        marks = exam(policy, seed, all_tasks, n=min(1024, 8 * steps))
        log("exam: " + "  ".join(f"{name} {mark:.3f}" for name, mark in marks.items()))
        failed = [name for name, mark in marks.items() if mark < PASSES[name.split()[0]]]
        if failed:
            more = ", more lessons" if done < 2 * steps else ""
            log(f"exam: NOT PASSED in {', '.join(failed)}{more}")
        if not failed or done >= 2 * steps:
            return marks


def learn_lessons(policy, optimizers, kinds, step, steps, seed, factor):
    """One pretraining step, each process with its share of the lessons, which are of these kinds.
    -> this share's part of the loss"""
    lessons = []
    for i in range(rank(), len(kinds), world_size()):
        rng = random.Random(f"lesson {seed} {step} {i}")
        lessons.append(kinds[i](policy, rng, step / steps))
    tokens, = sum_over_processes([sum(sum(lesson.sampled) for lesson in lessons)])
    loss = -policy.log_probs([[lesson] for lesson in lessons]).sum() / tokens
    (loss * world_size()).backward()                         # gradients are averaged over processes
    optimizer_step(policy.trainable(), optimizers, factor)
    return loss.item()


def exam(policy, seed, all_tasks, n=1024):
    """What the base has to know, on scenes that no lesson showed. -> {part: share}

    Probabilities at temperature 1, which tell more than samples: says PATTERN: of naming the
    pattern of a card that a crop shows; target 1, 2, 3: of pointing at the first, second and third
    candidate (its centre); lists: of listing all cards of a scene without a mistake.
    With all_tasks also shares of sampled traces of the mode `grounded`: relation, moved, screen:
    that point at what is asked about, and answer; compare: of their comparisons, those that are
    true and answered accordingly."""
    marks = []                                               # (part, its probability, or 0 or 1)
    for first in range(rank() * BATCH, n, world_size() * BATCH):
        block = range(first, min(first + BATCH, n))
        marks += examine_dialogues(policy, [random.Random(f"exam {seed} {i}") for i in block])
    for i in range(rank(), n // 8, world_size()):
        lesson = lesson_list(policy, random.Random(f"exam list {seed} {i}"))
        with torch.no_grad():
            marks.append(("lists", policy.log_probs([[lesson]]).sum().exp().item()))
    asked = []
    seeds = []
    for task in ("toy-spatial", "toy-gui") if all_tasks else ():
        for i in range(rank(), n // 4, world_size()):
            asked.append(toy(task, "exam", seed, i))
            seeds.append(f"exam {task} {seed} {i}")
    grounded = replace(TINY, mode="grounded")
    for trace, in rollout(policy, asked, grounded, 1, seeds, turn_tokens=48):
        marks += examine_answer(trace)
    by_part = defaultdict(list)
    for name, mark in sum(gather(marks), []):
        by_part[name].append(mark)
    names = ["lists", *(f"says {pattern}" for pattern in PATTERNS), "target 1", "target 2",
             "target 3"]
    if all_tasks:
        names += ["relation", "moved", "compare", "screen"]
    return {name: mean(by_part[name]) for name in names}     # 0 for what it never did


@torch.no_grad()
def examine_dialogues(policy, rngs):
    """The marks of some dialogues that show all candidates, [(part of the exam, probability)]: of
    each place and each pattern, after what was right before it."""
    lessons, names, lengths = [], [], []
    for rng in rngs:
        scene = patterned(rng)
        drawing = scene.draw()
        text = f"{SHOW[0]} {scene.colour}{SHOW[1]}"
        lesson = Lesson(policy, "zoom", text, overview(scene.draw)).write("<think>", learned=False)
        for number, card in enumerate(scene.candidates, 1):
            place = card.x, card.y
            spot = FRAME.to_input(place)
            start = "Card" if number == 1 else " Card"
            lesson.write(f"{start} {number} at (", learned=False)
            lesson.write(f"{format_point(spot)[1:]}.")
            names.append(f"target {number}")
            lengths.append(len(policy.encode(f"{format_point(spot)[1:]}.")))
            lesson.write(f"</think>\n{format_call(spot)}<|im_end|>", learned=False)
            crop = zoom(drawing, place, SEEN // 2, SEEN)
            content = content_of(f"{TINY.before_crop}<image>{TINY.after_crop}")
            lesson.add(policy.reply(content, [crop])).write("<think>", learned=False)
            lesson.write(f"{card.pattern.capitalize()}.")
            names.append(f"says {card.pattern}")
            lengths.append(1)
        lessons.append([lesson])
    parts = policy.log_probs(lessons).split(lengths)
    return [(name, part.sum().exp().item()) for name, part in zip(names, parts, strict=True)]


def examine_answer(trace):
    """The marks of a trace of the mode `grounded`: whether it points at what is asked about, in
    order, and answers by a direction, right or wrong, or by a point on a candidate; whether a
    comparison in its thought is true, and the answer follows from it."""
    scene = trace.question.scene
    thought = trace.turns[0].thought
    points = [trace.frames[0].to_original(point) for point in trace.turns[0].points]
    answer = trace.answer or ""
    if not scene.named:
        points += [trace.frames[0].to_original(point) for point in parse_points(answer)]
        return [("screen", len(points) == 2 and all(map(scene.contains, points)))]
    on_cards = [card.contains(point) for card, point in zip(scene.named, points, strict=False)]
    answered = answer in DIRECTIONS
    marks = [(trace.question.category, on_cards == [True, True] and answered)]
    compared = scene.compares(thought)
    if compared is not None:
        marks.append(("compare", compared and answered and answer in thought))
    return marks


# ---------------------------------------------------------------------- (f) optimizers and schedule

def learning_rate(step, steps, warm_up, final=0.1, cosine=False):
    """Factor on the learning rate: linear warm-up over `warm_up` steps; decay to `final` at the
    end, linear or by a cosine."""
    done = step / steps
    if cosine:
        done = (1 - math.cos(math.pi * done)) / 2
    return min(1, (step + 1) / warm_up) * (1 - (1 - final) * done)


def make_optimizers(policy, kind, lr, adamw_lr=None, parameters=None, newton_schulz=5):
    """"adamw", or "muon": Muon for hidden matrices, AdamW for the rest. parameters: the trainable
    ones unless given. newton_schulz: steps of Muon's iteration."""
    parameters = parameters or policy.trainable()
    adamw = RoundedAdamW if policy.model.dtype == torch.bfloat16 else torch.optim.AdamW
    if kind == "adamw":
        return [adamw(parameters, lr=lr, weight_decay=0.01)]
    model = policy.model
    outer = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    hidden = []
    rest = []
    for p in parameters:
        (hidden if p.ndim == 2 and p not in outer else rest).append(p)
    muon = Muon(hidden, lr=lr, newton_schulz=newton_schulz)
    return [muon, adamw(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def optimizer_step(parameters, optimizers, factor, clip=1.0):
    """One step along the accumulated gradients, at `factor` times each optimizer's own learning
    rate; then they are cleared. All processes have to call it: gradients are averaged over them.
    -> the norm before clipping to `clip`"""
    average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()
    return full_tensor(norm).item()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices of small models (Jordan 2024), all of a shape
    at once. In float32: torch.optim.Muon works in bfloat16, which many CPUs only emulate."""

    def __init__(self, params, lr, newton_schulz=5):
        super().__init__(params, dict(lr=lr, momentum=0.95, weight_decay=0.01,
                                      newton_schulz=newton_schulz))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self.step_together(params, group)

    def step_together(self, params, group):
        """params: matrices of one shape, (rows, columns)."""
        ahead = []
        for p in params:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            ahead.append(full_tensor(p.grad.lerp(momentum, group["momentum"])))
        updates = orthogonalise(torch.stack(ahead), group["newton_schulz"])
        rows, columns = params[0].shape
        scale = max(1, rows / columns)**0.5
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update, p), alpha=-group["lr"] * scale)


LEAST_NORM = 1e-3         # of a matrix' gradient, for a full step: below are roundings and decay


def orthogonalise(x, steps=5):
    """Brings the singular values of matrices (n, rows, columns) near 1, by the quintic
    Newton-Schulz iteration: with 5 steps almost all of them. With 2 the small ones stay small: in
    GRPO's gradients a few directions count, and the others are noise."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT, steps).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights, with moments in float32.

    bfloat16 numbers near 0.02 are 1e-4 apart: a step of 1e-6 would always be rounded away. So what
    is written back is rounded up or down at random, right on average. The random numbers follow
    from step and parameter alone: a resumed run goes on as it would have."""

    def __init__(self, params, lr, betas=(0.9, 0.999), weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.update(p, number, **group)

    def update(self, p, number, lr, betas, weight_decay, **_):
        state = self.state[p]
        b1, b2 = betas
        if not state:
            zeros = torch.zeros_like(p, dtype=torch.float32)
            state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
        state["step"] = t = state["step"] + 1
        w, m, v, g = map(own_part, (p, state["exp_avg"], state["exp_avg_sq"], p.grad.float()))
        m.lerp_(g, 1 - b1)
        v.lerp_(g.square(), 1 - b2)
        direction = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        generator = torch.Generator(p.device).manual_seed(t * 100_003 + number)
        new = w.float() * (1 - lr * weight_decay) - lr * direction
        w.copy_(rounded(new, generator))

    def load_state_dict(self, state_dict):
        """torch's casts the moments to the type of the weights: they are taken again as kept."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for number, kept in state_dict["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[params[number]][name] = kept[name].to(params[number].device)


def own_part(x):
    """Of a sharded tensor, what this process has."""
    return x.to_local() if isinstance(x, DTensor) else x


def rounded(x, generator):
    """float32 -> bfloat16, to one of the two neighbours, the nearer one the more often: the mean
    is x."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -2**16).view(torch.float32).bfloat16()


def remaining(started, done, total):
    """"12 s, 48 s left"."""
    spent = time.time() - started
    return f"{spent:.0f} s, {spent / done * (total - done):.0f} s left"


# ----------------------------------------------------------------------------------- (g) the script

def configure_training(given, script):
    """The Config of a training script. Raises UserError; a missing --model is named before all
    else."""
    if given.get("model"):
        read_config(given["model"])
    return configure(given, script)


def folder_of(config):
    return Path(config.out or f"runs/{Path(config.task).stem}-{config.mode}")


def load_trainable(config, path):
    """A checkpoint to be trained, sharded if it is large: all processes have to call it. On a GPU,
    activations are computed again in the backward pass instead of kept."""
    policy = load(str(path), **config.input_limits())
    policy.train_vision = config.train_vision
    if policy.device.type == "cuda":
        policy.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False})
    shard_if_large(policy)
    return policy


def make_base(config, log):
    """The checkpoint to start from: --model, or the tiny base, which all processes make together,
    once a seed: one for toy-search, and one for all tasks, which takes longer. -> its path"""
    if config.model:
        return config.model
    all_tasks = config.task != "toy-search"
    kind = "all" if all_tasks else "search"
    folder = f"runs/tiny/{kind}-seed-{config.seed}-steps-{config.base_steps}"
    if gather(Path(folder).is_dir())[0]:
        log(f"base: {folder} is there")
        return folder
    if world_size() > BATCH:
        raise UserError(f"the tiny base is made by {BATCH} processes at most, a lesson each; give "
                        f"--processes {BATCH}")
    log(f"base: making {folder} from random weights")
    started = time.time()
    torch.manual_seed(config.seed)
    start = f"{folder}-random"
    make_tiny(start, tiny_strings())
    gather(None)                                # the first process has written it
    policy = load(start)
    gather(None)                                # all have read it
    if rank() == 0:
        shutil.rmtree(start)
    marks = pretrain(policy, config.base_steps, config.seed, all_tasks, log=log)
    notes = {"minutes": (time.time() - started) / 60, "exam": marks}
    policy.save(folder, notes=notes, dialogue=TINY.to_json())
    gather(None)
    return folder


def make_traces(config, base, out, log):
    """Chains for fine-tuning, as `read_traces` gives them: from --traces, from the run's own file,
    or searched for now."""
    questions = questions_of(config, "train", config.search_questions)
    path = Path(config.traces or out / "search.jsonl")
    if config.traces or path.is_file():
        log(f"traces: reading {path}")
        return read_traces(path, questions, config.image_root)
    found = grow_trees(config, base, questions, log)
    rng = random.Random(f"chains {config.seed}")
    chains = []
    trees = []
    for question, (own, tree) in zip(questions, found, strict=True):
        for chain in rng.sample(own, min(config.chains, len(own))):
            chains.append((question, chain))
            tree += f"\ntaken: {in_a_line(''.join(chain))}"
        trees.append(tree)
    if config.show_trees:
        log("\n\n".join(trees[:config.show_trees]))
    if not chains:
        raise UserError(f"the search found no right trace in {len(questions)} questions; give a "
                        "stronger --teacher or more --search-questions")
    if rank() == 0:
        write_traces(path, chains)
        write_text(out / "trees.txt", "\n\n".join(trees) + "\n")
    return chains


def grow_trees(config, base, questions, log):
    """Grows a tree for each question, each process for its share. -> [(chains, description)]"""
    teacher = load(config.teacher or base, **config.input_limits())
    log(f"traces: searching {len(questions)} questions with {config.teacher or base}")
    dialogue = make_dialogue(config, base, teacher)
    if config.mode == "zoom":
        dialogue.mode = config.search_mode
    seeds = [f"search {config.seed} {i}" for i in range(len(questions))]
    size = TREES * world_size()
    found = []
    for first in range(0, len(questions), size):
        mine = slice(first + rank(), first + size, world_size())
        roots = search(teacher, questions[mine], dialogue, seeds[mine], config.sampling(),
                       simulations=config.simulations, log=log)
        found += gather_shares([(linearise(root, config.backtrack), describe_tree(root))
                                for root in roots])
    return found


def traces_of(policy, dialogue, chains):
    """Chains as Traces. In the mode `zoom`, what was searched in single turns is converted."""
    traces = []
    for question, turns in chains:
        if isinstance(turns, Recording):
            traces.append(replay_recording(policy, dialogue, question, turns))
            continue
        if dialogue.mode == "zoom" and len(turns) == 1:
            rng = random.Random(f"looks {question.id}")
            turns = to_multi_turn(turns[0], dialogue.max_crops, rng=rng)
        traces.append(replay(policy, dialogue, question, turns))
    return traces


def warm_start(config, log):
    """Makes the run's `sft/` unless it is there: base, traces, fine-tuning. -> the base's path"""
    out = folder_of(config)
    out.mkdir(parents=True, exist_ok=True)
    sft = out / "sft"
    is_there = gather(sft.is_dir())[0]
    if config.export and (is_there or config.sft_steps == 0):
        raise UserError(f"--export {config.export}: this run makes no traces; give another --out, "
                        "and leave out --sft-steps 0")
    base = make_base(config, log)
    if is_there:
        log(f"sft: {sft} is there")
        return base
    minutes = 0.0
    if config.sft_steps == 0:
        policy = load(base, **config.input_limits())
    else:
        started = time.time()
        policy = learn_traces(config, base, out, log)
        minutes = (time.time() - started) / 60
    dialogue = make_dialogue(config, base, policy)
    policy.save(sft, notes={"minutes": minutes}, dialogue=dialogue.to_json())
    gather(None)
    return base


def learn_traces(config, base, out, log):
    """-> the base, fine-tuned on the usable ones of its traces"""
    chains = make_traces(config, base, out, log)
    if config.export and isinstance(chains[0][1], Recording):
        raise UserError(f"--export {config.export}: {config.traces} is in the release's form "
                        "already")
    policy = load_trainable(config, base)
    dialogue = make_dialogue(config, base, policy)
    traces = usable(traces_of(policy, dialogue, chains), log)
    if not traces:
        raise UserError(
            f"none of the {len(chains)} traces is right, well-formed and grounded in the mode "
            f"{config.mode}; look at them in {config.traces or out / 'search.jsonl'}, or give "
            "others by --traces")
    if config.export and rank() == 0:
        export_traces(config.export, traces, dialogue)
    optimizers = make_optimizers(policy, "adamw", config.sft_lr)
    steps = config.sft_steps or math.ceil(len(traces) / config.sft_batch)
    final = 0.0 if config.model else 0.1
    fine_tune(policy, traces, optimizers, steps=steps, batch=config.sft_batch, seed=config.seed,
              micro_tokens=config.micro_tokens, log=log, final=final, cosine=bool(config.model))
    return policy


def main(given):
    config = configure_training(given, "train_sft")
    sft = folder_of(config) / "sft"
    print(describe_config(config, "train_sft"))
    if sft.is_dir() and not config.resume:
        raise UserError(f"{sft} is there already; give --resume to keep it, or another --out")
    warm_start(config, print)
    print(f"done: {sft}")


if __name__ == "__main__":
    run("train_sft", __doc__.splitlines()[0], main)
