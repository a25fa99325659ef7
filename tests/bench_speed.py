"""How fast: rollouts, updates and GRPO steps, each against what one would write without this
repository.

    python tests/bench_speed.py [--json FILE] [--device cuda] [--only NAME ...] [--pairs N]

Every figure is a ratio measured in one run: ours and theirs take turns on the same model, questions
and lengths, and the table has the median of the pairs and their range. 2 means that ours takes half
the time. Images and texts are random. They are processed beforehand, but in a step by both sides.
The vision tower is frozen, and each run encodes its images itself.

    rollout   8 rollouts of each question: three turns of 20 to 60 tokens, a crop of 64 tokens after
              each of the first two. Theirs: `model.generate` once a turn on the padded batch of all
              rollouts. It reads everything again, images too, and goes on until the longest row is
              done; then each row is cut to its planned length.
    update    log-probabilities, GRPO loss and gradients of 8 responses of 1/8, 2/8, ... 8/8 of the
              given length. Theirs: the padded batch through Hugging Face's own forward, with logits
              of the responses only.
    step_trl  a GRPO step of 16 questions, 8 rollouts each, of a single turn of 50 to 150 tokens:
              rollouts, loss, gradients, AdamW; no KL penalty, no gradient checkpointing. Theirs:
              `trl.GRPOTrainer`, where it is installed (pip install trl).
    zoom_trl  the same with three turns of 40 to 80 tokens: the first two end in a zoom call, which
              is answered by a crop of 64 tokens. Theirs: the trainer's own loop over tool calls,
              with an `environment_factory` whose tool returns an image.

TRL 1.16 runs both steps by itself. It is given a chat template that renders tool calls (it refuses
that of Qwen2.5-VL, which drops them) and the way to parse them. One of its methods is wrapped: what
is sampled in a turn is cut to the planned length, and all turns but the last end in a zoom call.
Prompts and observations have the same tokens as ours, and it is asserted that every response has
the same length. On a CPU both sides learn from a group at a time: more at once is slower, for both.
"""
import argparse
import copy
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "tiny"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from make_base import make_tiny, strings
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    PrinterCallback,
    Qwen2_5_VLConfig,
    TrainerCallback,
)

from evaluate import table
from model import Chunk, Engine, Policy, Sequence, load
from train_rl import grpo_loss, update

GROUP, TURNS = 8, 3
MICRO_TOKENS = {"cpu": 1024, "cuda": 16_384}                 # a group at a time; about a dozen
CROP = (8, 8)                                                # tokens, across and down
IMAGES = {16: (4, 4), 100: (10, 10), 400: (20, 20), 1500: (50, 30)}    # tokens: across and down
UPDATE_IMAGES = {64: (6, 6), 400: (20, 18), 1500: (40, 36)}  # tokens of the prompt: of its image
MODELS = {"tiny": {}, "medium": dict(hidden=256, layers=6, heads=4, vision_hidden=128)}
ROPE_3B = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
TEXT_3B = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008,
               num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
               tie_word_embeddings=True, rope_parameters=ROPE_3B)
VISION_3B = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                 out_hidden_size=2048, patch_size=14, window_size=112,
                 fullatt_block_indexes=[7, 15, 23, 31])


# ----------------------------------------------------------------------------- models and questions

