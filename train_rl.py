"""GRPO by hand, and the whole job: `python train_rl.py` goes from nothing to a trained policy.

In:  a task and a checkpoint (by default everything before it is made: the tiny base, tree search, supervised fine-tuning).
Out: a run folder: args.json, log.jsonl (a line a step), traces.jsonl (sampled traces with their rewards), the checkpoints
     sft/ and rl/, state.pt (to resume from), summary.json (the final table). The tiny base is in runs/tiny/.

Each process rolls out and learns from its own share of the questions, and all make the same update.

Kept of GRPO (DeepSeekMath; as the paper uses it): G traces a question, advantages relative to their group, clipped
probability ratios (0.2 below, 0.28 above, a second clip at 3 for negative advantages), a KL penalty to the SFT model by the k3
estimator inside the loss, mean over tokens, one update a batch.
Changed: one denominator for the whole update, whatever the micro-batches; traces that ran out of tokens, or of looks and had
to be asked for their answer, earn nothing, or are left out of loss and statistics (Mini-o3's way; --overlong); groups whose
rewards are all equal teach nothing and are skipped; the probabilities at sampling time are those recorded by the engine, so
no second pass computes them.
"""
import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import evaluate as evaluation
import model as models
import train_sft as sft
from evaluate import mean
from model import UserError, full_tensor
from reward import MULTI_TURN, SINGLE_TURN, Weights, score
from rollout import (OVERLONG, REPLICATED, add_arguments, dialogue_of, gather, gather_shares, is_sharded,
                     like, micro_batches, parse, rank, rollout, run, sampling_of, settings,
                     sum_over_processes, unsharded, world_size)

# ------------------------------------------------------------------------------------------------ the update


def group_advantages(rewards, counted, scale):
    """Advantages of one group: (r - mean) / (std + 1e-6) over the traces that count, 0 for the others.

    rewards: list of floats; counted: list of bools; scale False: without the division by std (Dr. GRPO)."""
    kept = [r for r, c in zip(rewards, counted) if c]
    if len(kept) < 2:
        return [0.0] * len(rewards)
    centre = sum(kept) / len(kept)
    spread = math.sqrt(sum((r - centre)**2 for r in kept) / len(kept)) + 1e-6 if scale else 1.0
    return [(r - centre) / spread if c else 0.0 for r, c in zip(rewards, counted)]


def advantages_of(scores, complete, args):
    """Advantages of one group's traces from their Scores. complete: which ended of their own accord; the others are left out
    of the statistics and get 0 (--overlong mask), or count as traces that earned nothing (--overlong zero)."""
    if args.overlong == "mask":
        return group_advantages([s.total for s in scores], complete, not args.no_std)
    rewards = [s.total if ended else 0.0 for s, ended in zip(scores, complete)]
    return group_advantages(rewards, [True] * len(rewards), not args.no_std)


