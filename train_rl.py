"""GRPO by hand, and the whole job: `python train_rl.py` goes from nothing to a trained policy.

In:  a task and a checkpoint (by default everything before it is made: the tiny base, tree search, supervised fine-tuning).
Out: a run folder: config.json, log.jsonl (a line a step), traces.jsonl (sampled traces with their rewards), the checkpoints
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
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from evaluate import (HEADS, TOYS, blind_accuracy, cells, evaluate, mean, open_file, questions_of, table,
                      targets_hit, true_thoughts)
from model import (UserError, full_tensor, gather, gather_shares, is_sharded, load, micro_batches, move_into_place,
                   rank, shard_like, sum_over_processes, unsharded, world_size, write_text)
from reward import MULTI_TURN, SINGLE_TURN, Weights, score
from rollout import OVERLONG, describe_config, make_dialogue, rollout, run
from train_sft import (configure_training, folder_of, learning_rate, load_trainable, make_optimizers,
                       optimizer_step, remaining, warm_start)

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


def advantages_of(scores, complete, config):
    """Advantages of one group's traces from their Scores. complete: which ended of their own accord; the others are left out
    of the statistics and get 0 (--overlong mask), or count as traces that earned nothing (--overlong zero)."""
    if config.overlong == "mask":
        return group_advantages([s.total for s in scores], complete, config.scale_by_std)
    rewards = [s.total if ended else 0.0 for s, ended in zip(scores, complete)]
    return group_advantages(rewards, [True] * len(rewards), config.scale_by_std)


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
def reference_log_probs(reference, batches, config):
    """Log-probabilities (N,) of each micro-batch under the reference model, None without one."""
    if reference is None:
        return [None] * len(batches)
    return [reference.log_probs(micro, config.temperature) for micro in batches]


def train_step(policy, reference, groups, optimizers, config, factor):
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
    batches = micro_batches([traces for traces, _ in kept], config.micro_tokens, spare)
    references = reference_log_probs(reference, [micro for micro, _ in batches], config)
    policy.model.train()
    for (micro, counts), ref in zip(batches, references):
        flat = [(trace, log_prob) for traces in micro for trace in traces
                for log_prob, sampled in zip(trace.log_probs, trace.sampled) if sampled]
        old = torch.tensor([log_prob for _, log_prob in flat], device=policy.device)
        advantages = torch.tensor([advantage_of.get(id(trace), 0.0) for trace, _ in flat], device=policy.device)
        loss, logged = grpo_loss(policy.log_probs(micro, config.temperature), old, ref, advantages, kl=config.kl)
        (loss * counts * world_size() / tokens).backward()  # gradients are averaged over processes
        for name, value in {"loss": loss.item(), **logged}.items():
            sums[name] += value * counts / tokens
    policy.model.eval()
    norm = optimizer_step(policy.trainable(), optimizers, factor, config.clip_norm)
    of_all = dict(zip(sums, sum_over_processes(list(sums.values()))))
    return {**of_all, "groups_used": int(of_all["groups_used"]), "grad_norm": norm, "tokens": tokens}


def add_up(updates):
    """What to log of a step's updates: counts are added, all else is averaged."""
    counts = ("groups_used", "tokens")
    return {name: (sum if name in counts else mean)([u[name] for u in updates]) for name in updates[0]}


# ------------------------------------------------------------------------------------------------ the job

def weights_at(config, step):
    """The reward's weights; the bonus for distinct looks fades out linearly by half-time."""
    if config.mode != "zoom":
        return SINGLE_TURN
    return Weights(MULTI_TURN.correct, MULTI_TURN.format, config.diversity * max(0.0, 1 - 2 * step / config.steps),
                   MULTI_TURN.max_extra, min_distance=10)


def train(policy, reference, dialogue, config, out):
    """The GRPO loop."""
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.adamw_lr)
    first = restore(policy, optimizers, out) if config.resume else 0
    started = time.time()
    for step in range(first, config.steps):
        begun = time.time()
        questions = questions_of(config, "train", config.questions, config.search_questions + step * config.questions)
        seeds = [f"GRPO {config.seed} {step} {i}" for i in range(config.questions)]
        mine = slice(rank(), None, world_size())
        with unsharded(policy):
            groups = list(rollout(policy, questions[mine], dialogue, config.group, seeds[mine], **config.sampling()))
        number = {question: i for i, question in enumerate(questions)}
        groups.sort(key=lambda traces: number[traces[0].question])  # they come as they end
        sampled = time.time() - begun

        weights = weights_at(config, step)
        scored = [(traces, [score(t, weights) for t in traces]) for traces in groups]
        counted = [[t.ended not in OVERLONG for t in traces] for traces in groups]
        advantages = [advantages_of(scores, ok, config) for (_, scores), ok in zip(scored, counted)]
        factor = learning_rate(step, config.steps, max(1, config.warm_up), config.final_lr)
        updates, update = [], config.update_questions or config.questions
        for first_of_update in range(0, config.questions, update):
            share = range(first_of_update, first_of_update + update)
            pairs = [(traces, a) for (traces, _), a in zip(scored, advantages)
                     if number[traces[0].question] in share]
            updates.append(train_step(policy, reference, pairs, optimizers, config, factor))
        learnt = add_up(updates)

        rows = [[(row_of(t), s) for t, s in zip(traces, scores)] for traces, scores in scored]
        flat = sum(gather_shares(rows), [])
        counted = gather_shares(counted)
        line = {"step": step + 1, "reward": mean(s.total for _, s in flat), "accuracy": mean(s.correct for _, s in flat),
                "format": mean(s.format for _, s in flat), "grounded": mean(s.grounded for _, s in flat),
                "diversity": mean(s.diversity for _, s in flat), "crops": mean(s.zoom_calls for _, s in flat),
                "overlong": 1 - mean(ok for row in counted for ok in row), **measured(row for row, _ in flat), **learnt, "lr": config.lr * factor,
                "seconds": time.time() - begun, "sampling_seconds": sampled}
        if rank() == 0:
            keep_log(out, line, flat)
        print_line(line, config, remaining(started, step + 1 - first, config.steps - first))
        if step % config.save_every == 0 and rank() == 0:
            trace, s = scored[0][0][0], scored[0][1][0]
            print(f"\n{trace.text()}\n-> truth: {trace.question.answer}; reward {s.total:.2f} = correct {s.correct:.0f}, "
                  f"format {s.format:.0f}, grounded {s.grounded:.0f}, diversity {s.diversity:.2f} {s.why}\n")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            keep_state(policy, optimizers, out, step + 1)