def build(name, device):
    """A Policy with random weights. name: of MODELS, or "3B": the sizes of Qwen2.5-VL-3B in
    bfloat16, with the tiny tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder) / "model", strings(), **MODELS.get(name, {}))
        policy = load(f"{folder}/model", device=device, dtype=torch.float32)
    if name == "3B":
        policy = enlarge(policy, device)
    policy.image_processor.size = {"shortest_edge": 1, "longest_edge": 2**26}   # images keep it
    policy.model.model.visual.requires_grad_(False)
    policy.model.generation_config.eos_token_id = None       # turns end where it is planned
    policy.end_tokens = set()
    return policy


def enlarge(policy, device):
    """A Policy of the sizes of Qwen2.5-VL-3B with the tokenizer of a tiny one."""
    ids = {name: value for name, value in vars(policy.model.config).items()
           if name.endswith("_token_id") and isinstance(value, int)}
    config = Qwen2_5_VLConfig(text_config=TEXT_3B, vision_config=VISION_3B,
                              tie_word_embeddings=True, **ids)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.model.language_model.config._attn_implementation = "layout"
    model.model.visual.config._attn_implementation = "flash_by_length"
    processor = type(policy.image_processor)(patch_size=config.vision_config.patch_size)
    large = Policy(model, policy.tokenizer, processor).eval()
    large.forbidden[len(policy.tokenizer):] = False          # any row of the vocabulary is sampled
    return large


def noise(policy, size, rng):
    """A random image of `size` tokens, across and down."""
    width, height = (tokens * policy.token_px for tokens in size)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def random_chunk(policy, size, length, rng):
    """An image of `size` tokens and random text behind it, `length` tokens in all."""
    picture, config = policy.picture(noise(policy, size, rng)), policy.model.config
    image = [policy.image_token] * picture.tokens
    ids = [config.vision_start_token_id, *image, config.vision_end_token_id]
    text = rng.integers(0, 256, length - len(ids)).tolist()
    return Chunk(ids + text, [picture])


@dataclass(eq=False)
class Planned(Sequence):
    """A Sequence with a planned number of tokens in each turn."""
    plan: list[int] = field(default_factory=list)
    shown: list[Chunk] = field(default_factory=list)         # observations between the turns
    advantage: float = 0.0
    turn: int = 0

    def __post_init__(self):
        self.left = self.plan[0]                             # tokens to sample in this turn

    def planned_length(self):
        return sum(self.plan) + sum(len(chunk.ids) for chunk in self.shown)


def plan_groups(policy, image_tokens, questions, rng):
    """Groups for the rollout benchmark, one a question: lists of Planned that share a prompt."""
    groups = []
    for _ in range(questions):
        prompt = random_chunk(policy, IMAGES[image_tokens], image_tokens + 32, rng)
        group = []
        for _ in range(GROUP):
            plan = rng.integers(20, 61, TURNS).tolist()
            shown = [random_chunk(policy, CROP, 80, rng) for _ in plan[1:]]
            group.append(Planned(prompt, plan=plan, shown=shown))
        groups.append(group)
    return groups


def restart(groups):
    """The same groups with nothing sampled and no image encoded."""
    started = []
    for group in groups:
        prompt, copies = unencoded(group[0].prompt), []
        for i, sequence in enumerate(group):
            shown = [unencoded(chunk) for chunk in sequence.shown]
            copies.append(Planned(prompt, plan=sequence.plan, shown=shown, rng=random.Random(i)))
        started.append(copies)
    return started


def unencoded(chunk):
    return Chunk(chunk.ids, [replace(picture) for picture in chunk.pictures])


# ------------------------------------------------------------------------------------- our rollouts

class PlannedEngine(Engine):
    """Ends each turn at its planned length, whatever is sampled."""

    def sample(self, rows, hidden, on_turn):
        for row in rows:
            row.turn_tokens = self.turn_tokens - row.sequence.left    # the engine ends it at 0 left
            row.sequence.left -= 1
        return super().sample(rows, hidden, on_turn)


def next_turn(sequence, truncated):
    """The engine's on_turn: the next observation, or None after the last turn."""
    sequence.turn += 1
    if sequence.turn == len(sequence.plan):
        return None
    sequence.left = sequence.plan[sequence.turn]
    return sequence.shown[sequence.turn - 1]


def roll_out(policy, groups):
    """Ours: samples all turns of some groups of Planned, in place."""
    sequences = sum(groups, [])
    longest = max(sequence.planned_length() for sequence in sequences)
    engine = PlannedEngine(policy, turn_tokens=1024, response_tokens=longest + 1)
    assert len(list(engine.run(groups, next_turn))) == len(groups)
    assert all(sum(sequence.sampled) == sum(sequence.plan) for sequence in sequences)


# -------------------------------------------------------------------- the same by Hugging Face only

@contextmanager
def plain_model(policy):
    """Inside, attention and patch embedding are Hugging Face's own, as a user of transformers has
    them."""
    parts = (policy.model.model.language_model, policy.model.model.visual)
    ours = [part.config._attn_implementation for part in parts]
    embed = policy.model.model.visual.patch_embed
    product = vars(embed).pop("forward", embed.forward)      # what `load` put there
    for part in parts:
        part.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for part, attention in zip(parts, ours, strict=True):
            part.config._attn_implementation = attention
        embed.forward = product
        policy.model.model.rope_deltas = None


def padded_batch(policy, sequences, left=False):
    """What Hugging Face's model takes of N Sequences: padded to (N, L), on the right or left."""
    texts = [sequence.prompt.ids + sequence.ids for sequence in sequences]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), policy.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        first = width - len(text) if left else 0
        ids[row, first:first + len(text)] = torch.tensor(text)
        mask[row, first:first + len(text)] = 1
    pictures = []
    for sequence in sequences:
        pictures += sequence.prompt.pictures + sequence.pictures
    inputs = dict(input_ids=ids, attention_mask=mask,
                  mm_token_type_ids=(ids == policy.image_token).int(),
                  image_grid_thw=torch.tensor([picture.grid for picture in pictures]),
                  pixel_values=policy.pixel_values(pictures).to(policy.model.dtype))
    return {name: x.to(policy.device) for name, x in inputs.items()}


