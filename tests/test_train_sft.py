"""Warm start: the search, linearising, conversion, fine-tuning, and what the tiny base is shown."""
import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import Shard, distribute_tensor

import train_sft as sft
from evaluate import BACKGROUND, BLOCK, COLOURS, CONTRAST, PATTERNS, Scene, toy_search
from model import UserError
from reward import is_correct, score
from rollout import Dialogue, Question, call_text, parse_turn
from train_sft import (BACKTRACK, Muon, Node, RoundedAdamW, continue_from, cut_trace, expand, first_step_end, linearise,
                       orthogonalise, read_traces, replay, rounded, search, to_multi_turn, write_traces)

SAMPLING = dict(turn_tokens=30, response_tokens=200)


def look(x, y, thought="Here"):
    return f"<think>{thought} ({x}, {y}).</think>\n{call_text((x, y))}"


def answer(text, thought="So."):
    return f"<think>{thought}</think>\n<answer>{text}</answer>"


@pytest.fixture
def question():
    return toy_search("train", 0, 0)


# ------------------------------------------------------------------------------------------------ the tree

def test_ucb1():
    """Guards selection: value + c * sqrt(ln(N_parent + 1) / (N_child + 1)), and means backed up to the root."""
    root = Node(None)
    root.children = [Node(None, root), Node(None, root)]
    for reward in (1, 0, 1):
        root.children[0].back_up(reward)
    root.children[1].back_up(0)
    assert root.visits == 4 and root.value == pytest.approx(0.5) and root.children[0].value == pytest.approx(2 / 3)
    bounds = [child.value + 2 * math.sqrt(math.log(5) / (child.visits + 1)) for child in root.children]
    assert root.select(2) is root.children[bounds.index(max(bounds))] is root.children[0]
    assert root.select(10) is root.children[1]


def finished(policy, question, texts, mode="zoom"):
    return replay(policy, Dialogue(mode), question, texts)


def test_steps_of_the_zoom_mode_are_turns(policy, question):
    """Guards the cut: a step ends where the next turn begins, its observation included, and can be continued from there."""
    trace = finished(policy, question, [look(10, 10), look(40, 40), answer("dotted")])
    end = first_step_end(policy, trace, 0)
    step = cut_trace(policy, trace, end)
    assert end == trace.starts[1] and step.crops == [(10, 10)] and not step.ended and len(step.pictures) == 1
    second = cut_trace(policy, trace, first_step_end(policy, trace, end))
    assert second.crops == [(10, 10), (40, 40)]
    assert cut_trace(policy, trace, first_step_end(policy, trace, trace.starts[2])) is trace


def test_steps_of_a_single_turn_are_sentences_with_points(policy, question):
    """Guards single-turn search: a step ends behind its point; the last one runs to the end."""
    trace = finished(policy, question, ["<think>A cup (1, 2). A pot (3, 4). Done.</think>\n<answer>red</answer>"], "grounded")
    first = first_step_end(policy, trace, 0)
    assert policy.decode(trace.ids[:first]).rstrip(". ").endswith("(1, 2)")
    second = first_step_end(policy, trace, first)
    assert policy.decode(trace.ids[first:second]).rstrip(". ").endswith("(3, 4)")
    assert first_step_end(policy, trace, second) == len(trace.ids)
    assert cut_trace(policy, trace, second).begun.startswith("<think>A cup (1, 2)")


def test_a_step_that_repeats_a_point_is_dropped(policy, question):
    """Guards expansion: a point 1 px from one already used on the path is a repetition; a sibling's own step is the sibling."""
    path = cut_trace(policy, (trace := finished(policy, question, [look(10, 10), answer("dotted")])), trace.starts[1])
    leaf = Node(path, Node(None), points=((10, 10),))
    repeat = finished(policy, question, [look(10, 10), look(11, 10), answer("dotted")])
    other = finished(policy, question, [look(10, 10), look(40, 40), answer("dotted")])
    assert expand(policy, leaf, repeat, 10, 10) is None
    child = expand(policy, leaf, other, 10, 10)
    assert child.points == ((10, 10), (40, 40)) and child.parent is leaf
    leaf.children.append(child)
    assert expand(policy, leaf, other, 10, 10) is child