def print_line(line, config, left):
    print(f"step {line['step']}/{config.steps}  reward {line['reward']:.3f}  accuracy {line['accuracy']:.3f}  "
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
            "turns": [t.text for t in trace.turns], "ended": trace.ended, "on_target": targets_hit(trace),
            "true_thoughts": true_thoughts(trace)}


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
        move_into_place(out / "state.pt.part", out / "state.pt")


def restore(policy, optimizers, out):
    """Goes back to the last state kept, and drops what was logged after it. -> the number of steps done"""
    path = out / "state.pt"
    if not path.is_file():
        step = 0
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            parts = policy.model.state_dict()
            policy.model.load_state_dict({name: shard_like(x, parts[name]) for name, x in state["model"].items()})
            for optimizer, kept in zip(optimizers, state["optimizers"]):
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for i, of_p in kept["state"].items():
                    of_p.update({k: shard_like(x, params[i]) for k, x in of_p.items() if getattr(x, "shape", 0) == params[i].shape})
                optimizer.load_state_dict(kept)
        except Exception as error:
            raise UserError(f"{path}: cannot be resumed from ({str(error).splitlines()[0]}); "
                            "delete it to start GRPO again") from error
        step = state["step"]
    for name in ("log.jsonl", "traces.jsonl"):
        if rank() == 0 and (out / name).is_file():
            lines = [row for row in (out / name).read_text().splitlines(keepends=True) if row.endswith("\n")]
            write_text(out / name, "".join(row for row in lines if json.loads(row)["step"] <= step))
    print(f"resuming after step {step}")
    return step


def check_arguments(config, out):
    """A run is resumed as it was begun: other arguments would not give the result of either."""
    free = {"resume", "out", "eval_n", "save_every", "micro_tokens", "cache_tokens", "given", "dry_run", "processes"}
    try:
        began = json.loads((out / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'config.json'}: cannot be read ({error}); there is nothing to resume, so leave out "
                        "--resume") from None
    other = [f"--{k.replace('_', '-')} {began.get(k)}" for k, v in vars(config).items() if k not in free and began.get(k) != v]
    if other:
        raise UserError(f"{out} was begun with {', '.join(other)}; resume it with the same, or give another --out")


def final_table(config, stages, dialogue, out):
    """Evaluates the checkpoints {name: path} on held-out questions, prints the table and writes summary.json."""
    if config.eval_task:
        questions = open_file(config.eval_task, config.image_root, config.eval_n)
    else:
        questions = questions_of(config, "test", config.eval_n)
    summary, rows, seed = {}, [[*HEADS, "minutes"]], f"test {config.seed}"
    for name, path in stages.items():
        policy, notes = load(str(path), **config.input_limits()), Path(path) / "notes.json"
        minutes = json.loads(notes.read_text()).get("minutes", 0.0) if notes.is_file() else 0.0
        found, bare = (evaluate(policy, questions, replace(dialogue, tool=tool), seed, **config.sampling())
                       for tool in (True, False))
        summary[name] = {**vars(found), "accuracy_no_tool": bare.accuracy, "minutes": minutes}
        rows.append([*cells(name, found, bare), f"{minutes:.1f}"])
    print(f"\n{len(questions)} held-out questions, temperature {config.temperature:g}:\n" + table(rows))
    if config.task in TOYS and not config.eval_task:
        blind = {looks: blind_accuracy(questions, dialogue, looks) for looks in (0, 1, 4)}
        summary["blind"] = blind
        print("a blind player with 0 / 1 / 4 looks at random places: " + " / ".join(f"{b:.3f}" for b in blind.values()))
    if rank() == 0:
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")


def main(given):
    config = configure_training(given, "train_rl")
    print(describe_config(config, "train_rl"))
    if config.dry_run:
        return
    out = folder_of(config)
    if not config.resume and any((out / name).exists() for name in ("log.jsonl", "state.pt", "rl")):
        raise UserError(f"{out} holds a run already; give --resume to go on with it, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        check_arguments(config, out)
    gather(None)                                    # all have read what an earlier run left
    if rank() == 0:
        write_text(out / "args.json", json.dumps(vars(config), indent=1) + "\n")
    base = warm_start(config, print)
    policy = load_trainable(config, out / "sft")
    reference = load_trainable(config, out / "sft") if config.kl else None
    dialogue = make_dialogue(config, str(out / "sft"), policy)
    train(policy, reference, dialogue, config, out)
    gather(None)                                    # the log is whole
    seconds = sum(json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines())
    policy.save(out / "rl", notes={"minutes": seconds / 60}, dialogue=dialogue.to_json())
    gather(None)
    final_table(config, {"base": base, "sft": out / "sft", "rl": out / "rl"}, dialogue, out)


if __name__ == "__main__":
    run("train_rl", "Train a visually grounded policy with GRPO. Called with nothing, it makes the tiny base, searches for "
        "traces, fine-tunes on them, and goes on to GRPO.", main)