def forbidden_tokens(policy):
    return policy.forbidden.nonzero()[:, 0].tolist()


def generate(policy, groups):
    """Theirs: `generate` on the batch of all rollouts, turn by turn; in place."""
    sequences = sum(groups, [])
    options = dict(do_sample=True, top_k=0, suppress_tokens=forbidden_tokens(policy))
    for turn in range(TURNS):
        inputs = padded_batch(policy, sequences, left=True)
        longest = max(sequence.plan[turn] for sequence in sequences)
        with plain_model(policy):
            out = policy.model.generate(**inputs, max_new_tokens=longest, **options)
        sampled = out[:, inputs["input_ids"].shape[1]:].tolist()
        for sequence, ids in zip(sequences, sampled, strict=True):
            sequence.add(Chunk(ids[:sequence.plan[turn]]), sampled=True)
            if turn + 1 < TURNS:
                sequence.add(sequence.shown[turn])


def padded_log_probs(policy, group):
    """Theirs of `policy.log_probs`: those of a group's sampled tokens (N,), through the padded
    batch. Logits are computed for the responses only."""
    prompt_length = len(group[0].prompt.ids)
    longest = max(len(sequence.ids) for sequence in group)
    inputs = padded_batch(policy, group)
    with plain_model(policy):
        out = policy.model(**inputs, logits_to_keep=longest + 1, use_cache=False)
    logits = out.logits[:, :-1].float().masked_fill(policy.forbidden, -torch.inf)    # (G, R, V)
    targets = inputs["input_ids"][:, prompt_length:, None]                           # (G, R, 1)
    log_probs = torch.log_softmax(logits, -1).gather(2, targets)[..., 0]             # (G, R)
    sampled = [sequence.sampled + [False] * (longest - len(sequence.ids)) for sequence in group]
    return log_probs[torch.tensor(sampled, device=policy.device)]


def largest_difference(policy, rng):
    """Between the log-probabilities recorded in rollouts, those of the update and those of the
    padded batch."""
    groups = restart(plan_groups(policy, 16, 1, rng))
    copies = restart(groups)
    roll_out(policy, groups)
    recorded = []
    for ours, theirs in zip(groups[0], copies[0], strict=True):
        theirs.ids, theirs.sampled = ours.ids, ours.sampled
        theirs.pictures = sum((chunk.pictures for chunk in theirs.shown), [])
        recorded += [x for x, sampled in zip(ours.log_probs, ours.sampled, strict=True) if sampled]
    with torch.no_grad():
        ours = policy.log_probs(groups)
        theirs = padded_log_probs(policy, copies[0])
    recorded = torch.tensor(recorded, device=policy.device)
    return max((x - theirs).abs().max().item() for x in (ours, recorded))


# ------------------------------------------------------------------------------- a GRPO step by TRL

MESSAGES = [{"role": "user", "content": [{"type": "image"},
                                         {"type": "text", "text": "Which one is it?"}]}]
ZOOM_CALL = '<tool_call>{"name":"zoom","arguments":{}}</tool_call><|im_end|>'


def crop_of(policy, image):
    box = (0, 0, image.width / 2, image.height / 2)
    return image.resize([tokens * policy.token_px for tokens in CROP], box=box)


def plan_step(policy, images, plans):
    """Groups of Planned of a GRPO step, with advantages. plans: a list of lengths each rollout."""
    groups, plans = [], iter(plans)
    for image in images:
        prompt, group = policy.prompt(MESSAGES, [image]), []
        for i in range(GROUP):
            plan = next(plans)
            shown = [policy.reply([{"type": "image"}], [crop_of(policy, image)]) for _ in plan[1:]]
            group.append(Planned(prompt, plan=plan, shown=shown, rng=random.Random(i),
                                 advantage=1.0 if i % 2 else -1.0))
        groups.append(group)
    return groups