def test_too_deep_a_path_is_made_to_answer(policy, question):
    """Guards the bound on depth: the answer is asked for, in tokens that are not the policy's."""
    trace = finished(policy, question, [look(10, 10), look(40, 40), answer("dotted")])
    node = expand(policy, Node(finished(policy, question, [])), trace, 10, depth=1)
    assert node.trace.begun.endswith("<answer>") and not node.trace.sampled[-1]


def test_continuing_from_a_path_gives_whole_traces(policy, question):
    """Guards the reuse of prefixes: what comes back begins with the path, and its log-probabilities are those of a plain pass."""
    path = cut_trace(policy, (trace := finished(policy, question, [look(10, 10), answer("dotted")])), trace.starts[1])
    root = Dialogue().start(policy, question, 1)[0]
    found = continue_from(policy, Dialogue(), [root, path], 2, SAMPLING)
    assert [len(traces) for traces in found] == [2, 2]
    for whole in found[1]:
        assert whole.ids[:len(path.ids)] == path.ids and whole.turns[0].call == (10, 10) and whole.ended
        assert len(whole.ids) == len(whole.sampled) == len(whole.log_probs)
        new = [l for l, s in list(zip(whole.log_probs, whole.sampled))[len(path.ids):] if s]
        with torch.no_grad():
            again = policy.log_probs([[whole]])[-len(new):] if new else torch.zeros(0)
        assert torch.allclose(again, torch.tensor(new), atol=1e-5)


def test_search_counts_every_roll_out(policy):
    """Guards the search as a whole: visits add up, children are at most `width`, the value is the mean reward."""
    questions = [toy_search("train", 0, i) for i in range(3)]
    roots = search(policy, questions, Dialogue(), range(3), SAMPLING, simulations=2, width=3, rollouts=2, log=lambda line: None)
    for root in roots:
        assert root.visits >= 4 and 0 <= root.value <= 1
        for node in root.walk():
            assert len(node.children) <= 3
            assert all(child.parent is node for child in node.children)


# ------------------------------------------------------------------------------------------------ linearising

def tree(policy, question, rollouts, path=()):
    root = Node(Dialogue().start(policy, question, 1)[0])
    root.rollouts = [finished(policy, question, texts) for texts in rollouts]
    return root


def test_a_tree_without_a_right_roll_out_gives_nothing(policy, question):
    """Guards the data: nothing is learnt from wrong traces alone."""
    wrong = next(a for a in ("dotted", "checked") if a != question.answer)
    assert linearise(tree(policy, question, [[look(9, 9), answer(wrong)]])) == []


def test_chains_straight_and_with_back_tracking(policy, question):
    """Guards linearising: right ones as they are; a wrong one, the sentence, and then the looks of the right one that are new; each
    chain once, its common prefix once."""
    wrong = next(a for a in ("dotted", "checked") if a != question.answer)
    bad = [look(10, 10), answer(wrong)]
    good = [look(11, 10), look(40, 40, "Plain. There"), answer(question.answer)]
    chains = linearise(tree(policy, question, [bad, good, good]))
    assert good in chains and len(chains) == 2
    (joined,) = [c for c in chains if c != good]
    assert joined == [bad[0], look(40, 40, BACKTRACK + "Plain. There"), good[2]]
    trace = replay(policy, Dialogue(), question, joined)
    assert is_correct(trace) and trace.ended == "answer" and score(trace).format == 1


