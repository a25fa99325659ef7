"""How fast: rollouts, updates and GRPO steps, each against what one would write without this
repository.

    python tests/bench_speed.py [--json FILE] [--device cuda] [--only NAME ...]

Every figure is a ratio measured in one run: ours and theirs take turns on the same model, questions
and lengths, and the table has the median of the pairs and their range. 2 means that ours takes half
the time. Images and texts are random and encoded beforehand (but not in `step_trl`); the vision
tower is frozen, and each run encodes its images itself.

    rollout   8 rollouts of each question, three turns of 20 to 60 tokens, a crop of 64 tokens after
    the first two. Theirs: `model.generate` once a turn on the padded batch of all rollouts. It
    reads everything again, images too, and goes on until the longest row is done; then each row is
    cut to the length planned for it. update    log-probabilities, GRPO loss and gradients of 8
    responses of 1/8, 2/8, ... 8/8 of the given length. Theirs: the padded batch through Hugging
    Face's own forward, with logits of the responses only. step_trl  a step of 16 questions, as in
    the default job: 8 single-turn rollouts each, of 50 to 150 tokens, loss, gradients, AdamW; no KL
    penalty, no gradient checkpointing. Theirs: `trl.GRPOTrainer`, where it is installed: pip
    install trl. It learns from a group at a time, and so on a CPU do we (or from two): all at once
    is slower, for both. outside   share of a GRPO step of the default job that is not model or
    optimizer; it needs a run of `python train_rl.py`. memory    peak of an update on 1, 4 and 8
    groups, one group a micro-batch: it grows with the longest group only. """
import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    PrinterCallback,
    Qwen2_5_VLConfig,
    TrainerCallback,
)

import train_sft as sft
from evaluate import table, toy_search
from model import Chunk, Engine, Policy, Sequence, load, micro_batches
from reward import score
from rollout import Config, make_dialogue
from rollout import rollout as dialogues
from train_rl import group_advantages, grpo_loss, train_step

GROUP, TURNS = 8, 3
MICRO_TOKENS = {"cpu": 2048, "cuda": 16_384}                        # train_rl.py's defaults
CROP = (8, 8)                                                       # tokens, wide and high
SIZES = {16: (4, 4), 100: (10, 10), 400: (20, 20), 1500: (50, 30)}  # image tokens -> wide, high
UPDATES = {64: (6, 6), 400: (20, 18), 1500: (40, 36)}               # prompt tokens -> its image
SHAPES = {"tiny": {}, "medium": dict(hidden=256, layers=6, heads=4, vision_hidden=128)}
ROPE_3B = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
TEXT_3B = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008,
               num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
               tie_word_embeddings=True, rope_parameters=ROPE_3B)
VISION_3B = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                 out_hidden_size=2048, patch_size=14, window_size=112,
                 fullatt_block_indexes=[7, 15, 23, 31])


# ----------------------------------------------------------------------------- models and questions

