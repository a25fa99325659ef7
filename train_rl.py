"""GRPO by hand, and the whole job: `python train_rl.py` goes from nothing to a trained policy.

In:  a task and a checkpoint (by default everything before it is made: the tiny base, tree search,
     supervised fine-tuning).
Out: a run folder: args.json, log.jsonl (a line a step), traces.jsonl (sampled traces with their
     rewards), the checkpoints sft/ and rl/, state.pt (to resume from), summary.json (the final
     table). The tiny base is in runs/tiny/.

Each process samples and learns from its own share of the questions, and all make the same update.

Kept of GRPO (DeepSeekMath; as the paper uses it): G traces a question, advantages relative to their
group, clipped probability ratios (0.2 below, 0.28 above, a second clip at 3 for negative
advantages), a KL penalty to the SFT model inside the loss, mean over tokens.
Changed: the penalty is estimated by k2, not k3 (see `grpo_loss`); one denominator for the whole
update, whatever the micro-batches; overlong traces earn nothing, or are left out of loss and
statistics (Mini-o3's way; --overlong); of a group with equal rewards one trace counts, for the
penalty alone; the log-probabilities at sampling time are those that the engine recorded, so no
second pass computes them.
"""
import gc
import json
import math
import time
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path

import torch
from torch.utils._pytree import tree_map
from transformers import AutoModelForImageTextToText

from evaluate import (
    HEADS,
    PAGE_TRACES,
    blind_accuracy,
    cells,
    describe_baseline,
    evaluate,
    interval,
    mean,
    open_file,
    questions_of,
    sample_traces,
    table,
    targets_hit,
    true_thoughts,
    write_report,
)
from model import (
    MAX_LOGITS,
    REPLICATED,
    UserError,
    full_tensor,
    gather,
    gather_shares,
    is_sharded,
    load,
    micro_batches,
    move_into_place,
    rank,
    read_config,
    shard_like,
    sum_over_processes,
    unsharded,
    world_size,
    write_text,
)
from reward import MULTI_TURN, SINGLE_TURN, score
from rollout import OVERLONG, TOYS, describe_config, make_dialogue, rollout, run
from train_sft import (
    configure_training,
    folder_of,
    learning_rate,
    load_trainable,
    make_optimizers,
    optimizer_step,
    remaining,
    warm_start,
)

# ------------------------------------------------------------------------------ advantages and loss

def group_advantages(rewards, counted, scale):
    """Advantages of one group: (r - mean) / (std + 1e-6) over the traces that count, 0 for others.

    rewards: list of floats; counted: list of bools; scale False: not divided by std (Dr. GRPO)."""
    kept = [r for r, counts in zip(rewards, counted, strict=True) if counts]
    if len(kept) < 2:
        return [0.0] * len(rewards)
    centre, spread = mean(kept), 1.0
    if scale:
        spread = math.sqrt(mean((r - centre)**2 for r in kept)) + 1e-6
    return [(r - centre) / spread * counts for r, counts in zip(rewards, counted, strict=True)]


def set_advantages(traces, config):
    """Sets the advantage of each scored trace of a group.

    Overlong traces are left out of the statistics and get 0 (--overlong mask), or count as traces
    that earned nothing (--overlong zero)."""
    complete = [trace.ended not in OVERLONG for trace in traces]
    rewards = [trace.score.total for trace in traces]
    if config.overlong == "zero":
        rewards = [r * ended for r, ended in zip(rewards, complete, strict=True)]
        complete = [True] * len(traces)
    advantages = group_advantages(rewards, complete, config.scale_by_std)
    for trace, advantage in zip(traces, advantages, strict=True):
        trace.advantage = advantage