def grpo_loss(new, old, ref, advantages, *, kl, clip_low=0.2, clip_high=0.28, dual_clip=3.0):
    """The summed loss of some tokens, and what to log; all arguments are (N,).

    new, old, ref: log-probabilities under the policy, at sampling time, and under the reference model (None: no penalty).
    Clipped surrogate: max(-A * ratio, -A * clip(ratio)), for negative A at most -A * dual_clip; penalty: k3 = exp(d) - d - 1
    with d = ref - new. The caller divides by the number of tokens of the whole update."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    off = ((-advantages * clipped) > (-advantages * ratio)).float()          # where the clip decides
    divergence = torch.zeros_like(new)
    if ref is not None:
        d = ref - new
        divergence = d.exp() - d - 1
        loss = loss + kl * divergence
    return loss.sum(), {"kl": divergence.detach().sum().item(), "clip": off.sum().item()}


@torch.no_grad()
def reference_log_probs(reference, batches, args, device):
    """Log-probabilities (N,) of each micro-batch under the reference model, None without one. With --reference cpu it is on the
    device only meanwhile."""
    if reference is None:
        return [None] * len(batches)
    if args.reference == "cpu":
        reference.model.to(device)
    found = [reference.log_probs(micro, args.temperature) for micro in batches]
    if args.reference == "cpu":
        reference.model.to("cpu")
    return found


def train_step(policy, reference, groups, optimizers, args, factor):
    """One update on the traces of some groups. -> what to log, of all processes

    groups: [(traces, advantages)], each process's own, or none where weights are replicated."""
    spare = None
    if is_sharded(policy):
        lists = [traces for traces, _ in groups]
        spare = [min(lists, key=lambda traces: sum(len(t.ids) for t in traces))[:1]]
    groups = [(traces, a) for traces, a in groups if any(a)]
    kept = [([t for t, x in zip(traces, a) if x], [x for x in a if x]) for traces, a in groups]
    advantage_of = {id(t): x for traces, a in kept for t, x in zip(traces, a)}
    tokens = int(sum_over_processes([sum(sum(t.sampled) for traces, _ in kept for t in traces)])[0])
    sums = {"loss": 0.0, "kl": 0.0, "clip": 0.0, "groups_used": len(kept)}
    if not tokens:
        return {**sums, "grad_norm": 0.0, "tokens": 0}
    batches = micro_batches([traces for traces, _ in kept], args.micro_tokens, spare)
    references = reference_log_probs(reference, [micro for micro, _ in batches], args, policy.device)
    policy.model.train()
    for (micro, counts), ref in zip(batches, references):
        flat = [(trace, log_prob) for traces in micro for trace in traces
                for log_prob, sampled in zip(trace.log_probs, trace.sampled) if sampled]
        old = torch.tensor([log_prob for _, log_prob in flat], device=policy.device)
        advantages = torch.tensor([advantage_of.get(id(trace), 0.0) for trace, _ in flat], device=policy.device)
        loss, logged = grpo_loss(policy.log_probs(micro, args.temperature), old, ref, advantages, kl=args.kl)
        (loss * counts * world_size() / tokens).backward()  # gradients are averaged over processes
        for name, value in {"loss": loss.item(), **logged}.items():
            sums[name] += value * counts / tokens
    policy.model.eval()
    norm = sft.optimizer_step(policy.trainable(), optimizers, factor, args.clip_norm)
    of_all = dict(zip(sums, sum_over_processes(list(sums.values()))))
    return {**of_all, "groups_used": int(of_all["groups_used"]), "grad_norm": norm, "tokens": tokens}


def add_up(updates):
    """What to log of a step's updates: counts are added, all else is averaged."""
    counts = ("groups_used", "tokens")
    return {name: (sum if name in counts else mean)([u[name] for u in updates]) for name in updates[0]}


# ------------------------------------------------------------------------------------------------ what it needs of a GPU

TEXT = 512                  # tokens of a prompt beside its image's: system prompt and question
ROOM = 0.9                  # share of a GPU's memory that can be planned with; the rest is CUDA's own, and fragments