def build(shape, device):
    """A Policy with random weights. "3B": the shapes of Qwen2.5-VL-3B in bfloat16, with the tiny
    tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        sft.make_tiny(Path(folder) / "model", sft.tiny_strings(), **SHAPES.get(shape, {}))
        policy = load(f"{folder}/model", device=device, dtype=torch.float32)
    if shape == "3B":
        ids = {name: value for name, value in vars(policy.model.config).items()
               if name.endswith("_token_id") and isinstance(value, int)}
        config = Qwen2_5_VLConfig(text_config=TEXT_3B, vision_config=VISION_3B,
                                  tie_word_embeddings=True, **ids)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        model.model.language_model.config._attn_implementation = "layout"
        model.model.visual.config._attn_implementation = "flash_by_length"
        processor = type(policy.image_processor)(patch_size=config.vision_config.patch_size)
        policy = Policy(model, policy.tokenizer, processor)
        policy.forbidden[len(policy.tokenizer):] = False              # the whole vocabulary may be sampled
    policy.image_processor.size = {"shortest_edge": 1, "longest_edge": 2**26}      # images keep their size
    policy.model.model.visual.requires_grad_(False)
    policy.model.generation_config.eos_token_id = None                # turns end where it is planned
    policy.end_tokens = set()
    return policy


def noise(policy, size, rng):
    """A random image that becomes size[0] x size[1] tokens."""
    columns, rows = (n * policy.factor for n in size)
    return Image.fromarray(rng.integers(0, 255, (rows, columns, 3), dtype=np.uint8))


def chunk(policy, size, length, rng):
    """An image of size[0] x size[1] tokens and random text behind it, `length` tokens in all."""
    picture, config = policy.picture(noise(policy, size, rng)), policy.model.config
    ids = [config.vision_start_token_id, *[policy.image_token] * picture.tokens,
           config.vision_end_token_id]
    return Chunk(ids + rng.integers(0, 256, length - len(ids)).tolist(), [picture])


@dataclass(eq=False)
class Planned(Sequence):
    """A Sequence with a planned number of tokens in each turn, and what it is shown between
    them."""
    plan: list[int] = field(default_factory=list)
    shown: list[Chunk] = field(default_factory=list)
    turn: int = 0
    left: int = 0                                                     # tokens to sample in this turn


def plan_groups(policy, image_tokens, questions, rng):
    """Questions of the rollout benchmark, each as a list of GROUP Planned that share a prompt."""
    groups = []
    for _ in range(questions):
        prompt = chunk(policy, SIZES[image_tokens], image_tokens + 32, rng)
        group = []
        for _ in range(GROUP):
            plan = rng.integers(20, 61, TURNS).tolist()
            shown = [chunk(policy, CROP, 80, rng) for _ in range(TURNS - 1)]
            group.append(Planned(prompt, plan=plan, shown=shown))
        groups.append(group)
    return groups


def start(groups):
    """The same groups without a token sampled, and with pictures that are still to be encoded."""
    started = []
    for group in groups:
        prompt = fresh(group[0].prompt)
        started.append([Planned(prompt, plan=s.plan, shown=[fresh(chunk) for chunk in s.shown],
                                left=s.plan[0], rng=random.Random(i))
                        for i, s in enumerate(group)])
    return started


def fresh(chunk):
    return Chunk(chunk.ids, [replace(picture) for picture in chunk.pictures])


# ---------------------------------------------------------------------------------- ours and theirs

class PlannedEngine(Engine):
    """Ends each turn at the length planned for it, whatever is sampled."""

    def sample(self, rows, hidden, on_turn):
        for row in rows:
            row.turn_tokens = self.turn_tokens - row.sequence.left           # the engine cuts a turn at `turn_tokens`
            row.sequence.left -= 1
        return super().sample(rows, hidden, on_turn)


def next_turn(sequence, truncated):
    """What the engine's on_turn answers: the next crop, or None after the last turn."""
    sequence.turn += 1
    if sequence.turn == len(sequence.plan):
        return None
    sequence.left = sequence.plan[sequence.turn]
    return sequence.shown[sequence.turn - 1]


def roll_out(policy, groups, **how):
    """Ours: fills the groups, in place."""
    longest = max(sum(s.plan) + sum(len(c.ids) for c in s.shown) for group in groups for s in group)
    done = list(PlannedEngine(policy, turn_tokens=1024, response_tokens=longest + 1, **how).run(groups, next_turn))
    assert len(done) == len(groups) and all(sum(s.sampled) == sum(s.plan) for group in groups for s in group)


@contextmanager
def plain(policy):
    """Hugging Face's own attention, as a user of transformers has it."""
    config = policy.model.model.language_model.config
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = "layout"
        policy.model.model.rope_deltas = None