def grpo_loss(new, old, ref, advantages, *, kl, clip_low=0.2, clip_high=0.28, dual_clip=3.0):
    """The summed loss of some tokens, and sums to log; all arguments are (N,).

    new, old, ref: log-probabilities under the policy, at sampling time, and under the reference
    model (None: no penalty). Clipped surrogate: max(-A * ratio, -A * clip(ratio)), for negative A
    at most -A * dual_clip. Penalty: d^2 / 2 with d = ref - new (k2), whose gradient on the policy's
    own samples is on average that of the KL divergence. That of exp(d) - d - 1 (k3, the paper's)
    is not, and grows with exp(d), so that few tokens make a step; as a value it is the better
    estimate, and is logged. The caller divides by the number of tokens of the whole update."""
    ratio = (new - old).exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(surrogate, clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    sums = {"kl": 0.0, "clip": (clipped > surrogate).sum().item(),
            "drift": (new - old).abs().sum().item()}
    if ref is not None:
        d = ref - new
        loss = loss + kl * d.square() / 2
        sums["kl"] = (d.exp() - d - 1).sum().item()
    return loss.sum(), sums


# --------------------------------------------------------------------------------------- the update

def train_step(policy, reference, groups, optimizers, config, factor):
    """One update on groups of traces with advantages. -> {name: value} to log, of all processes

    A group of equal rewards gives one trace to the KL penalty alone. Without it nothing would hold
    what no reward holds, such as points, once nearly all answers are right. groups: this process's
    share; where weights are sharded, one group at least."""
    used, groups_used = [], 0
    for traces in groups:
        teaching = [trace for trace in traces if trace.advantage]
        groups_used += len(teaching) > 0
        if teaching or reference is not None:
            used.append(teaching or traces[:1])
    tokens = int(sum_over_processes([sum(map(sampled_tokens, used))])[0])
    sums = {"loss": 0.0, "kl": 0.0, "clip": 0.0, "drift": 0.0, "groups_used": groups_used}
    if not tokens:
        return {**sums, "grad_norm": 0.0, "tokens": 0}

    policy.model.train()
    spare = [min(groups, key=total_tokens)[:1]] if is_sharded(policy) else None
    for batch in micro_batches(used, config.micro_tokens, spare):
        old, advantages = token_tensors(batch.groups, policy.device)
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref = reference.log_probs(batch.groups, config.temperature)
        new = policy.log_probs(batch.groups, config.temperature)
        loss, batch_sums = grpo_loss(new, old, ref, advantages, kl=config.kl)
        # world_size: gradients are averaged over processes, and this is a sum
        (loss * batch.weight * world_size() / tokens).backward()
        for name, value in {"loss": loss.item(), **batch_sums}.items():
            sums[name] += value * batch.weight / tokens
    policy.model.eval()
    grad_norm = optimizer_step(policy.trainable(), optimizers, factor, config.clip_norm)
    totals = dict(zip(sums, sum_over_processes(list(sums.values())), strict=True))
    return {**totals, "grad_norm": grad_norm, "tokens": tokens}


def total_tokens(traces):
    return sum(len(trace.ids) for trace in traces)


def sampled_tokens(traces):
    return sum(sum(trace.sampled) for trace in traces)


def token_tensors(groups, device):
    """Log-probabilities at sampling time and advantages of all sampled tokens, each (N,)."""
    old, advantages = [], []
    for trace in sum(groups, []):
        old += compress(trace.log_probs, trace.sampled)
        advantages += [trace.advantage] * sum(trace.sampled)
    return torch.tensor(old, device=device), torch.tensor(advantages, device=device)


# ----------------------------------------------------------------------------------------- the loop

def train(policy, reference, dialogue, config, out):
    """The GRPO loop."""
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.adamw_lr,
                                 newton_schulz=2)
    first = restore(policy, optimizers, out) if config.resume else 0
    started = time.time()
    for step in range(first, config.steps):
        step_started = time.time()
        groups = sample_groups(policy, dialogue, config, step)
        sampling_seconds = time.time() - step_started
        weights = reward_weights(config, step)
        for traces in groups:
            for trace in traces:
                trace.score = score(trace, weights)
            set_advantages(traces, config)

        factor = learning_rate(step, config.steps, max(1, config.warm_up), config.final_lr)
        updates = [train_step(policy, reference, part, optimizers, config, factor)
                   for part in split_for_updates(groups, config)]

        rows = sum(gather_shares([[row_of(trace) for trace in traces] for traces in groups]), [])
        line = {"step": step + 1, **describe_rows(rows), **describe_updates(updates),
                "lr": config.lr * factor, "seconds": time.time() - step_started,
                "sampling_seconds": sampling_seconds}
        if rank() == 0:
            append_rows(out / "log.jsonl", [line])
            append_rows(out / "traces.jsonl", [{"step": step + 1, **row} for row in rows])
        print_line(line, config.steps, remaining(started, step + 1 - first, config.steps - first))
        if step % config.save_every == 0 and rank() == 0:
            print_trace(groups[0][0])
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_state(policy, optimizers, out, step + 1)
            traces = {f"step {step + 1}": [traces[0] for traces in groups[:PAGE_TRACES]]}
            if rank() == 0:
                write_report(out / "report.html", config, traces, out)