def count_parameters(config):
    """(all, of the vision tower, of the largest matrix): of a model that is never filled with weights."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    named = [(name, p.numel()) for name, p in model.named_parameters()]
    return sum(n for _, n in named), sum(n for name, n in named if ".visual." in name), max(n for _, n in named)


def update_bytes(config, prompt, group, response, groups=1, width=2):
    """Bytes at the peak of a forward and backward pass with gradient checkpointing, beside weights, gradients and optimizer.

    config: of the language model; prompt, response: tokens; group: responses a prompt; groups: in the pass; width: bytes of a
    number. Kept is one hidden state a layer and token, and two more at the ends. Then comes the larger of
    - one layer, run again and differentiated: a token has 6 numbers for each inner unit of the MLP, 8 for each hidden unit, 3
      for each of the queries, keys and values (where a number has 2 bytes: and 4 float32 ones a hidden unit, of the norms); a
      response has its prompt's keys and values and its own once more;
    - the logits of the responses, MAX_LOGITS at most at a time: 3 times in float32 and once in `width`; and once more the
      gradient of the output matrix."""
    hidden, tokens = config.hidden_size, groups * (prompt + group * response)
    kv = 2 * hidden // config.num_attention_heads * config.num_key_value_heads
    kept = (config.num_hidden_layers + 2) * tokens * hidden * width
    layer = tokens * (width * (6 * config.intermediate_size + 11 * hidden + 3 * kv) + 16 * hidden * (width < 4))
    layer += groups * group * (prompt + response) * kv * width
    logits = min(models.MAX_LOGITS, groups * group * response * config.vocab_size) * (12 + width)
    return kept + max(layer, logits + config.vocab_size * hidden * width)


def memory(config, counts, args, width=2):
    """GPU memory of one of args.gpus processes, {what for: GiB}; an estimate, on the safe side.

    counts: of `count_parameters`; width: bytes of a weight. A group is a prompt (an image of --max-pixels and TEXT tokens) and
    --group responses of --response-tokens, all as long as they may be.
    - weights, gradients, AdamW's two moments, reference model: parameters x bytes / processes (a frozen vision tower: whole).
    - cache: keys and values, layers x heads x size of a head x 2 a column; --cache-tokens columns, or what one group needs.
    - features: what the frozen vision tower made of a step's images and close-ups is kept until the update is done; and so are
      their pixels, in bytes, in the host's memory.
    - roll-out: all but gradients, the whole weights of every process, and the largest of: reading the prompts of all groups in
      flight, reading a close-up of every row (3 numbers an inner unit of the MLP and 6 a hidden unit for each token, the norms'
      in float32), decoding (attention scores of one layer, logits of every row), and a pass of the vision tower.
    - update: all but the cache, with `update_bytes` of --micro-tokens, or of one group if that is longer. With several
      processes: two layers and the embeddings gathered, with gradients. --reference cpu: its pass, before any gradients."""
    total, tower, largest = counts
    text, vision = config.text_config, config.vision_config
    hidden, layers, heads, one = text.hidden_size, text.num_hidden_layers, text.num_attention_heads, args.gpus == 1
    side = vision.patch_size * vision.spatial_merge_size                                   # px a token
    image, norms = args.max_pixels // side**2, 8 * (width < 4)
    shown = math.ceil(args.crop_size / side)**2 if args.mode == "zoom" else 0              # tokens of a close-up
    prompt, seen = image + TEXT, image + args.group * args.max_crops * shown               # seen: image tokens of a group
    longest = prompt + args.group * args.response_tokens
    groups = max(1, args.micro_tokens // longest)                                          # of a pass of the update
    asked = math.ceil(args.questions / args.gpus)
    slots = min(max(1, args.cache_tokens // longest), asked)                               # groups in flight
    trained = total if args.train_vision else total - tower
    moments = 8 if width == 4 or args.adam_dtype == "float32" else 4

    def reading(tokens, config, units):                                                    # a pass without gradients
        return tokens * (width * (3 * config.intermediate_size + 6 * units) + norms * units)

    frozen = total - trained                                                               # is whole in every process
    weights, gradients = (frozen + trained / args.gpus) * width, trained * width / args.gpus
    states = (trained * moments if args.optimizer == "adamw" else (trained - largest) * width + largest * moments) / args.gpus
    reference = weights if args.kl else 0
    column = 2 * layers * text.num_key_value_heads * (hidden // heads) * width
    cache = max(args.cache_tokens, longest) * column
    features = 0 if args.train_vision else asked * seen * hidden * width
    kept = states + features + (reference if args.reference == "gpu" else 0)               # in both phases
    merged = vision.spatial_merge_size**2                                                  # patches a token; below: in a pass
    patches = min(max(models.MAX_VISION_PATCHES, image * merged), slots * image * merged)
    decoding = slots * args.group * (heads * (prompt + args.response_tokens) * (2 * width + 8) + 4 * text.vocab_size * 4)
    working = max(reading(slots * prompt, text, hidden), reading(slots * args.group * shown, text, hidden), decoding,
                  reading(patches, vision, vision.hidden_size))
    roll_out = kept + weights + (0 if one else trained * width) + cache + working
    gathered = 0 if one else 2 * width * (2 * (total - tower) / layers + largest + args.train_vision * tower)
    update = kept + weights + gradients + gathered + update_bytes(text, prompt, args.group, args.response_tokens, groups, width)
    if args.train_vision:                                                                  # its blocks are checkpointed too
        units = width * 6 * vision.intermediate_size + (width * (vision.depth + 8) + 2 * norms) * vision.hidden_size
        update += groups * seen * merged * units
    alone = kept + weights + reference + reading(groups * longest, text, hidden) + 16 * models.MAX_LOGITS
    update = max(update, alone if args.reference == "cpu" else 0)
    pixels = asked * seen * 3 * side**2
    found = {"weights": weights, "gradients": gradients, "optimizer": states, "reference": reference, "features": features,
             "cache": cache, "cache of one group": longest * column, "roll-out": roll_out, "update": update, "pixels": pixels}
    return {name: value / 2**30 for name, value in found.items()}


def advice(config, counts, args, room):
    """What to change so that the peak is at most `room` GiB: flags, those that change no result first; or more processes."""
    def peak(**changes):
        found = memory(config, counts, argparse.Namespace(**{**vars(args), **changes}))
        return max(found["roll-out"], found["update"])
    order = [(name, getattr(args, name) // 2**k) for name in ("cache_tokens", "micro_tokens") for k in (1, 2, 3, 4)]
    order += [("reference", "cpu")] * (args.gpus == 1) + [("adam_dtype", "bfloat16")]
    order += [(name, max(2, getattr(args, name) * k // 4)) for name in ("response_tokens", "group") for k in (3, 2)]
    changes = {}
    for name, value in 2 * order:                    # twice: what did not help at first may be what is left
        if peak(**changes) > room and peak(**{**changes, name: value}) < peak(**changes):
            changes[name] = value
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
    more = [n for n in (2, 4, 8, 16) if n > args.gpus and peak(gpus=n, reference="gpu") <= room]
    ways = [flags] * (peak(**changes) <= room) + [f"torchrun --nproc-per-node {n}" for n in more[:1]]
    return "it fits with " + ", or with ".join(ways) if ways else "no flags make it fit; take a smaller model or --max-pixels"


def dry_run(args):
    """Prints what the job needs of a GPU, from the checkpoint's config alone. Raises UserError where it does not fit."""
    if not args.model:
        raise UserError("--dry-run needs --model; the tiny base fits anywhere")
    config = models.read_config(args.model)
    counts = total, tower, _ = count_parameters(config)
    try:
        if not args.max_pixels:
            args.max_pixels = Qwen2VLImageProcessorPil.from_pretrained(args.model).size["longest_edge"]
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model}: no config of an image processor ({str(error).splitlines()[0]})") from error
    need = memory(config, counts, args)
    gib = torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else args.gpu_gib
    trained = total if args.train_vision else total - tower
    print(f"{total:,} parameters, {tower:,} of the vision tower; {trained:,} are trained\n"
          f"estimated GiB on each of {args.gpus} GPU(s), weights in bfloat16:")
    for name, value in need.items():
        note = {"roll-out": " at its peak", "update": " at its peak", "pixels": " of the host's memory"}.get(name, "")
        print(f"  {name:<18}  {value:8.2f}{note}")
    phase = max("roll-out", "update", key=need.get)
    print(f"  {'to be had':<18}  {ROOM * gib:8.2f} of {gib:.1f}")
    if need[phase] > (room := ROOM * gib):
        raise UserError(f"the {phase} needs {need[phase]:.1f} GiB of {room:.1f}; {advice(config, counts, args, room)}")