def test_back_tracking_within_a_single_turn(policy, question):
    """Guards single-turn linearising: the wrong thought, the sentence, the rest of the right one; one answer."""
    root = Node(Dialogue("grounded").start(policy, question, 1)[0])
    wrong = next(a for a in ("dotted", "checked") if a != question.answer)
    texts = [f"<think>A (1, 2).</think>\n<answer>{wrong}</answer>", f"<think>B (3, 4).</think>\n<answer>{question.answer}</answer>"]
    root.rollouts = [finished(policy, question, [t], "grounded") for t in texts]
    assert [f"<think>A (1, 2). {BACKTRACK}B (3, 4).</think>\n<answer>{question.answer}</answer>"] in linearise(root)


def test_single_turn_to_multi_turn():
    """Guards the conversion: each new point a look, at most four, what is left stays with the answer, answers may be points."""
    text = "<think>A cup (1, 2). Again (1, 2). A pot [30, 4]: odd. So be it.</think>\n<answer>(3, 4)</answer>"
    turns = to_multi_turn(text, later=0)
    assert [parse_turn(t).call for t in turns] == [(1, 2), (30, 4), None]
    assert parse_turn(turns[1]).thought == "Again (1, 2). A pot [30, 4]:"
    assert parse_turn(turns[2]).thought == "odd. So be it." and parse_turn(turns[2]).answer == "(3, 4)"
    many = "<think>" + " ".join(f"P ({i * 20}, 5)." for i in range(7)) + "</think><answer>x</answer>"
    assert len(to_multi_turn(many, max_crops=4, later=0)) == 5
    assert [parse_turn(t).call for t in to_multi_turn(text, later=1)] == [(30, 4), (1, 2), None]
    assert to_multi_turn("<think>no point</think><answer>x</answer>") == ["<think>no point</think><answer>x</answer>"]


def test_traces_on_disk(policy, question, tmp_path):
    """Guards --traces: what was written is read again; a broken row is told with its line."""
    chains = [(question, [look(10, 10), answer("dotted")])]
    write_traces(tmp_path / "t.jsonl", chains)
    assert read_traces(tmp_path / "t.jsonl", [question]) == chains
    for broken in ("{", '{"turns": ["x"]}', '{"turns": "x", "id": "train-0-0"}', "[]"):
        (tmp_path / "t.jsonl").write_text('{"id": "train-0-0", "turns": ["a"]}\n' + broken + "\n")
        with pytest.raises(UserError, match="line 2"):
            read_traces(tmp_path / "t.jsonl", [question])


# ------------------------------------------------------------------------------------------------ learning

def test_only_the_policys_tokens_are_learnt(policy, question):
    """Guards the mask of fine-tuning: prompt and observations are not learnt, end tokens are."""
    trace = replay(policy, Dialogue(), question, [look(10, 10), answer("dotted")])
    learnt = policy.decode([t for t, s in zip(trace.ids, trace.sampled) if s])
    assert learnt == look(10, 10) + "<|im_end|>" + answer("dotted") + "<|im_end|>"
    assert "<observation>" in policy.decode(trace.ids)


def test_fine_tuning_lowers_the_loss_whatever_the_micro_batches(policy, tiny_folder):
    """Guards the loss: it falls, and it does not depend on how the batch is cut."""
    import model as models
    traces = []
    for i in range(4):
        question = toy_search("train", 0, i)
        traces.append(replay(policy, Dialogue(), question, [look(10 + i, 10), answer(question.answer)]))
    logs = []
    for micro_tokens in (1, 10**6):
        fresh = models.load(tiny_folder, device="cpu")
        lines = []
        optimizer = torch.optim.AdamW(fresh.trainable(), lr=3e-3)
        sft.fine_tune(fresh, traces, [optimizer], steps=20, batch=4, seed=0, micro_tokens=micro_tokens, log=lines.append)
        with torch.no_grad():
            logs.append(-fresh.log_probs([[t] for t in traces]).mean().item())
    with torch.no_grad():
        before = -policy.log_probs([[t] for t in traces]).mean().item()
    assert logs[0] < 0.7 * before and logs[0] == pytest.approx(logs[1], rel=0.02)


# ------------------------------------------------------------------------------------------------ pretraining