def batch(policy, sequences, left=False):
    """What Hugging Face's model takes of some Sequences, padded on the right or the left."""
    texts = [s.prompt.ids + s.ids for s in sequences]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), policy.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    pictures = [p for s in sequences for p in s.prompt.pictures + s.pictures]
    inputs = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == policy.image_token).int(),
                  image_grid_thw=torch.tensor([p.grid for p in pictures]),
                  pixel_values=policy.pixel_values(pictures).to(policy.model.dtype))
    return {name: x.to(policy.device) for name, x in inputs.items()}


def generate(policy, groups):
    """Theirs: `generate` on the batch of all rollouts, turn by turn; fills the groups, in place."""
    rows = [s for group in groups for s in group]
    forbidden = policy.forbidden.nonzero()[:, 0].tolist()             # an image token must not be sampled
    with plain(policy):
        for turn in range(TURNS):
            inputs = batch(policy, rows, left=True)
            out = policy.model.generate(**inputs, max_new_tokens=max(s.plan[turn] for s in rows), do_sample=True, top_k=0,
                                        suppress_tokens=forbidden)[:, inputs["input_ids"].shape[1]:]
            for s, ids in zip(rows, out.tolist(), strict=True):
                s.add(Chunk(ids[:s.plan[turn]]), sampled=True)
                if turn + 1 < TURNS:
                    s.add(s.shown[turn])


def padded_log_probs(policy, group):
    """Theirs: log-probabilities (N,) of the sampled tokens of a group, through the padded batch, as
    `policy.log_probs` has them. Logits are made for the responses only."""
    prompt, longest = len(group[0].prompt.ids), max(len(s.ids) for s in group)
    inputs = batch(policy, group)
    logits = policy.model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float()       # (G, R, V)
    log_probs = torch.log_softmax(logits.masked_fill(policy.forbidden, -torch.inf), -1)
    found = log_probs.gather(2, inputs["input_ids"][:, prompt:, None])[..., 0]                                # (G, R)
    sampled = torch.tensor([s.sampled + [False] * (longest - len(s.ids)) for s in group], device=policy.device)
    return found[sampled]


def largest_difference(policy, rng):
    """Between the log-probabilities recorded in rollouts, those of the update and those of the
    padded batch."""
    (group,) = groups = start(plan_groups(policy, 16, 1, rng))
    (copied,) = start(groups)
    roll_out(policy, groups)
    for ours, theirs in zip(group, copied, strict=True):
        theirs.ids, theirs.sampled = ours.ids, ours.sampled
        theirs.pictures = [picture for shown in theirs.shown for picture in shown.pictures]
    recorded = torch.tensor([x for s in group for x in s.log_probs if x], device=policy.device)      # injected tokens: 0.0
    with torch.no_grad():
        ours = policy.log_probs(groups)
        with plain(policy):
            theirs = padded_log_probs(policy, copied)
    return max((ours - theirs).abs().max().item(), (recorded - theirs).abs().max().item())


# ---------------------------------------------------------------------------------------- measuring

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def status(key):
    """MiB by the name that Linux gives it; nan elsewhere."""
    try:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return float("nan")


def mark_memory(device):
    """Frees what is free and forgets earlier peaks. -> MiB in use: the GPU's, or the resident
    memory of the process"""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")                 # 5: the peak of the resident memory
    except (OSError, AttributeError):
        return float("nan")
    return status("VmRSS")


def peak_memory(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else status("VmHWM")


def memory_of(function, device):
    """MiB at the peak of `function`, above what was in use before."""
    before = mark_memory(device)
    function()
    wait(device)
    return peak_memory(device) - before


def seconds(function, device):
    gc.collect()
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def compare(ours, theirs, tokens, args):
    """Times two functions in alternating pairs, after a first run of each in which memory is
    measured."""
    functions, times = (ours, theirs), ([], [])
    memory = [memory_of(f, args.device) for f in functions]
    for pair in range(args.pairs):
        for who in ((0, 1), (1, 0))[pair % 2]:
            times[who].append(seconds(functions[who], args.device))
    return summary(times, tokens, memory)


def summary(times, tokens, memory):
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    spent = [statistics.median(t) for t in times]
    return {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)], "seconds": spent,
            "tokens_per_second": [tokens / s for s in spent], "peak_mib": memory}