def make_trainer(policy, images, plans, lengths, folder, args):
    """TRL's trainer for the step of `plan_step`, on a copy of the model. lengths: tokens of each
    response, crops included. Raises ModuleNotFoundError where TRL is not installed."""
    from datasets import Dataset
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template
    call, filler, turns = policy.encode(ZOOM_CALL), policy.encode("."), len(plans[0])

    class Processor(Qwen2_5_VLProcessor):
        """Without videos, and so without torchvision."""

        def __init__(self, image_processor, tokenizer, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template)

    class Environment:
        """One rollout's tools: the methods that are public."""

        def reset(self, image, **_):
            self.image = image

        def zoom(self):
            """Shows a part of the image."""
            return [{"type": "image", "image": crop_of(policy, self.image)}]

    class Trainer(GRPOTrainer):
        """Cuts turns to the planned lengths, and ends all but the last in a zoom call."""
        turn = 0

        def _generate_single_turn(self, *inputs, **named):
            planned = [plan[self.turn] for plan in plans]
            self.turn = (self.turn + 1) % turns
            self.generation_config.max_new_tokens = max(planned)
            self.generation_config.min_new_tokens = max(planned)
            rows, log_probs = super()._generate_single_turn(*inputs, **named)
            if self.turn:                                    # not the last one
                return [filler * (n - len(call)) + call for n in planned], log_probs
            return [row[:n] for row, n in zip(rows, planned, strict=True)], log_probs

    def rewards(completion_ids, **_):
        assert [len(ids) for ids in completion_ids] == lengths
        return [float(i % 2) for i in range(len(lengths))]

    with plain_model(policy):
        model = copy.deepcopy(policy.model)
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.response_template = qwen3_template
    template = tokenizer.chat_template.replace("<|im_end|>", "{{ m.tool_calls or '' }}<|im_end|>")
    template = template.replace("m.role", "m.role.replace('tool', 'user')")    # as Qwen's have it
    text = MESSAGES[0]["content"][1]["text"]
    prompt = [{"role": "user", "content": text}]
    config = GRPOConfig(
        folder, per_device_train_batch_size=GROUP, gradient_accumulation_steps=len(images),
        num_generations=GROUP, max_steps=args.pairs + 1, max_completion_length=max(lengths),
        generation_kwargs={"suppress_tokens": forbidden_tokens(policy)}, bf16=False,
        gradient_checkpointing=False, use_cpu=args.device == "cpu", seed=args.seed,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Trainer(
        model, rewards, args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt, "image": image} for image in images]),
        processing_class=Processor(policy.image_processor, tokenizer, template),
        environment_factory=Environment if turns > 1 else None)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Alternate(TrainerCallback):
    """Times each step of TRL's trainer and a step of ours behind it; the first of both warms up."""

    def __init__(self, ours, device):
        self.ours, self.device = ours, device
        self.times = ([], [])                                # of ours and theirs

    def on_step_begin(self, *_, **__):
        gc.collect()
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        wait(self.device)
        self.times[1].append(time.perf_counter() - self.started)
        self.times[0].append(seconds(self.ours, self.device))