SHIFTS = list(itertools.product(range(BLOCK), repeat=2))
TEXTURES = {name: CONTRAST * np.stack([np.roll(pattern, shift, (0, 1)) for shift in SHIFTS]) for name, pattern in PATTERNS.items()}


def pattern_at(image, point, colour):
    """The pattern of a card (or tile) of this colour, read from the 4x4 px around a point of it: the one that gives these px at
    some phase; None where none does, or where the colour is another."""
    x, y = point
    texture = np.asarray(image)[y:y + BLOCK, x:x + BLOCK] - np.array(COLOURS[colour], float)     # (4, 4, 3)
    if np.ptp(texture, axis=2).any():
        return None
    return next((name for name, phases in TEXTURES.items() if (phases == texture[..., 0]).all((1, 2)).any()), None)


def test_tiles_are_as_they_are_said_to_be():
    """Guards the vision tower's first lessons: colour and pattern of every tile, read again from the image, in the order of the
    tokens, with every class met and nothing else asked."""
    rng, met = random.Random(0), set()
    for _ in range(40):
        image, truths = sft.tile_truths(rng)
        assert image.size == (64, 64) and len(truths) == 16
        for i, (colour, pattern, *rest) in enumerate(truths):
            name = list(COLOURS)[colour]
            assert pattern_at(image, (i % 4 * 16 + 6, i // 4 * 16 + 6), name) == list(PATTERNS)[pattern]
            assert rest == [sft.UNASKED] * 3
            met.add((colour, pattern))
    assert len(met) == len(COLOURS) * len(PATTERNS)


def test_cells_are_as_they_are_said_to_be():
    """Guards the lessons on overviews: of every token, whether its cell has a card, of what colour, where, and the how manieth
    of its colour it is, read again from the image; patterns, which cannot be seen in it, are not asked."""
    rng, bare, met = random.Random(0), np.asarray(Image.fromarray(BACKGROUND).reduce(4)), [set() for _ in sft.CLASSES]
    for _ in range(60):
        image, truths = sft.cell_truths(rng)
        pixels, seen = np.asarray(image), []
        assert image.size == (64, 64) and len(truths) == 16
        for i, truth in enumerate(truths):
            row, column = i // 4, i % 4
            colour, pattern, x, y, number = truth
            for classes, value in zip(met, truth):
                classes.add(value)
            assert pattern == sft.UNASKED
            if colour == len(COLOURS):
                middle = slice(row * 16 + 4, row * 16 + 12), slice(column * 16 + 4, column * 16 + 12)
                assert (pixels[middle] == bare[middle]).all() and truth[2:] == (sft.UNASKED,) * 3
                continue
            x, y = sft.PLACES[x], sft.PLACES[y]
            card = pixels[(y - 20) // 4:(y + 20) // 4, (x - 20) // 4:(x + 20) // 4]
            assert (x // 64, y // 64) == (column, row) and (card == COLOURS[list(COLOURS)[colour]]).all()
            assert number == seen.count(colour)
            seen.append(colour)
        assert seen
    assert [len(classes - {sft.UNASKED}) for classes in met] == [len(COLOURS) + 1, 0, len(sft.PLACES), len(sft.PLACES), 3]


def test_lists_are_true(policy):
    """Guards the lessons that locate: of each colour present all cards in reading order, where they are, and then no more; one
    absent colour; and the overview is what the image processor makes of the drawing."""
    for seed in range(30):
        scene, kind = sft.mixed_scene(random.Random(seed)), {}
        assert policy.picture(sft.overview(scene)).image.tobytes() == policy.picture(scene.draw()).image.tobytes()
        text = policy.decode(sft.lesson_list(policy, random.Random(seed), **kind).ids)
        said = {part.partition(":")[0].strip(): part.partition(":")[2] for part in text.split(" None.") if part}
        present = {c.colour for c in scene.cards}
        assert set(said) >= present and len(said) == min(len(COLOURS), len(present) + 1)
        for colour, listed in said.items():
            cards = Scene(scene.cards, colour).candidates
            assert listed == "".join(" " + sft.card_text(i, (c.x / 4, c.y / 4)) for i, c in enumerate(cards, 1))


def test_what_is_read_from_close_ups_is_in_them(policy):
    """Guards the lessons that read: the answer to each close-up is the pattern that its middle shows."""
    rng, met = random.Random(0), set()
    for _ in range(30):
        lesson = sft.lesson_read(policy, rng)
        text = policy.decode(lesson.prompt.ids + lesson.ids)
        colours = re.findall(r"One (\w+) card", text)
        answers = [parse_turn(part + "</answer>").answer for part in text.split("</answer>")[:-1]]
        pictures = lesson.prompt.pictures + lesson.pictures
        for picture, colour, answer in zip(pictures, colours, answers, strict=True):
            assert pattern_at(picture.image, (30, 30), colour) == answer
            met.add(answer)
    assert met == set(PATTERNS)


@pytest.mark.parametrize("show", [False, True])
def test_dialogues_of_lessons_are_true(policy, show):
    """Guards the lessons on dialogues: a thought after a crop names the pattern that the crop shows, or says that it shows no
    card of that colour; observations, and the places of looks that went astray, are not learnt."""
    rng, met = random.Random(0), set()
    for _ in range(40):
        lesson = sft.lesson_dialogue(policy, rng, 0.3, show)
        colour = next(c for c in COLOURS if f" {c}" in policy.decode(lesson.prompt.ids))
        *turns, end = policy.decode(lesson.ids).split("<|im_end|>")
        assert turns[-1].endswith("</answer>") and not end
        thoughts = [parse_turn(turn).thought for turn in turns if "<think>" in turn]
        for picture, thought in zip(lesson.pictures, thoughts[1:], strict=True):
            said = re.match(r"\w+", thought)[0].lower()
            seen = {pattern_at(picture.image, (x, y), colour) for x in range(0, 60, 4) for y in range(0, 60, 4)}
            assert said in seen or said == "nothing"
            assert pattern_at(picture.image, (30, 30), colour) in (None, said)
            met.add(said)
        learnt = policy.decode([t for t, s in zip(lesson.ids, lesson.sampled) if s])
        assert learnt.count("Card ") == sum("Card " in thought for thought in thoughts)
        assert "<observation>" not in learnt
    assert met == {*PATTERNS, "nothing"}


def tower_accuracy(policy, draw, part):
    """The share of tokens whose nearest direction, of one part of the classes, is the true one; on images of no lesson."""
    torch.manual_seed(0)
    directions = torch.nn.init.orthogonal_(torch.empty(sum(sft.CLASSES), policy.text_config.hidden_size)).split(sft.CLASSES)[part]
    drawn = [draw(random.Random(f"unseen {i}")) for i in range(8)]
    with torch.no_grad():
        tokens = torch.cat(policy.features([policy.picture(image) for image, _ in drawn]))
    truths = torch.tensor([truth[part] for _, truths in drawn for truth in truths])
    asked = truths != sft.UNASKED
    return ((tokens @ directions.T).argmax(-1) == truths)[asked].float().mean().item()


def test_the_vision_tower_learns(policy):
    """Guards the first part of pretraining: within some steps the tower's tokens point along the direction of the colour that
    they show; the language model stays as it was, and the tower is frozen afterwards."""
    before = tower_accuracy(policy, sft.cell_truths, 0)
    language = [p.clone() for p in policy.trainable()]
    lines = []
    sft.train_tower(policy, 0, steps=100, log=lines.append)
    assert tower_accuracy(policy, sft.cell_truths, 0) > max(0.8, before + 0.2)
    assert len(lines) == 1 and "vision tower 100/100" in lines[0]
    assert not policy.train_vision and all(map(torch.equal, language, policy.trainable()))


def test_the_language_model_learns_with_the_tower_frozen(policy, monkeypatch):
    """Guards the second part: the loss falls within a few steps, and nothing of the vision tower changes."""
    tower = [p.clone() for p in policy.model.model.visual.parameters()]
    optimizers = sft.make_optimizers(policy, "muon", 0.01, adamw_lr=5e-3)
    monkeypatch.setattr(sft, "lesson_mix", lambda share: {"read": 1, "dialogue": 2, "list": 2})
    losses = [sft.learn_lessons(policy, optimizers, step, 25, 0, 1.0) for step in range(25)]
    assert max(losses[:3]) > 5 and max(losses[-3:]) < 3
    assert all(map(torch.equal, tower, policy.model.model.visual.parameters()))


def test_the_mix_of_lessons():
    """Guards the curriculum: as many lessons in each step, lists alone at first, dialogues later on, scenes ever fuller."""
    for share in (0, 0.1, 0.3, 0.6, 1):
        mix = sft.lesson_mix(share)
        assert sum(mix.values()) == 16 and min(mix.values()) >= 0 and (mix["dialogue"] > 0) == (share >= 0.2)
        assert all(len(sft.mixed_scene(random.Random(i), **sft.list_kind(share)).cards) <= 9 for i in range(20))
    assert sft.list_kind(0)["most"] == 1


# ------------------------------------------------------------------------------------------------ the exam

GOOD, BAD = ({"lists": lists, "says dotted": 1.0, "target 1": 1.0} for lists in (0.95, 0.5))


@pytest.mark.parametrize("exams, steps", [([GOOD], 8), ([BAD, GOOD], 10), ([BAD] * 9, 16)])
def test_pretraining_ends_with_an_exam(policy, monkeypatch, exams, steps):
    """Guards the end: a base that passes is done after its steps, one that fails gets a quarter more and tries again, and twice
    the steps is the bound; a failure is said loudly, with what was failed, and the last exam is what is handed back."""
    taken, learnt, rates = iter(exams), [], []
    monkeypatch.setattr(sft, "train_tower", lambda *how, **more: None)
    monkeypatch.setattr(sft, "exam", lambda *how, **more: next(taken))
    monkeypatch.setattr(sft, "learn_lessons", lambda *how: learnt.append(how[2]) or rates.append(how[5]) or 1.0)
    lines = []
    found = sft.pretrain(policy, 8, 0, log=lines.append)
    failed = [line for line in lines if "NOT PASSED" in line]
    assert learnt == list(range(steps)) and max(rates[8:], default=0) <= 0.4
    assert found is (GOOD if GOOD in exams else BAD)
    assert len(failed) == {8: 0, 10: 1, 16: 5}[steps]
    assert all("NOT PASSED in lists" in line and "dotted" not in line for line in failed)
    assert [line.endswith("more lessons") for line in failed] == [True] * (len(failed) - (steps == 16)) + [False] * (steps == 16)


def instructed(scene):
    return Question(f"Show each {scene.colour} card.", [scene.draw], "", scene=scene)


def dialogue(policy, scene, order=None, lie=None, **how):
    """A dialogue of the instructed kind that looks at all candidates (or those of `order`) and says what each crop shows. lie:
    what it says instead, of the first one."""
    turns, thought = [], ""
    for card in order or scene.candidates:
        spot = card.x / 4, card.y / 4
        turns.append(f"<think>{thought}Card at {sft.spoken(spot)}.</think>\n{call_text(spot)}")
        thought = f"{(lie or card.pattern).capitalize()}. "
        lie = None
    return replay(policy, Dialogue(**how), instructed(scene), [*turns, answer("dotted", thought.strip())])


def three_cards():
    return next(scene for i in range(99) if len((scene := sft.patterned(random.Random(i))).candidates) == 3
                and len({c.pattern for c in scene.candidates}) == 3)


def test_the_exam_marks_rightly(policy):
    """Guards the marks: each thought about a card, under the pattern that it bears, and each candidate, looked at in its turn or
    not; a crop of nothing is not examined; a trace that breaks off is marked for what it did."""
    scene = three_cards()
    first, second, third = scene.candidates
    def marks(**how):
        return dict(sft.examine(dialogue(policy, scene, **how)))
    says = {f"says {c.pattern}": True for c in scene.candidates}
    targets = {f"target {i}": True for i in (1, 2, 3)}
    assert marks() == says | targets
    wrong = next(p for p in PATTERNS if p not in {c.pattern for c in scene.candidates})
    assert marks(lie=wrong) == says | targets | {f"says {first.pattern}": False}
    assert marks(lie=f"{first.pattern} {wrong}") == says | targets | {f"says {first.pattern}": False}
    assert marks(order=[second, first, third]) == says | targets | {"target 1": False, "target 2": False}
    assert marks(order=[first]) == {f"says {first.pattern}": True, "target 1": True}
    other = next(c for c in scene.cards if c.colour != scene.colour)
    missed = [other, first, second, third]
    found = sft.examine(dialogue(policy, scene, order=missed, lie="nothing"))
    assert all(right for name, right in found if name.startswith("says")) and len(found) == 6
    assert not any(right for name, right in found if name.startswith("target"))


@pytest.mark.parametrize("lie", [None, "striped"])
def test_the_exam_of_a_whole_policy(policy, monkeypatch, lie):
    """Guards the shares: one that sees and says all is given 1 in everything, one that says wrong of every first card fails;
    who knows no lists has next to 0 in them; and the seeds of questions differ."""
    asked = []
    def scripted(policy, questions, dialogue_, group, seeds, **sampling):
        asked.extend(zip(seeds, questions, strict=True))
        for question in questions:
            yield [dialogue(policy, question.scene, lie=lie)]
    monkeypatch.setattr(sft, "rollout", scripted)
    found = sft.exam(policy, 0, n=16)
    assert len({seed for seed, _ in asked}) == 16 and len({question.scene for _, question in asked}) == 16
    assert all(question.text.startswith("Show each") for _, question in asked)
    assert {name.split()[0] for name in found} == set(sft.PASSES)
    assert found.pop("lists") < 0.01
    targets = {name: share for name, share in found.items() if name.startswith("target")}
    said = [share for name, share in found.items() if name.startswith("says")]
    assert set(targets.values()) == {1.0} and len(targets) == 3
    assert min(said) == 1 if lie is None else min(said) < sft.PASSES["says"]


# ------------------------------------------------------------------------------------------------ Muon

def test_muon_takes_the_same_step_as_torchs():
    """Guards our float32 Muon: torch's (in bfloat16) must agree within its precision."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(48, 32, generator=generator) for _ in range(2))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for p, optimizer in ((ours, Muon([ours], lr=0.01)), (theirs, torch.optim.Muon([theirs], lr=0.01, weight_decay=0.01))):
        for _ in range(2):
            p.grad = grad.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    singular = torch.linalg.svdvals(orthogonalise(grad[None])[0])
    assert 0.3 < singular.min() and singular.max() < 1.3


# ------------------------------------------------------------------------------------------------ AdamW in bfloat16

def test_rounding_is_right_on_average():
    """Guards the write-back: only the two neighbours are taken, and their mean is the number itself."""
    x = torch.cat([torch.full((100_000,), value) for value in (0.020003, -0.3001, 1.0)])
    found = rounded(x, torch.Generator().manual_seed(0)).float().view(3, -1)
    for row, value, gap in zip(found, (0.020003, -0.3001, 1.0), (2**-13, 2**-9, 0.0)):
        assert len(row.unique()) == (2 if gap else 1) and (row - value).abs().max() <= gap
        assert row.double().mean().item() == pytest.approx(value, abs=0.02 * gap + 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_steps_move_bfloat16_weights(dtype):
    """Guards training in bfloat16: steps of 1e-6 at 0.02, a hundredth of the spacing, must add up to what float32 AdamW does,
    whatever the type of the moments; and the second moment must not get stuck."""
    generator, p = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.full((8192,), 0.02, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(p.detach().float())
    start = exact.detach().clone()
    ours, theirs = RoundedAdamW([p], lr=1e-6, dtype=dtype), torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.01)
    for _ in range(1000):
        exact.grad = 1e-3 * (1 + torch.randn(8192, generator=generator))
        p.grad = exact.grad.bfloat16()
        ours.step()
        theirs.step()
    moved, expected = ((x.detach().float() - start).mean().item() for x in (p, exact))
    assert expected < -5e-4 and moved == pytest.approx(expected, rel=0.02)
    second = [o.state[x]["exp_avg_sq"].float().mean().item() for o, x in ((ours, p), (theirs, exact))]
    assert second[0] == pytest.approx(second[1], rel=0.02)


def test_our_adamw_is_adamw(monkeypatch):
    """Guards the arithmetic, its slices among it: on float32 weights it takes torch's steps; a sharded parameter takes the
    same step as a plain one."""
    monkeypatch.setattr(RoundedAdamW, "SLICE", 64)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(x) for x in torch.randn(40, 7).expand(2, -1, -1).clone())
    pairs = [(ours, RoundedAdamW([ours], lr=1e-2)), (theirs, torch.optim.AdamW([theirs], lr=1e-2))]
    for _ in range(5):
        grad = torch.randn(40, 7)
        for p, optimizer in pairs:
            p.grad = grad.clone()
            optimizer.step()
    assert (ours - theirs).abs().max() < 1e-6
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, plain = dist.device_mesh.init_device_mesh("cpu", (1,)), torch.nn.Parameter(torch.randn(9, 5).bfloat16())
        sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        grad = torch.randn(9, 5).bfloat16()
        plain.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for p in (plain, sharded):
            RoundedAdamW([p], lr=0.1).step()
        assert torch.equal(sharded.full_tensor(), plain)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_our_adamw_is_exact(dtype, tmp_path):
    """Guards --resume in bfloat16: torch's load_state_dict would round float32 moments; and the random numbers go on."""
    def make(values):
        p = torch.nn.Parameter(values.clone())
        return p, RoundedAdamW([p], lr=1e-3, dtype=dtype)
    def step(p, optimizer, number):
        p.grad = torch.randn(50, generator=torch.Generator().manual_seed(number)).bfloat16()
        optimizer.step()
    p, optimizer = make(torch.randn(50, generator=torch.Generator().manual_seed(9)).bfloat16())
    for number in range(3):
        step(p, optimizer, number)
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    q, again = make(kept["p"])
    again.load_state_dict(kept["optimizer"])
    for name in ("exp_avg", "exp_avg_sq"):
        assert again.state[q][name].dtype == dtype and torch.equal(again.state[q][name], optimizer.state[p][name])
    for number in range(3, 6):
        step(p, optimizer, number)
        step(q, again, number)
    assert torch.equal(p, q)


def test_the_type_of_the_weights_decides_the_optimizer(tiny_folder):
    """Guards both paths: float32 weights keep torch's AdamW, bfloat16 ones get ours with the moments' type asked for."""
    import model as models
    assert type(sft.make_optimizers(models.load(tiny_folder, device="cpu"), "adamw", 1e-6)[0]) is torch.optim.AdamW
    half = models.load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    (optimizer,) = sft.make_optimizers(half, "adamw", 1e-6, dtype="bfloat16")
    assert type(optimizer) is RoundedAdamW and optimizer.dtype == torch.bfloat16
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["weight_decay"] == 0.01


def test_the_papers_schedule_of_fine_tuning():
    """Guards the cosine: half-way it is at a half, at the end at `final`; the tiny model's linear decay is as it was."""
    assert sft.learning_rate(50, 100, 3, 0.0, cosine=True) == pytest.approx(0.5)
    assert sft.learning_rate(99, 100, 3, 0.0, cosine=True) < 1e-3 and sft.learning_rate(0, 100, 3, 0.0, cosine=True) < 0.34
    assert sft.learning_rate(50, 100, 3, 0.1) == pytest.approx(0.55)