# ----------------------------------------------------------------------------------- the benchmarks

def rollout(policy, image_tokens, args, rng):
    groups = plan_groups(policy, image_tokens, max(1, args.questions // (2 if image_tokens > 1000 else 1)), rng)
    return compare(lambda: roll_out(policy, start(groups)), lambda: generate(policy, start(groups)),
                   sum(sum(s.plan) for group in groups for s in group), args)


def responses(policy, shape, rng):
    """A group with random responses, as if sampled. shape: tokens (of the prompt, of the longest
    response)"""
    prompt = chunk(policy, UPDATES[shape[0]], shape[0], rng)
    lengths = [shape[1] * (i + 1) // GROUP for i in range(GROUP)]
    return [Sequence(prompt).add(Chunk(rng.integers(0, 256, n).tolist()), sampled=True) for n in lengths]


def learn(log_probs, old):
    """The GRPO loss with advantages of alternating sign, and its gradients."""
    advantages = torch.ones_like(old)
    advantages[::2] = -1
    (grpo_loss(log_probs, old, None, advantages, kl=0.0)[0] / len(old)).backward()


def update(policy, shape, args, rng):
    group = responses(policy, shape, rng)
    def again():
        prompt = fresh(group[0].prompt)
        return [replace(sequence, prompt=prompt) for sequence in group]
    with torch.no_grad():
        old = policy.log_probs([again()])
    def ours():
        learn(policy.log_probs([again()]), old)
        policy.model.zero_grad(set_to_none=True)
    def theirs():
        with plain(policy):
            learn(padded_log_probs(policy, group), old)
        policy.model.zero_grad(set_to_none=True)
    return compare(ours, theirs, len(old), args)


def step(policy, image_tokens, args, rng):
    """A step of ours follows every step of TRL's trainer, each on a model of its own."""
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.grpo_trainer import Dataset
    rows = args.step_questions * GROUP
    plan, rewards = rng.integers(50, 151, rows).tolist(), [float(i % 2) for i in range(rows)]
    images, text = [noise(policy, SIZES[image_tokens], rng) for _ in range(args.step_questions)], "Which one is it?"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    advantages = group_advantages(rewards[:GROUP], [True] * GROUP, True)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-6, fused=True)
    config = Config(kl=0.0, micro_tokens=MICRO_TOKENS[args.device])
    times, memory = ([], []), []

    def ours():
        lengths, groups = iter(plan), []
        for prompt in [policy.prompt(messages, [image]) for image in images]:
            groups.append([Planned(prompt, plan=[n], left=n) for n in islice(lengths, GROUP)])
        roll_out(policy, groups)
        train_step(policy, None, [(group, advantages) for group in groups], [optimizer], config, 1.0)

    class Processor(Qwen2_5_VLProcessor):                             # without videos, so without torchvision
        def __init__(self, image_processor, tokenizer, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template)

    class Trainer(GRPOTrainer):                                       # each row is cut to its length, as by an end token
        def _generate_single_turn(self, *inputs, **named):
            ids, log_probs = super()._generate_single_turn(*inputs, **named)
            return [row[:n] for row, n in zip(ids, plan, strict=True)], log_probs

    class Turns(TrainerCallback):                                     # the first step of each is the warm-up
        def on_step_begin(self, _, state, control, **__):
            gc.collect()
            self.before = mark_memory(args.device) if state.global_step == 0 else 0.0
            self.began = time.perf_counter()

        def on_step_end(self, _, state, control, **__):
            wait(args.device)
            spent = time.perf_counter() - self.began
            if state.global_step == 1:
                theirs = peak_memory(args.device) - self.before
                memory.extend([memory_of(ours, args.device), theirs])
            else:
                times[1].append(spent)
                times[0].append(seconds(ours, args.device))

    model = copy.deepcopy(policy.model)
    model.model.language_model.config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        trl_config = GRPOConfig(folder, per_device_train_batch_size=GROUP, gradient_accumulation_steps=args.step_questions,
                            num_generations=GROUP, max_steps=args.pairs + 1, max_completion_length=max(plan),
                            generation_kwargs={"min_new_tokens": max(plan)}, bf16=False, gradient_checkpointing=False,
                            use_cpu=args.device == "cpu", seed=args.seed, save_strategy="no", logging_strategy="no",
                            report_to="none", disable_tqdm=True)
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "image": image} for image in images])
        processor = Processor(policy.image_processor, policy.tokenizer, policy.tokenizer.chat_template)
        trainer = Trainer(model, lambda completions, **_: rewards, args=trl_config, train_dataset=data, callbacks=[Turns()],
                          processing_class=processor)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return summary(times, sum(plan), memory)


