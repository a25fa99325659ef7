"""GRPO by hand, and the whole job: tree search, fine-tuning, reinforcement learning, final table.

    python train_rl.py                                     (the tiny run of tests/tiny/recipe.json)
    python train_rl.py --model PATH --task FILE --image-root FOLDER --out FOLDER

In:  a checkpoint and a file of questions.
Out: a run folder: args.json, log.jsonl (a line a step), traces.jsonl (every trace with its reward),
     search.jsonl and trees.txt (of the warm start), the checkpoints sft/ and rl/, state.pt (to
     resume from), report.html, summary.json (the final table).

Kept of GRPO, as the paper has it: G traces a question, advantages relative to their group, clipped
probability ratios (0.2 below, 0.28 above, a second clip at 3 for negative advantages), a KL penalty
to the fine-tuned policy inside the loss (k3, 0.01), the mean over all tokens, AdamW at a constant
rate after a warm-up, one epoch.
Changed: one denominator for the whole update, whatever the micro-batches; the log-probabilities at
sampling time are those that the engine recorded, so no second pass computes them; sampled with
top-p 1 where the paper has 0.99, for what is trained has to be what was sampled from; the bonus for
distinct crops is bounded, and fades out by half-time.

Each process samples and learns from its own share of the questions, and all make the same update.
"""
import argparse
import gc
import json
import math
import time
from dataclasses import replace
from itertools import compress
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch.distributed.checkpoint import state_dict

from evaluate import (
    HEADS,
    PAGE_TRACES,
    cells,
    eval_flags,
    evaluate,
    figures,
    settle,
    shown,
    table,
    write_report,
)
from model import (
    Chunk,
    gather,
    gather_shares,
    is_sharded,
    load,
    move_into_place,
    rank,
    read_json,
    sum_over_processes,
    unsharded,
    world_size,
    write_text,
)
from reward import MULTI_TURN, SINGLE_TURN, row_of, score
from rollout import (
    Trace,
    describe_settings,
    input_limits,
    number,
    parse,
    rollout,
    run_script,
    sampling_of,
    shared_flags,
    visible,
    whole,
    writing,
)
from train_sft import (
    check_finite,
    count_skipped,
    make_optimizer,
    micro_batches,
    open_run,
    optimizer_step,
    questions_of,
    reading_back,
    remaining,
    save_checkpoint,
    sft_flags,
    warm_start,
)


def rl_flags(parser):
    """Adds the flags of GRPO; the defaults are the paper's, for several turns."""
    add = parser.add_argument_group("reinforcement learning").add_argument
    add("--steps", type=whole(1), default=500, help="of sampling and learning")
    add("--questions", type=whole(1), default=128, help="sampled a step")
    add("--update-questions", type=whole(1), default=64, help="of these, learnt from an update")
    add("--group", type=whole(2), default=8, help="traces of a question")
    add("--lr", type=number(most=1e30), default=1e-6, help="constant after the warm-up")
    add("--warm-up", type=whole(0), default=25, help="steps of linear warm-up")
    add("--kl", type=number(), default=0.01, help="weight of the KL penalty; 0: no reference model")
    add("--clip-norm", type=number(), default=0.2, help="the gradient's norm is clipped to this")
    # with more, a wrong trace could score above a right one: see reward.Weights
    add("--diversity", type=number(0, 0.25), default=0.2,
        help="bonus for each further distinct crop; fades out by half-time")
    add("--eval-task", default="", help="questions of the final table (none: a tenth of --task)")
    add("--save-every", type=whole(1), default=25, help="steps between states to resume from")


# ------------------------------------------------------------------------------ advantages and loss

def group_advantages(rewards):
    """Advantages of the traces of one question: (r - mean) / (std + 1e-6), with the group's own std
    (divided by G); exactly 0 where all rewards are equal. [1, 0, 0, 1] -> [1, -1, -1, 1]"""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, std = fmean(rewards), pstdev(rewards)
    return [(reward - mean) / (std + 1e-6) for reward in rewards]