# ------------------------------------------------------------------------------------------------ the job

# What goes with the tiny base, and with --model (paper, appendix), where no flag says otherwise.
TINY = dict(steps=160, questions=16, group=8, warm_up=5, final_lr=0.0, kl=0.05, clip_norm=1.0, diversity=0.0, overlong="zero")
PAPER_SINGLE = dict(steps=500, questions=128, update_questions=64, group=5, warm_up=0, final_lr=1.0, kl=0.01, clip_norm=1.0,
                    diversity=0.0, overlong="mask")
PAPER_MULTI = PAPER_SINGLE | dict(group=8, warm_up=None, clip_norm=0.2, diversity=0.2)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a visually grounded policy with GRPO. Called with nothing, it makes "
                                     "the tiny base, searches for traces, fine-tunes on them, and goes on to GRPO.")
    add_arguments(parser)
    sft.add_training_arguments(parser)
    add = parser.add_argument
    add("--steps", type=int, help="GRPO steps (tiny base 160, with --model 500)")
    add("--questions", type=int, help="questions a step (tiny base 16, with --model 128)")
    add("--update-questions", type=int, help="questions an update (tiny base all, with --model 64)")
    add("--group", type=int, help="traces a question (8; with --model and a single turn 5)")
    add("--lr", type=float, help="learning rate (Muon 3e-3, AdamW 1e-6)")
    add("--adamw-lr", type=float, default=4e-4, help="with Muon: learning rate of all but the hidden matrices (%(default)s)")
    add("--warm-up", type=int, help="steps until the learning rate is reached (5; with --model a twentieth, single-turn none)")
    add("--final-lr", type=float, help="share of the learning rate at the end (tiny base 0, with --model 1)")
    add("--kl", type=float, help="coefficient of the KL penalty to the SFT model; 0: none (tiny base 0.05, with --model 0.01)")
    add("--reference", choices=("gpu", "cpu"), default="gpu", help="where the SFT model's weights are between the "
        "passes that need them; cpu frees their part of the GPU's memory the rest of the time (%(default)s)")
    add("--clip-norm", type=float, help="norm to which gradients are clipped (1; with --model in the mode zoom 0.2)")
    add("--diversity", type=float, help="reward of a further distinct look, as a share of the format reward; it fades out by "
        "half-time (tiny base 0, with --model 0.2)")
    add("--overlong", choices=("mask", "zero"), help="traces that ran out of tokens or looks: left out of loss and statistics, "
        "or reward 0 (tiny base zero, with --model mask)")
    add("--no-std", action="store_true", help="advantages without the division by the group's standard deviation")
    add("--eval-n", type=int, default=1024, help="held-out questions of the final table (%(default)s)")
    add("--eval-task", metavar="FILE", help="questions of the final table (a tenth of --task, held out)")
    add("--save-every", type=int, default=25, help="steps between checkpoints to resume from (%(default)s)")
    add("--show-every", type=int, default=50, help="steps between traces printed in full (%(default)s)")
    add("--dry-run", action="store_true", help="print the settings and the GPU memory that the job needs (bfloat16: 2 bytes a "
        "weight, 2 its gradient, 8 or 4 AdamW's moments, 2 the reference model), and stop")
    add("--gpu-gib", type=float, default=80, help="of --dry-run where there is no GPU: memory of one, GiB (%(default)s)")
    add("--gpus", type=int, help="of --dry-run: GPUs, each with a process of its own (the processes that torchrun started)")
    args = sft.finish_arguments(parse(parser))
    defaults = TINY if not args.model else PAPER_MULTI if args.mode == "zoom" else PAPER_SINGLE
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lr = args.lr or {"muon": 3e-3, "adamw": 1e-6}[args.optimizer]
    args.warm_up = round(args.steps / 20) if args.warm_up is None else args.warm_up
    args.update_questions = args.update_questions or args.questions
    args.gpus = args.gpus or world_size()
    for name in ("questions", "update_questions", "group", "steps", "eval_n", "save_every", "show_every", "gpus", "gpu_gib"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.group < 2:
        raise UserError("--group must be at least 2: advantages compare the traces of a group")
    uneven = args.questions % args.gpus or args.update_questions % args.gpus
    if args.gpus > 1 and (uneven or args.reference == "cpu") and will_be_sharded(args):
        if uneven:
            raise UserError(f"--questions {args.questions} and --update-questions "
                            f"{args.update_questions} must be multiples of the number of "
                            f"processes, {args.gpus}")
        raise UserError("--reference cpu is for one process; with several the reference model's "
                        "weights are shared out anyway")
    try:
        weights_at(args, 0)
    except ValueError as error:
        raise UserError(f"--diversity {args.diversity}: {error}") from None
    return args


def will_be_sharded(args):
    """Whether several processes shard the model, by its config. Raises UserError."""
    return args.model is not None and count_parameters(models.read_config(args.model))[0] > REPLICATED


def weights_at(args, step):
    """The reward's weights; the bonus for distinct looks fades out linearly by half-time."""
    if args.mode != "zoom":
        return SINGLE_TURN
    return Weights(MULTI_TURN.correct, MULTI_TURN.format, args.diversity * max(0.0, 1 - 2 * step / args.steps),
                   MULTI_TURN.max_extra, min_distance=10)


def train(policy, reference, args, out):
    """The GRPO loop."""
    dialogue = dialogue_of(args)
    optimizers = sft.make_optimizers(policy, args.optimizer, args.lr, args.adamw_lr, args.adam_dtype)
    first = restore(policy, optimizers, out) if args.resume else 0
    started = time.time()
    for step in range(first, args.steps):
        begun = time.time()
        questions = evaluation.questions_of(args, "train", args.questions, args.search_questions + step * args.questions)
        seeds = [f"GRPO {args.seed} {step} {i}" for i in range(args.questions)]
        mine = slice(rank(), None, world_size())
        with unsharded(policy):
            groups = list(rollout(policy, questions[mine], dialogue, args.group, seeds[mine], **sampling_of(args)))
        number = {question: i for i, question in enumerate(questions)}
        groups.sort(key=lambda traces: number[traces[0].question])  # they come as they end
        sampled = time.time() - begun

        weights = weights_at(args, step)
        scored = [(traces, [score(t, weights) for t in traces]) for traces in groups]
        counted = [[t.ended not in OVERLONG for t in traces] for traces in groups]
        advantages = [advantages_of(scores, ok, args) for (_, scores), ok in zip(scored, counted)]
        factor = sft.learning_rate(step, args.steps, max(1, args.warm_up), args.final_lr)
        updates = []
        for first_of_update in range(0, args.questions, args.update_questions):
            share = range(first_of_update, first_of_update + args.update_questions)
            pairs = [(traces, a) for (traces, _), a in zip(scored, advantages)
                     if number[traces[0].question] in share]
            updates.append(train_step(policy, reference, pairs, optimizers, args, factor))
        learnt = add_up(updates)

        rows = [[(row_of(t), s) for t, s in zip(traces, scores)] for traces, scores in scored]
        flat = sum(gather_shares(rows), [])
        counted = gather_shares(counted)
        line = {"step": step + 1, "reward": mean(s.total for _, s in flat), "accuracy": mean(s.correct for _, s in flat),
                "format": mean(s.format for _, s in flat), "grounded": mean(s.grounded for _, s in flat),
                "diversity": mean(s.diversity for _, s in flat), "crops": mean(s.crops for _, s in flat),
                "overlong": 1 - mean(ok for row in counted for ok in row), **measured(row for row, _ in flat), **learnt, "lr": args.lr * factor,
                "seconds": time.time() - begun, "sampling_seconds": sampled}
        if rank() == 0:
            keep_log(out, line, flat)
        print_line(line, args, sft.remaining(started, step + 1 - first, args.steps - first))
        if step % args.show_every == 0 and rank() == 0:
            trace, s = scored[0][0][0], scored[0][1][0]
            print(f"\n{trace.text()}\n-> truth: {trace.question.answer}; reward {s.total:.2f} = correct {s.correct:.0f}, "
                  f"format {s.format:.0f}, grounded {s.grounded:.0f}, diversity {s.diversity:.2f} {s.why}\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            keep_state(policy, optimizers, out, step + 1)


def print_line(line, args, left):
    print(f"step {line['step']}/{args.steps}  reward {line['reward']:.3f}  accuracy {line['accuracy']:.3f}  "
          f"format {line['format']:.2f}  grounded {line['grounded']:.2f}  looks {line['crops']:.2f}  "
          f"overlong {line['overlong']:.2f}  "
          + "".join(f"{name.replace('_', ' ')} {line[name]:.2f}  " for name in ("on_target", "true_thoughts") if name in line)
          + f"tokens {line['tokens']}  kl {line['kl']:.3f}  clip {line['clip']:.3f}  "
          f"grad {line['grad_norm']:.2f}  {line['seconds']:.2f} s  ({left})", flush=True)


def keep_log(out, line, flat):
    """Appends the step to log.jsonl and its traces to traces.jsonl."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with open(out / "traces.jsonl", "a") as file:
        for row, s in flat:
            file.write(json.dumps({"step": line["step"], **row, **asdict(s)}, default=str) + "\n")


def row_of(trace):
    """What traces.jsonl has of a trace, beside its score."""
    return {"id": trace.question.id, "question": trace.question.text, "truth": trace.question.answer,
            "turns": [t.text for t in trace.turns], "ended": trace.ended, "on_target": evaluation.targets_hit(trace),
            "true_thoughts": evaluation.true_thoughts(trace)}


def measured(rows):
    """What is true of the traces of some rows, where it is known: shares of points on target and of true thoughts."""
    rows = list(rows)
    values = {name: [value for row in rows for value in row[name]] for name in ("on_target", "true_thoughts")}
    return {name: mean(found) for name, found in values.items() if found}


def keep_state(policy, optimizers, out, step):
    """state.pt: all that is needed to go on after `step`, with any number of processes; written whole."""
    def gathered(x):                # one tensor at a time; only the first process keeps it, in the host's memory
        x = full_tensor(x)
        return x if not torch.is_tensor(x) else x.cpu() if rank() == 0 else None
    state = tree_map(gathered, {"model": policy.model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]})
    if rank() == 0:
        torch.save({"step": step, **state}, out / "state.pt.part")
        models.replace(out / "state.pt.part", out / "state.pt")


def restore(policy, optimizers, out):
    """Goes back to the last state kept, and drops what was logged after it. -> the number of steps done"""
    path = out / "state.pt"
    if not path.is_file():
        step = 0
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            parts = policy.model.state_dict()
            policy.model.load_state_dict({name: like(x, parts[name]) for name, x in state["model"].items()})
            for optimizer, kept in zip(optimizers, state["optimizers"]):
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for i, of_p in kept["state"].items():
                    of_p.update({k: like(x, params[i]) for k, x in of_p.items() if getattr(x, "shape", 0) == params[i].shape})
                optimizer.load_state_dict(kept)
        except Exception as error:
            raise UserError(f"{path}: cannot be resumed from ({str(error).splitlines()[0]}); "
                            "delete it to start GRPO again") from error
        step = state["step"]
    for name in ("log.jsonl", "traces.jsonl"):
        if rank() == 0 and (out / name).is_file():
            lines = [row for row in (out / name).read_text().splitlines(keepends=True) if row.endswith("\n")]
            models.write_text(out / name, "".join(row for row in lines if json.loads(row)["step"] <= step))
    print(f"resuming after step {step}")
    return step


def check_arguments(args, out):
    """A run is resumed as it was begun: other arguments would not give the result of either."""
    free = {"resume", "out", "eval_n", "save_every", "show_every", "micro_tokens", "cache_tokens", "reference", "given",
            "dry_run", "gpus", "gpu_gib"}
    try:
        began = json.loads((out / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'args.json'}: cannot be read ({error}); there is nothing to resume, so leave out "
                        "--resume") from None
    other = [f"--{k.replace('_', '-')} {began.get(k)}" for k, v in vars(args).items() if k not in free and began.get(k) != v]
    if other:
        raise UserError(f"{out} was begun with {', '.join(other)}; resume it with the same, or give another --out")


def final_table(args, stages, out):
    """Evaluates the checkpoints {name: path} on held-out questions, prints the table and writes summary.json."""
    if args.eval_task:
        questions = evaluation.open_file(args.eval_task, args.image_root, args.eval_n)
    else:
        questions = evaluation.questions_of(args, "test", args.eval_n)
    summary, rows, seed = {}, [[*evaluation.HEADS, "minutes"]], f"test {args.seed}"
    for name, path in stages.items():
        policy, notes = models.load(str(path), max_pixels=args.max_pixels), Path(path) / "notes.json"
        minutes = json.loads(notes.read_text()).get("minutes", 0.0) if notes.is_file() else 0.0
        found, bare = (evaluation.evaluate(policy, questions, dialogue_of(args, tool), seed, **sampling_of(args))
                       for tool in (True, False))
        summary[name] = {**vars(found), "accuracy_no_tool": bare.accuracy, "minutes": minutes}
        rows.append([*evaluation.cells(name, found, bare), f"{minutes:.1f}"])
    print(f"\n{len(questions)} held-out questions, temperature {args.temperature:g}:\n" + evaluation.table(rows))
    if args.task in evaluation.TOYS and not args.eval_task:
        dialogue = dialogue_of(args)
        blind = {looks: evaluation.blind_accuracy(questions, dialogue, looks) for looks in (0, 1, 4)}
        summary["blind"] = blind
        print("a blind player with 0 / 1 / 4 looks at random places: " + " / ".join(f"{b:.3f}" for b in blind.values()))
    if rank() == 0:
        models.write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")


def main():
    args = parse_arguments()
    print(settings(args))
    if args.dry_run:
        return dry_run(args)
    out = sft.folder_of(args)
    if not args.resume and any((out / name).exists() for name in ("log.jsonl", "state.pt", "rl")):
        raise UserError(f"{out} holds a run already; give --resume to go on with it, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        check_arguments(args, out)
    gather(None)                                    # all have read what an earlier run left
    if rank() == 0:
        models.write_text(out / "args.json", json.dumps(vars(args), indent=1) + "\n")
    base = sft.warm_start(args, print)
    policy = sft.load_trainable(args, out / "sft")
    reference = sft.load_trainable(args, out / "sft") if args.kl else None
    if reference and args.reference == "cpu":
        reference.model.to("cpu")
    train(policy, reference, args, out)
    gather(None)                                    # the log is whole
    seconds = sum(json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines())
    policy.save(out / "rl", minutes=seconds / 60)
    gather(None)
    final_table(args, {"base": base, "sft": out / "sft", "rl": out / "rl"}, out)


if __name__ == "__main__":
    run(main)