# ----------------------------------------------------------------------------------- the benchmarks

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    gc.collect()
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def compare(ours, theirs, args):
    """-> seconds of two functions, of each a list, in alternating pairs after a first run of
    each"""
    functions, times = (ours, theirs), ([], [])
    for pair in range(args.pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        for side in order:
            times[side].append(seconds(functions[side], args.device))
    return [side[1:] for side in times]


def time_rollout(policy, image_tokens, args, rng):
    questions = args.questions
    if image_tokens > 1000:
        questions = max(1, questions // 2)
    groups = plan_groups(policy, image_tokens, questions, rng)
    tokens = sum(sum(sequence.plan) for sequence in sum(groups, []))
    times = compare(lambda: roll_out(policy, restart(groups)),
                    lambda: generate(policy, restart(groups)), args)
    return times, tokens


def time_update(policy, shape, args, rng):
    """shape: tokens of the prompt, of the longest response; the responses are random."""
    prompt_length, longest = shape
    prompt = random_chunk(policy, UPDATE_IMAGES[prompt_length], prompt_length, rng)
    group = []
    for i in range(GROUP):
        ids = rng.integers(0, 256, longest * (i + 1) // GROUP).tolist()
        group.append(Sequence(prompt).add(Chunk(ids), sampled=True))

    def unencoded_group():
        prompt = unencoded(group[0].prompt)
        return [replace(sequence, prompt=prompt) for sequence in group]

    with torch.no_grad():
        old = policy.log_probs([unencoded_group()])
    advantages = torch.ones_like(old)
    advantages[::2] = -1

    def learn(log_probs):
        loss, _ = grpo_loss(log_probs, old, None, advantages, kl=0.0)
        (loss / len(old)).backward()
        policy.model.zero_grad(set_to_none=True)

    times = compare(lambda: learn(policy.log_probs([unencoded_group()])),
                    lambda: learn(padded_log_probs(policy, group)), args)
    return times, len(old)


def time_step(policy, case, args, rng):
    """A step of ours follows every step of TRL's trainer, each on a model of its own. case: tokens
    of an image, turns of a rollout"""
    image_tokens, turns = case
    shortest, longest = (50, 150) if turns == 1 else (40, 80)
    plans = rng.integers(shortest, longest + 1, (args.step_questions * GROUP, turns)).tolist()
    images = [noise(policy, IMAGES[image_tokens], rng) for _ in range(args.step_questions)]
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-6, fused=True)
    settings = argparse.Namespace(kl=0.0, micro_tokens=MICRO_TOKENS[args.device], temperature=1.0,
                                  clip_norm=1.0)

    def ours():
        groups = plan_step(policy, images, plans)
        roll_out(policy, groups)
        update(policy, None, optimizer, groups, 1e-6, settings)

    planned = sum(plan_step(policy, images, plans), [])
    lengths = [sequence.planned_length() for sequence in planned]
    timer = Alternate(ours, args.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(policy, images, plans, lengths, folder, args)
        trainer.add_callback(timer)
        trainer.train()
    return [side[1:] for side in timer.times], sum(map(sum, plans))


# ---------------------------------------------------------------------------------------- the table

BENCHMARKS = {"rollout_tiny": (time_rollout, "tiny", 16),
              "rollout_100": (time_rollout, "medium", 100),
              "rollout_400": (time_rollout, "medium", 400),
              "rollout_1500": (time_rollout, "medium", 1500),
              "update_tiny": (time_update, "tiny", (64, 100)),
              "update_64_100": (time_update, "medium", (64, 100)),
              "update_400_150": (time_update, "medium", (400, 150)),
              "update_1500_300": (time_update, "medium", (1500, 300)),
              "step_trl_100": (time_step, "medium", (100, 1)),
              "step_trl_400": (time_step, "medium", (400, 1)),
              "zoom_trl_100": (time_step, "medium", (100, TURNS)),
              "zoom_trl_400": (time_step, "medium", (400, TURNS))}
HEADS = ["", "model", "ratio", "range", "tokens/s", "theirs"]


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu",
        help="cuda: sizes of Qwen2.5-VL-3B, bfloat16 (%(default)s)")
    add("--json", metavar="FILE",
        help="write the ratios there, the seconds as `details`")
    add("--pairs", type=int, default=5, help="alternating pairs of runs (%(default)s)")
    add("--questions", type=int, default=8,
        help="questions of a rollout, half as many with 1500 image tokens (%(default)s)")
    add("--step-questions", type=int, default=16, help="questions of a GRPO step (%(default)s)")
    add("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, default=list(BENCHMARKS),
        help="some of: " + ", ".join(BENCHMARKS))
    add("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, images and lengths (%(default)s)")
    return parser.parse_args()


def main():
    args = read_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    policies = {"medium": build("medium", args.device)}
    difference = largest_difference(policies["medium"], np.random.default_rng(args.seed))
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s); rollout, update "
          f"and padded batch agree on log-probabilities to {difference:.1e} (float32)")
    if difference > 1e-4:
        sys.exit("they should agree to 1e-4: the ratios would compare different things")

    measured, rows, notes = {}, [HEADS], []
    for name in args.only:
        function, model, case = BENCHMARKS[name]
        if args.device == "cuda":
            model = "3B"
        if model not in policies:
            policies = {model: build(model, args.device)}    # one at a time
        print(f"... {name}", file=sys.stderr)
        try:
            times, tokens = function(policies[model], case, args, np.random.default_rng(args.seed))
        except ModuleNotFoundError as error:
            notes.append(f"{name}: left out, no {error.name} (pip install trl)")
            continue
        ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
        ratio = statistics.median(ratios)
        medians = [statistics.median(side) for side in times]
        measured[name] = {"ratio": ratio, "seconds": medians}
        speeds = [f"{tokens / median:,.0f}" for median in medians]
        rows.append([name, model, f"{ratio:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
                     *speeds])
    print(f"\n{table(rows)}\nmedians of {args.pairs} pairs; {GROUP} rollouts of each of "
          f"{args.questions} question(s) (rollout_1500: half), in a step of {args.step_questions}; "
          "tokens/s: sampled ones", *notes, sep="\n")
    if args.json:
        found = {name: one["ratio"] for name, one in measured.items()} | {"details": measured}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