def update_memory(policy, _, args, rng):
    """Peak MiB of updates on 1, 4 and 8 groups of 64:100 tokens and on one of 400:150; the
    gradients are there before."""
    short, long = [responses(policy, (64, 100), rng) for _ in range(8)], [responses(policy, (400, 150), rng)]
    short.sort(key=lambda group: sum(len(s.ids) for s in group))      # the longest group is in all three
    def run(groups):
        for batch in micro_batches(groups, 1):                        # one group each
            policy.log_probs(batch.groups).sum().backward()
        policy.model.zero_grad(set_to_none=False)
    run(short[-1:])
    cases = {"1 x 64:100": short[-1:], "4 x 64:100": short[-4:], "8 x 64:100": short, "1 x 400:150": long}
    found = {name: memory_of(partial(run, groups), args.device) for name, groups in cases.items()}
    policy.model.zero_grad(set_to_none=True)
    return found


def step_outside(_, folder, args, rng):
    """Shares of some GRPO steps of the default job that are spent outside of model and optimizer:
    drawing, dialogue, crops, image processing, rewards, book-keeping. Counted as model: its passes
    and choices while sampling, and the update."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(folder)
    policy, reference = (load(folder, device=args.device) for _ in range(2))
    config = Config()
    dialogue = make_dialogue(config, folder, policy)
    optimizers = sft.make_optimizers(policy, config.optimizer, config.lr, config.adamw_lr)
    inside, shares = [], []
    def timed(function):
        def run(*inputs, **named):
            began = time.perf_counter()
            out = function(*inputs, **named)
            wait(args.device)
            inside.append(time.perf_counter() - began)
            return out
        return run
    for step in range(args.pairs + 1):
        inside.clear()
        began = time.perf_counter()
        for name in ("hidden", "choose", "features"):
            setattr(policy, name, timed(getattr(Policy, name).__get__(policy)))
        questions = [toy_search("train", args.seed, step * 16 + i) for i in range(16)]
        seeds = [question.id for question in questions]
        groups = list(dialogues(policy, questions, dialogue, GROUP, seeds, **config.sampling()))
        for name in ("hidden", "choose", "features"):
            delattr(policy, name)
        pairs = []
        for traces in groups:
            rewards = [score(trace).total for trace in traces]
            pairs.append((traces, group_advantages(rewards, [True] * GROUP, True)))
        timed(train_step)(policy, reference, pairs, optimizers, config, 1.0)
        shares.append(1 - sum(inside) / (time.perf_counter() - began))
    shares = shares[1:]                               # the first is the warm-up
    return {"share": statistics.median(shares), "range": [min(shares), max(shares)]}


BENCHMARKS = {"rollout_tiny": (rollout, "tiny", 16), "rollout_100": (rollout, "medium", 100),
              "rollout_400": (rollout, "medium", 400), "rollout_1500": (rollout, "medium", 1500),
              "update_tiny": (update, "tiny", (64, 100)), "update_64_100": (update, "medium", (64, 100)),
              "update_400_150": (update, "medium", (400, 150)), "update_1500_300": (update, "medium", (1500, 300)),
              "step_trl_100": (step, "medium", 100), "step_trl_400": (step, "medium", 400),
              "outside": (step_outside, "tiny", "runs/toy-search-zoom/sft"),
              "memory": (update_memory, "medium", None)}


def machine(args):
    """What was measured on, in a line."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() + "\nmodel name: " + cpu)[1]
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    return (f"{device}; {torch.get_num_threads()} thread(s); Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: shapes of Qwen2.5-VL-3B, bfloat16 (%(default)s)")
    add("--json", metavar="FILE", help="write the ratios there by name, and all else under `details`")
    add("--pairs", type=int, default=5, help="alternating pairs of runs (%(default)s)")
    add("--questions", type=int, default=8, help="questions of a rollout, for ours and theirs; of 1500 image tokens half as "
        "many, for theirs takes minutes (%(default)s)")
    add("--step-questions", type=int, default=16, help="the same of a step (%(default)s)")
    add("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help="some of: " + ", ".join(BENCHMARKS))
    add("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, images and lengths (%(default)s)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(machine(args))
    policies = {"medium": build("medium", args.device)}
    difference = largest_difference(policies["medium"], np.random.default_rng(args.seed))
    print(f"rollout, update and padded batch agree on log-probabilities to {difference:.1e} (float32)")
    if difference > 1e-4:
        sys.exit("they should agree to 1e-4: the ratios would compare different things")

    names = [n for n in args.only or BENCHMARKS
             if args.device == "cpu" or n not in ("rollout_tiny", "update_tiny", "outside")]
    found, rows = {}, [["", "model", "ratio", "range", "tokens/s", "theirs", "peak MiB", "theirs"]]
    for name in names:
        print(f"... {name}", file=sys.stderr)
        run, shape, case = BENCHMARKS[name]
        shape = "3B" if args.device == "cuda" else shape
        policies = {shape: policies[shape] if shape in policies else build(shape, args.device)}     # one model at a time
        rng = np.random.default_rng(args.seed)
        try:
            one = found[name] = run(policies[shape], case, args, rng)
            if "ratio" not in one:
                continue
            rows.append([name, shape, f"{one['ratio']:.2f}", "{:.2f} to {:.2f}".format(*one["range"]),
                         *(f"{x:,.0f}" for x in one["tokens_per_second"] + one["peak_mib"])])
        except ModuleNotFoundError as error:
            rows.append([name, shape, "-", f"no {error.name}: pip install trl", *[""] * 4])
        except FileNotFoundError as error:
            rows.append([name, shape, "-", f"no {error}: python train_rl.py", *[""] * 4])
        except torch.OutOfMemoryError:
            rows.append([name, shape, "-", "out of memory", *[""] * 4])
            policies[shape].model.zero_grad(set_to_none=True)
    print(f"\n{table(rows)}\nmedians of {args.pairs} pairs; {args.questions} question(s) of {GROUP} (rollout_1500: half), of a "
          f"step {args.step_questions}; tokens/s: sampled ones; memory: above what was in use before")
    if one := found.get("outside"):
        print("a GRPO step of the default job outside of model and optimizer: {:.1%} ({:.1%} to {:.1%})".format(
            one["share"], *one["range"]))
    for name, mib in found.get("memory", {}).items():
        print(f"peak of an update on {name} tokens: {mib:,.0f} MiB")
    if args.json:
        ratios = {name: one["ratio"] for name, one in found.items() if "ratio" in one}
        Path(args.json).write_text(json.dumps({**ratios, "machine": machine(args), "details": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