def grpo_loss(new, old, ref, advantages, *, kl, clip_low=0.2, clip_high=0.28, dual_clip=3.0):
    """The summed loss of some tokens, and sums to log; all arguments are (N,).

    new, old, ref: log-probabilities under the policy, at sampling time, and under the reference
    model (None: no penalty). Clipped surrogate: max(-A * ratio, -A * clip(ratio)), for negative A
    at most -A * dual_clip. Penalty: exp(d) - d - 1 with d = ref - new (k3). The caller divides by
    the number of tokens of the whole update."""
    ratio = (new - old).exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(surrogate, clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    sums = {"kl": 0.0, "clip": (clipped > surrogate).sum().item(),
            "drift": (new - old).abs().sum().item()}
    if ref is not None:
        d = ref - new
        k3 = d.exp() - d - 1
        loss = loss + kl * k3
        sums["kl"] = k3.sum().item()
    return loss.sum(), sums


# --------------------------------------------------------------------------------------- the update

def update(policy, reference, optimizer, groups, lr, args):
    """One step of the optimizer, on groups of traces with advantages. -> {name: value} to log, of
    all processes; where "grad_norm" is not finite, no step was made

    groups: this process's share, perhaps none."""
    sums = dict.fromkeys(("loss", "kl", "clip", "drift", "grad_norm"), 0.0)
    tokens = sum(sum(trace.sampled) for traces in groups for trace in traces)
    if reference is None:                   # then a trace without an advantage adds nothing
        groups = [[trace for trace in traces if trace.advantage] for traces in groups]
        groups = [traces for traces in groups if traces]
    # One denominator, the tokens of all traces of all processes: a token counts the same in a small
    # and in a large micro-batch, and on every process.
    tokens, learnt = map(int, sum_over_processes([tokens, len(groups)]))
    if not learnt:
        return sums | {"tokens": tokens}

    policy.train()
    # Sharded processes have to make the same number of passes: who has fewer, passes a token of
    # weight 0.
    one_token = Trace(Chunk([0]), ids=[0], sampled=[True], log_probs=[0.0])
    filler = [[one_token]] if is_sharded(policy) else None
    for batch in micro_batches(groups, args.micro_tokens, filler):
        old, advantages = [], []            # of each sampled token
        for trace in sum(batch.groups, []):
            old += compress(trace.log_probs, trace.sampled)
            advantages += [trace.advantage] * sum(trace.sampled)
        old = torch.tensor(old, device=policy.device)                       # (N,)
        advantages = torch.tensor(advantages, device=policy.device)         # (N,)
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref = reference.log_probs(batch.groups, args.temperature)
        new = policy.log_probs(batch.groups, args.temperature)
        loss, batch_sums = grpo_loss(new, old, ref, advantages, kl=args.kl)
        (loss * batch.weight / tokens).backward()
        for name, value in {"loss": loss.item(), **batch_sums}.items():
            sums[name] += value * batch.weight / tokens
    policy.eval()

    totals = dict(zip(sums, sum_over_processes(list(sums.values())), strict=True))
    grad_norm = optimizer_step(policy, optimizer, lr, args.clip_norm)
    return {**totals, "grad_norm": grad_norm, "tokens": tokens}


# ----------------------------------------------------------------------------------------- the loop

def train(policy, reference, dialogue, args, out):
    """The GRPO loop. Raises UserError where the numbers stop being finite."""
    optimizer = make_optimizer(policy, args.lr)
    first = restore(policy, optimizer, out) if args.resume else 0
    started = time.monotonic()
    norms = []                              # of the gradients of all updates
    for step in range(first, args.steps):
        step_started = time.monotonic()

        # Sample: G traces of each question, of those behind the ones that were searched. Numbers
        # belong to questions, so that processes can share them and sample what one would.
        begin = args.search_questions + step * args.questions
        questions = questions_of(args, "train", args.questions, begin)
        numbers = range(rank(), len(questions), world_size())          # of this process's share
        seeds = [f"GRPO {args.seed} {step} {i}" for i in numbers]
        with unsharded(policy):
            groups = rollout(policy, [questions[i] for i in numbers], dialogue, args.group, seeds,
                             **sampling_of(args))
        sampling_seconds = time.monotonic() - step_started

        # Score: overlong traces, too, as they stand. The bonus for distinct crops fades out, for it
        # is to make the policy try them, not to pay for them.
        weights = SINGLE_TURN
        if args.mode == "zoom":
            fade = max(0.0, 1 - 2 * step / args.steps)
            weights = replace(MULTI_TURN, diversity=args.diversity * fade)
        for trace in sum(groups, []):
            trace.score = score(trace, weights)

        # Advantages: each trace against the others of its question.
        for traces in groups:
            advantages = group_advantages([trace.score.total for trace in traces])
            for trace, advantage in zip(traces, advantages, strict=True):
                trace.advantage = advantage

        # Update: the step's questions in parts. A gradient that is not finite is left out, by all
        # processes alike.
        lr = args.lr * min(1, (step + 1) / max(1, args.warm_up))
        updates = []
        for part in range(0, len(questions), args.update_questions):
            learnt = [traces for i, traces in zip(numbers, groups, strict=True)
                      if part <= i < part + args.update_questions]
            updates.append(update(policy, reference, optimizer, learnt, lr, args))
            norms.append(updates[-1]["grad_norm"])
            count_skipped(norms, "--lr")

        # Log every trace, and save a state to go on from.
        rows = gather_shares([[row_of(trace) for trace in traces] for traces in groups])
        seconds = time.monotonic() - step_started
        line = {"step": step + 1, **describe(rows, updates), "lr": lr, "seconds": seconds,
                "sampling_seconds": sampling_seconds}
        print_line(line, args.steps, remaining(started, step + 1 - first, args.steps - first))
        if rank() == 0:
            numbered = [{"step": step + 1, **row} for row in sum(rows, [])]
            with writing(out / "traces.jsonl"):
                append_rows(out / "log.jsonl", [line])
                append_rows(out / "traces.jsonl", numbered)
            if step % args.save_every == 0:
                trace = groups[0][0]
                print(f"\n{visible(trace.text())}\n{trace.score}; truth: {trace.question.answer}\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(policy, optimizer, out, step + 1)
            if rank() == 0:
                some = [traces[0] for traces in groups[:PAGE_TRACES]]
                report(out, args, [], {f"step {step + 1}": some})


# ----------------------------------------------------------------------------------- what is logged

LOGGED = ("reward", "accuracy", "ci95", "format", "grounded", "diversity", "zoom_calls",
          "several_crops", "overlong", "on_target", "true_thoughts", "regions", "subgoals",
          "verifications", "backtracks")                               # of `evaluate.figures`
SHOWN = {"reward": ".3f", "accuracy": ".3f", "format": ".2f", "grounded": ".2f",
         "zoom_calls": ".2f", "overlong": ".2f", "on_target": ".2f", "true_thoughts": ".2f",
         "signal": ".2f", "kl": ".4f", "clip": ".3f", "grad_norm": ".2f"}


def describe(rows, updates):
    """The figures of a step's traces, and means over the updates that were made. signal: share of
    questions whose traces differ in reward; skipped: updates left out; drift: of log-probabilities
    from the recorded ones, which in a step's first update should be roundings."""
    found = figures(rows)
    line = {name: found[name] for name in LOGGED}
    line["signal"] = fmean(len({row["total"] for row in samples}) > 1 for samples in rows)
    line["tokens"] = sum(one["tokens"] for one in updates)
    made = [one for one in updates if math.isfinite(one["grad_norm"])]
    line["skipped"] = len(updates) - len(made)
    for name in ("loss", "kl", "clip", "drift", "grad_norm"):
        line[name] = fmean(one[name] for one in made) if made else None
    return line


def print_line(line, steps, left):
    values = [f"{name.replace('_', ' ')} {line[name]:{form}}" for name, form in SHOWN.items()
              if line[name] is not None]
    if line["skipped"]:
        values.append(f"skipped {line['skipped']} (not finite)")
    print(f"step {line['step']}/{steps}  {'  '.join(values)}  {line['seconds']:.2f} s  ({left})",
          flush=True)


def append_rows(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_log(path):
    with reading_back(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(out, args, table_rows, traces):
    """Writes the run's page."""
    trees = out / "trees.txt"               # not there with --traces
    tree = trees.read_text(encoding="utf-8").partition("\n\n")[0] if trees.is_file() else ""
    charts = curves(read_log(out / "log.jsonl"))
    with writing(out / "report.html"):
        write_report(out / "report.html", f"{args.task}, {args.mode}", vars(args), charts,
                     table_rows, tree, traces)


def curves(log_rows):
    """All figures of a log as charts, in HTML. log_rows: dicts with a "step"."""
    names = dict.fromkeys(name for row in log_rows for name in row if name != "step")
    return [curve(name, log_rows) for name in names]


def curve(name, log_rows):
    """A figure of a log as a chart, with its bounds and the last value; "" where it has none."""
    points = [(row["step"], row[name]) for row in log_rows
              if type(row.get(name)) in (int, float) and math.isfinite(row[name])]
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    low = min(0, *values)
    high = max(0, *values)
    across = steps[-1] - steps[0] or 1
    up = high - low or 1
    line = " ".join(f"{step},{-value}" for step, value in points)
    return (f"<figure><b>{shown(name)}</b>, at last {values[-1]:.4g}"
            f'<svg viewBox="{steps[0]} {-low - up} {across} {up}" preserveAspectRatio="none">'
            f'<polyline points="{line}" vector-effect="non-scaling-stroke"/></svg>'
            f"from {low:.3g} to {high:.3g}, steps {steps[0]} to {steps[-1]}</figure>")


# ---------------------------------------------------------------------------------- save and resume

def save_state(policy, optimizer, out, step):
    """state.pt: all that is needed to go on after `step`, with any number of processes. Raises
    UserError where weights are not finite, or the disk is full."""
    check_finite(policy.trainable())
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = state_dict.get_state_dict(policy, optimizer, options=options)
    if rank() == 0:
        state = {"step": step, "policy": weights, "optimizer": moments}
        with writing(out / "state.pt"):
            torch.save(state, out / "state.pt.part")
            move_into_place(out / "state.pt.part", out / "state.pt")


def restore(policy, optimizer, out):
    """Goes back to the last state saved, and drops what was logged after it. -> the steps done"""
    path, step = out / "state.pt", 0
    if path.is_file():
        options = state_dict.StateDictOptions(full_state_dict=True)
        with reading_back(path):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state_dict.set_state_dict(policy, optimizer, model_state_dict=state["policy"],
                                      optim_state_dict=state["optimizer"], options=options)
            check_finite(policy.trainable())
            step = int(state["step"])
    if rank() == 0:
        for name in ("log.jsonl", "traces.jsonl"):
            drop_rows_after(out / name, step)
    print(f"resuming after step {step}")
    return step


def drop_rows_after(path, step):
    """Drops the rows of later steps, and what is no row: half a one that was being written, or what
    a crash of the machine made of one."""
    if not path.is_file():
        return
    kept, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += bool(line)
    if damaged:
        print(f"{path}: {damaged} damaged rows are dropped")
    write_text(path, "".join(kept))


# ------------------------------------------------------------------------------------------ the job

def final_table(args, stages, dialogue, questions, out):
    """Evaluates the checkpoints {name: path} on held-out questions, with and without the tool;
    prints the table, writes summary.json and the page."""
    summary, rows, traces = {}, [[*HEADS, "minutes"]], {}
    for name, path in stages.items():
        policy = None
        gc.collect()                        # frees the one before: it refers to itself
        policy = load(str(path), **input_limits(args))
        found, traces[name] = evaluate(policy, questions, dialogue, args.seed, keep=PAGE_TRACES,
                                       **sampling_of(args))
        without, _ = evaluate(policy, questions, replace(dialogue, tool=False), args.seed,
                              **sampling_of(args))
        minutes = minutes_of(Path(path) / "notes.json")
        summary[name] = found | {"accuracy_no_tool": without["accuracy"], "minutes": minutes}
        rows.append([*cells(name, found, without["accuracy"]), f"{minutes:.1f}"])
    print(f"\n{len(questions)} held-out questions, temperature {args.temperature:g}:")
    print(table(rows))
    if rank() == 0:
        with writing(out / "summary.json"):
            write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        report(out, args, rows, traces)
        print(f"report: {out / 'report.html'}")


def minutes_of(notes):
    """How long a checkpoint was trained, from its notes.json; 0 where they do not say it."""
    if not notes.is_file():
        return 0
    with reading_back(notes):
        return float(read_json(notes).get("minutes", 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for add_flags in (shared_flags, eval_flags, sft_flags, rl_flags):
        add_flags(parser)
    # what a file says of sampling and of the task here counts more than what it says of evaluation
    args = parse(parser, "evaluate", "rollout", "train_sft", "train_rl")
    settle(args, training=True)
    print(describe_settings(args))
    held_out = questions_of(args, "test", args.n)       # now, for a bad file would be found late
    with open_run(args, last=["log.jsonl", "state.pt", "rl"]):
        run(args, Path(args.out), held_out)


def run(args, out, held_out):
    """The whole job, after its settings are read and its folder is there."""
    policy, reference, dialogue = warm_start(args)
    print(dialogue.describe())
    train(policy, reference, dialogue, args, out)
    gather(None)                            # the log is whole
    minutes = sum(line.get("seconds", 0) for line in read_log(out / "log.jsonl")) / 60
    save_checkpoint(policy, dialogue, minutes, out / "rl")

    del policy, reference
    gc.collect()                            # a policy refers to itself
    stages = {"base": args.model, "sft": out / "sft", "rl": out / "rl"}
    final_table(args, stages, dialogue, held_out, out)


if __name__ == "__main__":
    run_script(main)