def sample_groups(policy, dialogue, config, step):
    """This process's share of a step's groups, in the order of their questions."""
    start = config.search_questions + step * config.questions
    questions = questions_of(config, "train", config.questions, start)
    seeds = [f"GRPO {config.seed} {step} {i}" for i in range(config.questions)]
    mine = slice(rank(), None, world_size())
    number = {question: i for i, question in enumerate(questions)}
    with unsharded(policy):
        groups = list(rollout(policy, questions[mine], dialogue, config.group, seeds[mine],
                              **config.sampling()))
    return sorted(groups, key=lambda traces: number[traces[0].question])


def split_for_updates(groups, config):
    """A step's groups, of this process, as a list of lists: one an update."""
    update = config.update_questions or config.questions
    parts = [[] for _ in range(math.ceil(config.questions / update))]
    for i, traces in enumerate(groups):
        number = rank() + i * world_size()          # of its question in the step
        parts[number // update].append(traces)
    return parts


def reward_weights(config, step):
    """The reward's weights; the bonus for distinct crops fades out linearly by half-time."""
    if config.mode != "zoom":
        return SINGLE_TURN
    fade = max(0.0, 1 - 2 * step / config.steps)
    return replace(MULTI_TURN, diversity=config.diversity * fade)


# ----------------------------------------------------------------------------------- what is logged

def row_of(trace):
    """What traces.jsonl has of a trace."""
    return {"id": trace.question.id, "question": trace.question.text,
            "truth": trace.question.answer, "turns": [turn.text for turn in trace.turns],
            "ended": trace.ended, "on_target": targets_hit(trace),
            "true_thoughts": true_thoughts(trace), **asdict(trace.score)}


def describe_rows(rows):
    """Means over a step's traces. on_target and true_thoughts only where the truth is known."""
    line = {"reward": mean(row["total"] for row in rows),
            "accuracy": mean(row["correct"] for row in rows)}
    by_question = {}
    for row in rows:
        by_question.setdefault(row["id"], []).append(row["correct"])
    shares = [mean(correct) for correct in by_question.values()]
    line["accuracy_low"], line["accuracy_high"] = interval(shares)
    for name in ("format", "grounded", "diversity", "zoom_calls"):
        line[name] = mean(row[name] for row in rows)
    line["overlong"] = mean(row["ended"] in OVERLONG for row in rows)
    for name in ("on_target", "true_thoughts"):
        if values := sum((row[name] for row in rows), []):
            line[name] = mean(values)
    return line


def describe_updates(updates):
    """Of a step's updates: counts are added, the drift is the first one's, all else is averaged."""
    line = {name: mean(update[name] for update in updates) for name in updates[0]}
    for name in ("groups_used", "tokens"):
        line[name] = int(sum(update[name] for update in updates))
    return {**line, "drift": updates[0]["drift"]}


SHOWN = {"reward": ".3f", "accuracy": ".3f", "format": ".2f", "grounded": ".2f",
         "zoom_calls": ".2f", "overlong": ".2f", "on_target": ".2f", "true_thoughts": ".2f",
         "tokens": "d", "kl": ".3f", "clip": ".3f", "drift": ".4f", "grad_norm": ".2f"}


def print_line(line, steps, left):
    values = [f"{name.replace('_', ' ')} {line[name]:{form}}"
              for name, form in SHOWN.items() if name in line]
    print(f"step {line['step']}/{steps}  {'  '.join(values)}  {line['seconds']:.2f} s  ({left})",
          flush=True)


def print_trace(trace):
    s = trace.score
    print(f"\n{trace.text()}\n-> truth: {trace.question.answer}; reward {s.total:.2f} = correct "
          f"{s.correct:.0f}, format {s.format:.0f}, grounded {s.grounded:.0f}, diversity "
          f"{s.diversity:.2f} {s.why}\n")


def append_rows(path, rows):
    with open(path, "a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


# ---------------------------------------------------------------------------------- save and resume

def save_state(policy, optimizers, out, step):
    """state.pt: all that is needed to go on after `step`, with any number of processes."""
    def gathered(x):                # one tensor at a time; the first process keeps it, on the host
        x = full_tensor(x)
        if not torch.is_tensor(x):
            return x
        return x.cpu() if rank() == 0 else None
    state = {"model": policy.model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    state = tree_map(gathered, state)
    if rank() == 0:
        torch.save({"step": step, **state}, out / "state.pt.part")
        move_into_place(out / "state.pt.part", out / "state.pt")


def restore(policy, optimizers, out):
    """Goes back to the last state saved, and drops what was logged after it. -> the steps done"""
    path, step = out / "state.pt", 0
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            load_state(policy, optimizers, state)
            step = state["step"]
        except Exception as error:
            raise UserError(f"{path}: cannot be resumed from ({str(error).splitlines()[0]}); "
                            "delete it to start GRPO again") from error
    if rank() == 0:
        drop_rows_after(out / "log.jsonl", step)
        drop_rows_after(out / "traces.jsonl", step)
    print(f"resuming after step {step}")
    return step


def load_state(policy, optimizers, state):
    """Loads what `save_state` saved, sharded as the policy and its optimizers are."""
    parts = policy.model.state_dict()
    policy.model.load_state_dict({name: shard_like(x, parts[name])
                                  for name, x in state["model"].items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in saved["state"].items():
            for name, x in values.items():
                if getattr(x, "shape", None) == parameters[i].shape:
                    values[name] = shard_like(x, parameters[i])
        optimizer.load_state_dict(saved)


def drop_rows_after(path, step):
    """Drops the rows of later steps, and one that was being written."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


CAN_CHANGE = {"resume", "out", "eval_n", "save_every", "micro_tokens", "cache_tokens", "given",
              "dry_run", "processes", "show_trees"}


def check_settings(config, out):
    """A run is resumed as it was started: other settings would give the result of neither."""
    try:
        started_with = json.loads((out / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'args.json'}: cannot be read ({error}); there is nothing to "
                        "resume, so leave out --resume") from None
    other = [f"--{name.replace('_', '-')} {started_with.get(name)}"
             for name, value in vars(config).items()
             if name not in CAN_CHANGE and started_with.get(name) != value]
    if other:
        raise UserError(f"{out} was started with {', '.join(other)}; resume it with the same, or "
                        "give another --out")


# --------------------------------------------------------------------------------------- GPU memory

def count_parameters(config):
    """Of a checkpoint's config -> parameters of the whole model, of its vision tower."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if ".visual." in name)


def update_bytes(text, prompt, group, response, width=2):
    """Bytes of activations at the peak of an update with gradient checkpointing.

    text: the language model's config; prompt, response: tokens; group: responses a prompt; width:
    bytes of a number. One hidden state a layer and token is kept. Then comes the larger of a layer
    run again (about 6 numbers an inner unit of the MLP and 16 a hidden unit for each token), and
    the logits (3 times in float32, once in `width`)."""
    hidden, tokens = text.hidden_size, prompt + group * response
    kept = (text.num_hidden_layers + 2) * tokens * hidden
    layer = tokens * (6 * text.intermediate_size + 16 * hidden)
    logits = min(MAX_LOGITS, group * response * text.vocab_size)
    return width * kept + max(width * layer, (12 + width) * logits)


def memory(config, settings):
    """An estimate of the GPU memory of one of world_size() processes, {what for: GiB}.

    config: of the checkpoint; settings: a Config. Weights and gradients have 2 bytes a parameter,
    AdamW's moments 8; a prompt has an image of --max-pixels and 512 tokens of text. Keys and values
    are those of --cache-tokens, or of one group at least. A rollout needs all but gradients and
    activations, an update all but whole weights, keys and values."""
    total, tower = count_parameters(config)
    text, vision, gpus = config.text_config, config.vision_config, world_size()
    trained = total if settings.train_vision else total - tower
    token_pixels = (vision.patch_size * vision.spatial_merge_size)**2
    prompt = settings.max_pixels // token_pixels + 512
    longest = prompt + settings.group * settings.response_tokens          # tokens of a group
    column = 2 * text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    found = {
        "weights": 2 * total / gpus,
        "reference model": 2 * total / gpus * (settings.kl > 0),
        "AdamW's moments": 8 * trained / gpus,
        "rollout: whole weights": 2 * trained * (gpus > 1),
        "rollout: keys and values":
            2 * max(settings.cache_tokens or 0, longest) * column * text.num_hidden_layers,
        "update: gradients": 2 * trained / gpus,
        "update: activations":
            update_bytes(text, prompt, settings.group, settings.response_tokens),
    }
    return {name: n / 2**30 for name, n in found.items()}


def print_memory(settings):
    """--dry-run: prints the estimate. Raises UserError where there is nothing to estimate."""
    if not settings.model or not settings.max_pixels:
        raise UserError("--dry-run needs --model and --max-pixels; the tiny base fits anywhere")
    print(f"estimated GiB on each of {world_size()} GPU(s), weights in bfloat16:")
    parts = memory(read_config(settings.model), settings)
    for name, gib in parts.items():
        print(f"  {name:<24}  {gib:8.2f}")
    for phase, other in (("rollout", "update"), ("update", "rollout")):
        peak = sum(gib for name, gib in parts.items() if not name.startswith(other))
        print(f"  peak of the {phase:<12}  {peak:8.2f}")


# ------------------------------------------------------------------------------------------ the job

def final_table(config, stages, dialogue, out):
    """Evaluates the checkpoints {name: path} on held-out questions, prints the table and writes
    summary.json."""
    if config.eval_task:
        questions = open_file(config.eval_task, config.image_root, config.eval_n)
    else:
        questions = questions_of(config, "test", config.eval_n)
    summary, rows, traces = {}, [[*HEADS, "minutes"]], {}
    seed = f"test {config.seed}"
    for name, path in stages.items():
        policy = None                               # frees the one before
        policy = load(str(path), **config.input_limits())
        with_tool, without = (evaluate(policy, questions, replace(dialogue, tool=tool), seed,
                                       **config.sampling()) for tool in (True, False))
        minutes = minutes_of(path)
        summary[name] = {**vars(with_tool), "accuracy_no_tool": without.accuracy,
                         "minutes": minutes}
        rows.append([*cells(name, with_tool, without), f"{minutes:.1f}"])
        if rank() == 0:
            traces[name] = sample_traces(policy, questions, dialogue, seed,
                                         PAGE_TRACES // len(stages), **config.sampling())
    print(f"\n{len(questions)} held-out questions, temperature {config.temperature:g}:")
    print(table(rows))
    if config.task in TOYS and not config.eval_task:
        summary["random_zoom"] = blind = blind_accuracy(questions, dialogue)
        print(describe_baseline(blind))
    if rank() == 0:
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_report(out / "report.html", config, traces, out, rows)
        print(f"report: {out / 'report.html'}")


def minutes_of(checkpoint):
    """How long a checkpoint took to train, 0 where it does not say."""
    notes = Path(checkpoint) / "notes.json"
    return json.loads(notes.read_text())["minutes"] if notes.is_file() else 0.0


def check_shares(config):
    """Where weights are sharded, each process needs groups in each update. Raises UserError."""
    update = config.update_questions or config.questions
    uneven = config.questions % world_size() or update % world_size()
    if config.model and uneven and count_parameters(read_config(config.model))[0] > REPLICATED:
        raise UserError(f"--questions {config.questions} and --update-questions {update} must be "
                        f"multiples of the number of processes, {world_size()}")


def main(given):
    config = configure_training(given, "train_rl")
    check_shares(config)
    print(describe_config(config, "train_rl"))
    if config.dry_run:
        return print_memory(config)
    out = folder_of(config)
    started = any((out / name).exists() for name in ("log.jsonl", "state.pt", "rl"))
    if started and not config.resume:
        raise UserError(f"{out} holds a run already; give --resume to go on with it, or another "
                        "--out")
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        check_settings(config, out)
    gather(None)                                    # all have read what an earlier run left
    if rank() == 0:
        write_text(out / "args.json", json.dumps(vars(config), indent=1) + "\n")

    base = warm_start(config, print)
    policy = load_trainable(config, out / "sft")
    reference = load_trainable(config, out / "sft") if config.kl else None
    dialogue = make_dialogue(config, str(out / "sft"), policy)
    print(dialogue.describe())
    train(policy, reference, dialogue, config, out)
    gather(None)                                    # the log is whole
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    minutes = sum(line["seconds"] for line in lines) / 60
    policy.save(out / "rl", notes={"minutes": minutes}, dialogue=dialogue.to_json())
    gather(None)
    del policy, reference
    gc.collect()                                    # a sharded model is part of cycles
    final_table(config, {"base": base, "sft": out / "sft", "rl": out / "rl"}, dialogue, out)


if __name__ == "__main__":
    run("train_rl", __doc__.splitlines()[0], main)
