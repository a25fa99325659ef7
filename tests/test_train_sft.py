"""Warm start: tree search, linearising, conversion, traces on disk, fine-tuning, what the tiny base
is shown and asked, the optimizers."""
import itertools
import json
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
from model import UserError, load
from reward import is_correct, score
from rollout import (
    BACKGROUND,
    BLOCK,
    COLOURS,
    CONTRAST,
    MOVED,
    PATTERNS,
    RELATION,
    Config,
    Dialogue,
    Question,
    Scene,
    format_call,
    format_point,
    parse_turn,
    toy,
)
from train_sft import (
    BACKTRACK,
    Muon,
    Node,
    RoundedAdamW,
    continue_from,
    cut_trace,
    expand,
    export_traces,
    first_step_end,
    linearise,
    orthogonalise,
    read_traces,
    replay,
    replay_recording,
    rounded,
    search,
    to_multi_turn,
    traces_of,
    usable,
    write_traces,
)

SAMPLING = dict(turn_tokens=30, response_tokens=200)


def zoom_call(x, y, thought="Here"):
    return f"<think>{thought} ({x}, {y}).</think>\n{format_call((x, y))}"


def answer(text, thought="So."):
    return f"<think>{thought}</think>\n<answer>{text}</answer>"


def finished(policy, question, texts, mode="zoom"):
    return replay(policy, Dialogue(mode), question, texts)


@pytest.fixture
def question():
    return toy("toy-search", "train", 0, 0)


def wrong_answer(question):
    return "checked" if question.answer == "dotted" else "dotted"


# -------------------------------------------------------------------------------------- tree search

def test_ucb1():
    """Guards selection: value + c * sqrt(ln(N_parent + 1) / (N_child + 1)), and means backed up to
    the root."""
    root = Node(None)
    root.children = [Node(None, root), Node(None, root)]
    for reward in (1, 0, 1):
        root.children[0].back_up(reward)
    root.children[1].back_up(0)
    assert root.visits == 4 and root.value == pytest.approx(0.5)
    assert root.children[0].value == pytest.approx(2 / 3)
    bounds = [child.value + 2 * math.sqrt(math.log(5) / (child.visits + 1))
              for child in root.children]
    assert root.select(2) is root.children[bounds.index(max(bounds))] is root.children[0]
    assert root.select(10) is root.children[1]


def test_steps_of_the_zoom_mode_are_turns(policy, question):
    """Guards the cut: a step ends where the next turn begins, its observation included, and can be
    continued from there; the trace that it is cut from stays as it is."""
    trace = finished(policy, question, [zoom_call(10, 10), zoom_call(40, 40), answer("dotted")])
    end = first_step_end(policy, trace, 0)
    step = cut_trace(policy, trace, end)
    assert end == trace.turn_starts[1] and step.zoom_points == [(10, 10)]
    assert not step.ended and len(step.pictures) == 1
    second = cut_trace(policy, trace, first_step_end(policy, trace, end))
    assert second.zoom_points == [(10, 10), (40, 40)]
    last = first_step_end(policy, trace, trace.turn_starts[2])
    assert cut_trace(policy, trace, last) is trace
    assert trace.ended == "answer" and len(trace.turns) == 3


def test_steps_of_a_single_turn_are_sentences_with_points(policy, question):
    """Guards single-turn search: a step ends behind its point; the last one runs to the end."""
    text = "<think>A cup (1, 2). A pot (3, 4). Done.</think>\n<answer>red</answer>"
    trace = finished(policy, question, [text], "grounded")
    first = first_step_end(policy, trace, 0)
    assert policy.decode(trace.ids[:first]).rstrip(". ").endswith("(1, 2)")
    second = first_step_end(policy, trace, first)
    assert policy.decode(trace.ids[first:second]).rstrip(". ").endswith("(3, 4)")
    assert first_step_end(policy, trace, second) == len(trace.ids)
    assert cut_trace(policy, trace, second).prefix.startswith("<think>A cup (1, 2)")


def test_a_step_that_repeats_a_point_is_dropped(policy, question):
    """Guards expansion: a point 1 px from one already used on the path is a repetition; a sibling's
    own step is the sibling."""
    trace = finished(policy, question, [zoom_call(10, 10), answer("dotted")])
    leaf = Node(cut_trace(policy, trace, trace.turn_starts[1]), Node(None), points=((10, 10),))
    repeat = finished(policy, question, [zoom_call(10, 10), zoom_call(11, 10), answer("dotted")])
    other = finished(policy, question, [zoom_call(10, 10), zoom_call(40, 40), answer("dotted")])
    assert expand(policy, leaf, repeat, 10) is None and not leaf.children
    child = expand(policy, leaf, other, 10)
    assert child.points == ((10, 10), (40, 40)) and child.parent is leaf
    assert leaf.children == [child]
    assert expand(policy, leaf, other, 10) is child and leaf.children == [child]


def test_too_deep_a_path_is_made_to_answer(policy, question):
    """Guards the bound on depth: the answer is asked for, in tokens that are not the policy's."""
    trace = finished(policy, question, [zoom_call(10, 10), zoom_call(40, 40), answer("dotted")])
    node = expand(policy, Node(finished(policy, question, [])), trace, depth=1)
    assert node.trace.prefix.endswith("<answer>") and not node.trace.sampled[-1]


def test_continuing_from_a_path_gives_complete_traces(policy, question):
    """Guards the reuse of prefixes: what comes back begins with the path, in the prefixes' order,
    and its log-probabilities are those of a plain pass; the path itself stays as it is."""
    trace = finished(policy, question, [zoom_call(10, 10), answer("dotted")])
    path = cut_trace(policy, trace, trace.turn_starts[1])
    root = Dialogue().start(policy, question, 1)[0]
    nodes = [Node(root), Node(path)]
    continued = [traces for _, traces in continue_from(policy, Dialogue(), nodes, 2, SAMPLING)]
    assert [len(traces) for traces in continued] == [2, 2]
    assert [node.rollouts for node in nodes] == continued
    assert not root.ids and not path.ended and len(path.turns) == 1
    start = len(path.ids)
    for trace in continued[1]:
        assert trace.ids[:start] == path.ids and trace.turns[0].call == (10, 10) and trace.ended
        assert len(trace.ids) == len(trace.sampled) == len(trace.log_probs)
        assert trace.prompt is path.prompt and trace.rng is path.rng
        new = [log_prob for log_prob, sampled
               in zip(trace.log_probs[start:], trace.sampled[start:], strict=True) if sampled]
        assert new
        with torch.no_grad():
            again = policy.log_probs([[trace]])[-len(new):]
        assert torch.allclose(again, torch.tensor(new), atol=1e-5)


def test_search_counts_every_rollout(policy):
    """Guards all parts together: visits add up, children are at most `width`, the value is the
    mean reward, and a window that a tree shows twice is one picture."""
    questions = [toy("toy-search", "train", 0, i) for i in range(3)]
    roots = search(policy, questions, Dialogue(), range(3), SAMPLING, simulations=2, width=3,
                   rollouts=2, log=lambda line: None)
    for root in roots:
        assert root.visits >= 4 and 0 <= root.value <= 1
        for node in root.walk():
            assert len(node.children) <= 3
            assert all(child.parent is node for child in node.children)
            assert node.trace.crops is root.trace.crops
            assert node.depth == (node.parent.depth + 1 if node.parent else 0)


def test_trees_are_searched_some_at_a_time(policy, tiny_folder, monkeypatch, tmp_path):
    """Guards memory: no more than TREES trees are alive at once; each question keeps its own seed
    and chains, in the questions' order."""
    searched = []

    def search_some(policy, questions, dialogue, seeds, sampling, **more):
        searched.append(list(zip([question.id for question in questions], seeds, strict=True)))
        return questions
    monkeypatch.setattr(sft, "TREES", 2)
    monkeypatch.setattr(sft, "search", search_some)
    monkeypatch.setattr(sft, "linearise", lambda question, backtrack: [[answer(question.id)]])
    monkeypatch.setattr(sft, "describe_tree", lambda question: f"tree of {question.id}")
    config, printed = Config(search_questions=5, seed=3, show_trees=2), []
    chains = sft.make_traces(config, tiny_folder, tmp_path, printed.append)
    assert [len(block) for block in searched] == [2, 2, 1]
    assert sum(searched, []) == [(f"train-3-{i}", f"search 3 {i}") for i in range(5)]
    assert [turns for _, turns in chains] == [[answer(f"train-3-{i}")] for i in range(5)]
    assert read_traces(tmp_path / "search.jsonl", [question for question, _ in chains]) == chains
    trees = (tmp_path / "trees.txt").read_text().rstrip("\n").split("\n\n")
    assert [tree.split("\n")[0] for tree in trees] == [f"tree of train-3-{i}" for i in range(5)]
    assert all("\ntaken: " in tree for tree in trees)
    assert printed[-1] == "\n\n".join(trees[:2])


# -------------------------------------------------------------------------------------- linearising

def tree(policy, question, rollouts):
    root = Node(Dialogue().start(policy, question, 1)[0])
    root.rollouts = [finished(policy, question, texts) for texts in rollouts]
    return root


def test_a_tree_without_a_right_rollout_gives_nothing(policy, question):
    """Guards the data: nothing is learned from wrong traces alone."""
    bad = [zoom_call(9, 9), answer(wrong_answer(question))]
    assert linearise(tree(policy, question, [bad])) == []


def test_chains_straight_and_with_back_tracking(policy, question):
    """Guards linearising: right ones as they are; a wrong one, the sentence, and then the zoom
    calls of the right one that are new; each chain once, its common prefix once."""
    bad = [zoom_call(10, 10), answer(wrong_answer(question))]
    good = [zoom_call(11, 10), zoom_call(40, 40, "Plain. There"), answer(question.answer)]
    chains = linearise(tree(policy, question, [bad, good, good]))
    assert good in chains and len(chains) == 2
    joined, = [chain for chain in chains if chain != good]
    assert joined == [bad[0], zoom_call(40, 40, BACKTRACK + "Plain. There"), good[2]]
    trace = replay(policy, Dialogue(), question, joined)
    assert is_correct(trace) and trace.ended == "answer" and score(trace).format == 1


def test_straight_chains_alone(policy, question):
    """Guards --no-backtrack: right rollouts as they are, and nothing else."""
    bad = [zoom_call(10, 10), answer(wrong_answer(question))]
    good = [zoom_call(11, 10), zoom_call(40, 40, "Plain. There"), answer(question.answer)]
    assert linearise(tree(policy, question, [bad, good, good]), backtrack=False) == [good]


@pytest.mark.parametrize("path", ["", "<think>At (9, 9)."])
def test_back_tracking_within_a_single_turn(policy, question, path):
    """Guards single-turn linearising: the wrong thought, the sentence, the rest of the right one
    behind the path that both share; one answer."""
    root = Node(Dialogue("grounded").start(policy, question, 1)[0])
    root.trace.prefix = path
    start = path or "<think>"
    texts = [f"{start}A (1, 2).</think>\n<answer>{wrong_answer(question)}</answer>",
             f"{start}B (3, 4).</think>\n<answer>{question.answer}</answer>"]
    root.rollouts = [finished(policy, question, [text], "grounded") for text in texts]
    joined = f"{start}A (1, 2). {BACKTRACK}B (3, 4).</think>\n<answer>{question.answer}</answer>"
    assert [joined] in linearise(root)


# --------------------------------------------------------------------- from single to several turns

def thoughts_and_calls(turns):
    parsed = [parse_turn(turn) for turn in turns]
    return [turn.thought for turn in parsed], [turn.call for turn in parsed]


def test_single_turn_to_multi_turn():
    """Guards the conversion: each new point a zoom call, at most four, what is left stays with the
    answer, answers may be points."""
    text = ("<think>A cup (1, 2). Again (1, 2). A pot [30, 4]: odd. So be it.</think>\n"
            "<answer>(3, 4)</answer>")
    turns = to_multi_turn(text, later=0)
    thoughts, calls = thoughts_and_calls(turns)
    assert calls == [(1, 2), (30, 4), None]
    assert thoughts == ["A cup (1, 2).", "Again (1, 2). A pot [30, 4]: odd.", "So be it."]
    assert parse_turn(turns[2]).answer == "(3, 4)"
    many = " ".join(f"P ({i * 20}, 5)." for i in range(7))
    turns = to_multi_turn(f"<think>{many}</think><answer>x</answer>", max_crops=4, later=0)
    assert len(turns) == 5
    assert parse_turn(turns[4]).thought == "P (80, 5). P (100, 5). P (120, 5)."
    assert thoughts_and_calls(to_multi_turn(text, later=1))[1] == [(30, 4), (1, 2), None]
    no_point = "<think>no point</think><answer>x</answer>"
    assert to_multi_turn(no_point) == [no_point]


def test_sentences_are_not_cut():
    """Guards thoughts as real outputs have them: the point in mid-sentence, decimals, several
    points in a sentence (the first is shown), steps on lines of their own."""
    text = ("<think>At (120, 200) there is a chair. The lamp at (12.5, 40.25) and the cup at "
            "(7, 8) are red!\n1. The sign (90, 30) says EXIT\nIt is red.</think>\n"
            "<answer>red</answer>")
    thoughts, calls = thoughts_and_calls(to_multi_turn(text, later=0))
    assert thoughts == ["At (120, 200) there is a chair.",
                        "The lamp at (12.5, 40.25) and the cup at (7, 8) are red!",
                        "1. The sign (90, 30) says EXIT", "It is red."]
    assert calls == [(120, 200), (12, 40), (90, 30), None]


@pytest.mark.parametrize("later", [0, 1])
def test_no_thought_is_empty(policy, question, later):
    """Guards chains that end in a point: our own reward calls an empty thought ill-formed (0.6 in
    place of 1.0), and such a trace would be dropped."""
    text = f"<think>A (10, 10). B (40, 40).</think>\n<answer>{question.answer}</answer>"
    turns = to_multi_turn(text, later=later)
    assert thoughts_and_calls(turns)[0][2] == f"The answer is {question.answer}."
    trace, = traces_of(policy, Dialogue(), [(question, [text])])
    scored = score(trace)
    assert scored.correct == scored.format == scored.grounded == 1 and scored.zoom_calls == 2


# ------------------------------------------------------------------------------------- which traces

def test_only_right_well_formed_and_grounded_traces_are_learned(policy, question):
    """Guards the filter before fine-tuning, and what the log says of it: a right answer alone would
    teach what the reward then punishes."""
    right = question.answer
    chains = {
        "good": [zoom_call(10, 10), answer(right)],
        "several": [zoom_call(10, 10), zoom_call(40, 40), answer(right)],
        "wrong": [zoom_call(10, 10), answer(wrong_answer(question))],
        "empty": [zoom_call(10, 10), answer(right, "")],
        "outside": [zoom_call(10, 10), answer(right, "It is at (500, 3).")],
        "pointless": [f"<think>Hm.</think>\n{format_call((9, 9))}", answer(right)],
        "unended": [zoom_call(10, 10)],
    }
    traces = {name: finished(policy, question, texts) for name, texts in chains.items()}
    lines = []
    kept = usable(list(traces.values()), lines.append)
    assert kept == [traces["good"], traces["several"]]
    line, = lines
    assert "2 of 7 traces" in line and "1 of them with several zoom calls" in line
    assert "'wrong': 2" in line and "'ill-formed': 1" in line and "'not grounded': 2" in line


# ----------------------------------------------------------------------------------- traces on disk

def test_traces_on_disk(policy, question, tmp_path):
    """Guards --traces: what was written is read again; a broken row is named by its number."""
    chains = [(question, [zoom_call(10, 10), answer("dotted")])]
    path = tmp_path / "t.jsonl"
    write_traces(path, chains)
    assert read_traces(path, [question]) == chains
    good = '{"id": "train-0-0", "turns": ["a"]}\n'
    for broken in ("{", '{"turns": ["x"]}', '{"turns": "x", "id": "train-0-0"}', "[]", "3",
                   '{"turns": [], "id": "train-0-0"}', '{"messages": [], "images": []}'):
        path.write_text(good + broken + "\n")
        with pytest.raises(UserError, match="row 2"):
            read_traces(path, [question])
    for text in ("", "[]", "[1, "):
        path.write_text(text)
        with pytest.raises(UserError, match=str(path)):
            read_traces(path, [question])
    with pytest.raises(UserError, match="none.jsonl"):
        read_traces(tmp_path / "none.jsonl", [question])


CHOICE = "<image>\nWhat colour is the glove?\n(A) red\n(B) blue\nAnswer with the option's letter."
SHOWN = ("<observation>\nHere is the crop of the image centered on the coordinate:\n<image>\n"
         "</observation>")


def released(calls, **fields):
    """A row of the release's fine-tuning data: a dialogue with so many crops, drawn images."""
    messages = [{"role": "system", "content": "You look closer."},
                {"role": "user", "content": CHOICE}]
    for i in range(calls):
        messages.append({"role": "assistant", "content": zoom_call(20 + i, 30)})
        messages.append({"role": "user", "content": SHOWN})
    messages.append({"role": "assistant", "content": "<think> Red at (3, 4). </think>\n"
                                                     "<answer> A </answer>"})
    images = ["images/scene.png", *(f"images/crop{i}.png" for i in range(calls))]
    return {"messages": messages, "images": images, "gt_answer": "A", **fields}


@pytest.fixture
def release(tmp_path):
    """release(rows) -> the path of a file of these rows, a list, beside drawn images."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100), "white").save(tmp_path / "images/scene.png")
    for i in range(5):
        Image.new("RGB", (64, 64), (40 * i, 90, 200)).save(tmp_path / f"images/crop{i}.png")

    def write(rows):
        path = tmp_path / "released.json"
        path.write_text(json.dumps(rows))
        return path
    return write


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_the_releases_dialogues_are_replayed_as_they_are(policy, release, calls):
    """Guards --traces FILE of the release: the crops are the files' images, five of them too (one
    more than our tool gives), the user's words are theirs, and exactly the assistant's tokens are
    learned, end tokens too."""
    row = released(calls)
    (question, recording), = read_traces(release([row]), [])
    trace = replay_recording(policy, Dialogue(), question, recording)
    ids = trace.prompt.ids + trace.ids
    text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", policy.decode(ids))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                       for message in row["messages"])
    assert text == expected.replace("<image>", image).removesuffix("\n")
    learned = policy.decode([i for i, s in zip(trace.ids, trace.sampled, strict=True) if s])
    assert learned == "".join(message["content"] + "<|im_end|>" for message in row["messages"]
                              if message["role"] == "assistant")
    assert [picture.image.getpixel((9, 9)) for picture in trace.pictures] == [
        (40 * i, 90, 200) for i in range(calls)]
    assert ids.count(policy.image_token) == sum(
        picture.tokens for picture in trace.prompt.pictures + trace.pictures)
    scored = score(trace)
    assert scored.correct == scored.format == scored.grounded == 1 and scored.zoom_calls == calls
    assert trace.turn_starts == [
        i for i, s in enumerate(trace.sampled) if s and not (i and trace.sampled[i - 1])]
    assert len(usable(traces_of(policy, Dialogue(), [(question, recording)]), print)) == 1
    with torch.no_grad():
        assert policy.log_probs([[trace]]).shape == (sum(trace.sampled),)


def test_the_releases_answers_are_scored(policy, release):
    """Guards the filter on released rows: boxes, options and words, by the rules of their
    answers."""
    rows = [released(0), released(0, gt_answer="B"), released(0, gt_answer="(10, 20, 60, 80)")]
    rows[2]["messages"][-1] = {"role": "assistant", "content": "<think>At (20, 20).</think>\n"
                                                               "<answer>(20, 20)</answer>"}
    chains = read_traces(release(rows), [])
    assert [question.kind for question, _ in chains] == ["choice", "choice", "point"]
    traces = traces_of(policy, Dialogue(), chains)
    assert [is_correct(trace) for trace in traces] == [True, False, True]


def broken_rows():
    fewer = released(2)
    fewer["images"].pop()
    unanswered = released(1)
    unanswered["messages"].pop()
    no_truth = released(0)
    del no_truth["gt_answer"]
    late_system = released(1)
    late_system["messages"].insert(2, {"role": "system", "content": "Look closer."})
    return {"an image less": fewer, "no last answer": unanswered, "no truth": no_truth,
            "a system message inside": late_system,
            "an answer in numbers": released(0, gt_answer="(1, 2, 3)"),
            "no image": released(0, images=[]), "no text": released(0, messages=[{"role": "user"}])}


@pytest.mark.parametrize("name, row", broken_rows().items())
def test_rows_that_are_no_dialogue_are_refused(release, name, row):
    """Guards the reader: a row whose images and places do not agree, or that ends without the
    assistant, is named by its number, in a line."""
    with pytest.raises(UserError, match="row 2: no trace") as error:
        read_traces(release([released(1), row]), [])
    assert "\n" not in str(error.value)


def test_a_missing_crop_names_its_file_and_row(policy, release, tmp_path):
    """Guards the message: images are opened when a row is replayed; --image-root comes first."""
    path = release([released(3)])
    (tmp_path / "images/crop2.png").unlink()
    with pytest.raises(UserError, match=r"crop2\.png .*row 1.*no such image"):
        traces_of(policy, Dialogue(), read_traces(path, []))
    root = tmp_path / "elsewhere"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (200, 100), "white").save(root / "images/scene.png")
    (question, recording), = read_traces(path, [], root)
    assert question.images == [root / "images/scene.png"]
    assert recording.crops[0] == root / "images/crop0.png"


def test_special_tokens_of_a_file_are_only_text(policy, release):
    """Guards the chat: a row cannot end a turn, or stand for an image, by writing a token."""
    row = released(0)
    row["messages"][1]["content"] += "<|im_end|><|image_pad|>"
    (question, recording), = read_traces(release([row]), [])
    trace = replay_recording(policy, Dialogue(), question, recording)
    assert trace.prompt.ids.count(policy.image_token) == trace.prompt.pictures[0].tokens
    assert trace.prompt.ids.count(policy.tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("how", [{}, {"crop_dot": True, "before_dotted": "Dotted: "},
                                 {"system_prompts": {}, "coordinates": "unrounded"}])
def test_what_is_exported_is_the_same_dialogue(policy, tmp_path, how):
    """Guards --export: read again from the file and its images, the traces have the same tokens,
    the same mask and the same pixels, and are as right as before, answers that are points among
    them; hints are part of the question. (Coordinates "unrounded" are in px of an image that is
    encoded at another size: only they, and the words, are the same.)"""
    policy.image_processor.size["shortest_edge"] = 256
    dialogue = Dialogue(**how)
    image = Image.effect_noise((100, 90), 90).convert("RGB")
    words = toy("toy-search", "train", 0, 0)
    place = Question("Description: the sign", [image], (40, 50, 70, 80), "point",
                     hint="Say (x, y).")
    frame = dialogue.start(policy, place, 1)[0].frames[0]
    x, y = map(round, frame.to_input((55, 65)))
    chains = [(words, [zoom_call(10, 10), zoom_call(40, 40), answer(words.answer)]),
              (place, [zoom_call(x, y), answer(f"({x}, {y})")]),
              (words, [zoom_call(30, 30), answer(words.answer, "At (3, 4).")])]
    before = traces_of(policy, dialogue, chains)
    path = tmp_path / "folder" / "traces.json"
    path.parent.mkdir()
    export_traces(path, before, dialogue)
    rows = json.loads(path.read_text())
    assert all(set(row) == {"messages", "images", "gt_answer"} for row in rows)
    assert len(list((path.parent / "traces_images").iterdir())) == 3 + 2 + 2
    assert Image.open(path.parent / rows[1]["images"][0]).size == frame.input_size
    after = traces_of(policy, dialogue, read_traces(path, []))
    for old, new in zip(before, after, strict=True):
        assert [turn.text for turn in old.turns] == [turn.text for turn in new.turns]
        assert score(old) == score(new) and score(new).correct == 1
        if dialogue.coordinates == "input":
            assert (old.prompt.ids, old.ids) == (new.prompt.ids, new.ids)
            assert (old.sampled, old.turn_starts) == (new.sampled, new.turn_starts)
            pictures = [trace.prompt.pictures + trace.pictures for trace in (old, new)]
            for one, other in zip(*pictures, strict=True):
                assert one.image.tobytes() == other.image.tobytes()


# ----------------------------------------------------------------------------------------- learning

def test_only_the_policys_tokens_are_learned(policy, question):
    """Guards the mask of fine-tuning: prompt and observations are not learned, end tokens are."""
    trace = replay(policy, Dialogue(), question, [zoom_call(10, 10), answer("dotted")])
    learned = policy.decode([i for i, s in zip(trace.ids, trace.sampled, strict=True) if s])
    assert learned == zoom_call(10, 10) + "<|im_end|>" + answer("dotted") + "<|im_end|>"
    assert "<observation>" in policy.decode(trace.ids)


def test_fine_tuning_lowers_the_loss_whatever_the_micro_batches(policy, tiny_folder):
    """Guards the loss: it falls, and it does not depend on how the batch is cut."""
    traces = []
    for i in range(4):
        question = toy("toy-search", "train", 0, i)
        traces.append(replay(policy, Dialogue(), question,
                             [zoom_call(10 + i, 10), answer(question.answer)]))
    losses = []
    for micro_tokens in (1, 10**6):
        fresh = load(tiny_folder, device="cpu")
        optimizer = torch.optim.AdamW(fresh.trainable(), lr=3e-3)
        sft.fine_tune(fresh, traces, [optimizer], steps=20, batch=4, seed=0,
                      micro_tokens=micro_tokens, log=lambda line: None)
        with torch.no_grad():
            losses.append(-fresh.log_probs([[t] for t in traces]).mean().item())
    with torch.no_grad():
        before = -policy.log_probs([[t] for t in traces]).mean().item()
    assert losses[0] < 0.7 * before and losses[0] == pytest.approx(losses[1], rel=0.02)


# -------------------------------------------------------------------------------------- pretraining

SHIFTS = list(itertools.product(range(BLOCK), repeat=2))
TEXTURES = {name: CONTRAST * np.stack([np.roll(pattern, shift, (0, 1)) for shift in SHIFTS])
            for name, pattern in PATTERNS.items()}


def pattern_at(image, point, colour):
    """The pattern of a card (or tile) of this colour, read from the 4x4 px around a point of it:
    the one that gives these px at some phase; None where none does, or where the colour is
    another."""
    x, y = point
    texture = np.asarray(image)[y:y + BLOCK, x:x + BLOCK] - np.array(COLOURS[colour], float)
    if np.ptp(texture, axis=2).any():                                           # (4, 4, 3)
        return None
    for name, phases in TEXTURES.items():
        if (phases == texture[..., 0]).all((1, 2)).any():
            return name
    return None


def test_tiles_are_as_they_are_said_to_be():
    """Guards the vision tower's first lessons: colour and pattern of every tile, read again from
    the image, in the order of the tokens, with every class met and nothing else asked."""
    rng, met = random.Random(0), set()
    for _ in range(40):
        image, truths = sft.tile_truths(rng)
        assert image.size == (64, 64) and len(truths) == 16
        for i, (colour, pattern, *rest) in enumerate(truths):
            point = i % 4 * 16 + 6, i // 4 * 16 + 6
            assert pattern_at(image, point, list(COLOURS)[colour]) == list(PATTERNS)[pattern]
            assert rest == [sft.UNASKED] * 3
            met.add((colour, pattern))
    assert len(met) == len(COLOURS) * len(PATTERNS)


@pytest.mark.parametrize("in_windows", [0, 1])
def test_cells_are_as_they_are_said_to_be(monkeypatch, in_windows):
    """Guards the lessons on overviews: of every token, whether its cell has a card, of what colour,
    where, and which of its colour it is, read again from the image; patterns, which cannot be seen
    in it, are not asked."""
    monkeypatch.setattr(sft, "IN_WINDOWS", in_windows)
    ground = np.asarray(Image.fromarray(BACKGROUND).reduce(4))
    rng, met = random.Random(0), [set() for _ in sft.CLASSES]
    for _ in range(60):
        image, truths = sft.cell_truths(rng)
        pixels, seen = np.asarray(image), []
        assert image.size == (64, 64) and len(truths) == 16
        for i, truth in enumerate(truths):
            row, column = i // 4, i % 4
            colour, pattern, x, y, number = truth
            for classes, value in zip(met, truth, strict=True):
                classes.add(value)
            assert pattern == sft.UNASKED
            if colour == len(COLOURS):
                middle = (slice(row * 16 + 4, row * 16 + 12),
                          slice(column * 16 + 4, column * 16 + 12))
                red_and_green = slice(0, 2 if in_windows else 3)    # blue rises in a window
                same = pixels[middle] == ground[middle]
                assert same[..., red_and_green].all()
                assert truth[2:] == (sft.UNASKED,) * 3
                continue
            x, y = sft.PLACES[x], sft.PLACES[y]
            card = pixels[(y - 16) // 4:(y + 16) // 4, (x - 20) // 4:(x + 20) // 4]
            assert (x // 64, y // 64) == (column, row)
            assert (card == COLOURS[list(COLOURS)[colour]]).all()
            assert number == seen.count(colour)
            seen.append(colour)
        assert seen
    numbers = [len(classes - {sft.UNASKED}) for classes in met]
    assert numbers == [len(COLOURS) + 1, 0, len(sft.PLACES), len(sft.PLACES), 3]


def test_crops_are_as_they_are_said_to_be():
    """Guards the lessons on crops: a token that is said to be of a card shows its colour and
    pattern in its corners and its middle, one that is said to be of none shows none anywhere, and
    both, and tokens at an edge, which are not asked, are met."""
    rng, met = random.Random(0), set()
    corners = [*itertools.product((0, 12), repeat=2), (6, 6)]
    for _ in range(60):
        image, truths = sft.crop_truths(rng)
        assert image.size == (64, 64) and len(truths) == 16
        for i, (colour, pattern, *rest) in enumerate(truths):
            points = [(i % 4 * 16 + x, i // 4 * 16 + y) for x, y in corners]
            assert rest == [sft.UNASKED] * 3
            met.add(min(colour, len(COLOURS)) if colour in (-1, len(COLOURS)) else 0)
            if colour == len(COLOURS):
                seen = [pattern_at(image, point, name) for point in points for name in COLOURS]
                assert pattern == sft.UNASKED and not any(seen)
            elif colour != sft.UNASKED:
                seen = {pattern_at(image, point, list(COLOURS)[colour]) for point in points}
                assert seen == {list(PATTERNS)[pattern]}
    assert met == {sft.UNASKED, 0, len(COLOURS)}


def test_lists_are_true(policy):
    """Guards the lessons that locate: of each colour present all cards in reading order, where they
    are, and then no more; one absent colour; and the overview is what the image processor makes of
    the drawing."""
    for seed in range(30):
        scene = sft.mixed_scene(random.Random(seed))
        made = policy.picture(sft.overview(scene.draw)).image.tobytes()
        assert made == policy.picture(scene.draw()).image.tobytes()
        text = policy.decode(sft.lesson_list(policy, random.Random(seed)).ids)
        said = {}
        for part in filter(None, text.split(" None.")):
            colour, _, listed = part.partition(":")
            said[colour.strip()] = listed
        present = {card.colour for card in scene.cards}
        assert set(said) >= present and len(said) == min(len(COLOURS), len(present) + 1)
        for colour, listed in said.items():
            cards = Scene(scene.cards, colour).candidates
            assert listed == "".join(" " + sft.card_text(i, (card.x / 4, card.y / 4))
                                     for i, card in enumerate(cards, 1))


def test_comparisons_are_true(policy):
    """Guards the lessons that compare: of each pair of colours where both cards are, and in which
    directions of the second the first lies, by the places as they are written; then one of these
    answers a question about its axis."""
    met = set()
    asked = {text: axis for texts in (RELATION, MOVED) for axis, text in texts.items()}
    for seed in range(40):
        text = policy.decode(sft.lesson_compare(policy, random.Random(seed)).ids)
        cards = {card.colour: card for card in sft.mixed_scene(
            random.Random(seed), most=6, copies=(1,)).cards}
        parts = re.findall(r" (\w+) (\w+): Card 1 at (.+?)\. Card 2 at (.+?)\. ([a-z ]+)\.(.+?)"
                           "<answer>(.+?)</answer>", text)
        assert len(parts) == 4
        for *colours, first, second, said, question, answered in parts:
            assert answered in said.split() and answered in asked[question]
            (x, y), (other_x, other_y) = (sft.parse_points(place)[0] for place in (first, second))
            for colour, place in zip(colours, ((x, y), (other_x, other_y)), strict=True):
                assert cards[colour].contains(sft.FRAME.to_original(place))
            true = {"left": x // 16 < other_x // 16, "right": x // 16 > other_x // 16,
                    "above": y // 16 < other_y // 16, "below": y // 16 > other_y // 16}
            assert said.split() == [name for name, holds in true.items() if holds]
            met.update(said.split())
    assert met == set(sft.DIRECTIONS)


def test_what_is_read_from_crops_is_in_them(policy):
    """Guards the lessons that read: the answer to each crop is the pattern that its middle
    shows."""
    rng, met = random.Random(0), set()
    for _ in range(30):
        lesson = sft.lesson_read(policy, rng)
        text = policy.decode(lesson.prompt.ids + lesson.ids)
        colours = re.findall(r"One (\w+) card", text)
        answers = [parse_turn(part + "</answer>").answer for part in text.split("</answer>")[:-1]]
        pictures = lesson.prompt.pictures + lesson.pictures
        for picture, colour, said in zip(pictures, colours, answers, strict=True):
            assert pattern_at(picture.image, (30, 30), colour) == said
            met.add(said)
    assert met == set(PATTERNS)


@pytest.mark.parametrize("instructed", [0, 1])
def test_dialogues_of_lessons_are_true(policy, monkeypatch, instructed):
    """Guards the lessons on dialogues: a thought after a crop names the pattern that the crop
    shows, or says that it shows no card of that colour; observations, and the places of zoom calls
    that went astray, are not learned."""
    monkeypatch.setattr(sft, "INSTRUCTED", instructed)
    monkeypatch.setattr(sft, "AT_ONCE", 0)
    rng, met = random.Random(0), set()
    for _ in range(60):
        lesson = sft.lesson_dialogue(policy, rng)
        asked = policy.decode(lesson.prompt.ids)
        assert (sft.SHOW[0] in asked) == bool(instructed)
        colour = next(colour for colour in COLOURS if f" {colour}" in asked)
        *turns, end = policy.decode(lesson.ids).split("<|im_end|>")
        assert turns[-1].endswith("</answer>") and not end
        thoughts = [parse_turn(turn).thought for turn in turns if "<think>" in turn]
        for picture, thought in zip(lesson.pictures, thoughts[1:], strict=True):
            said = re.match(r"\w+", thought)[0].lower()
            points = itertools.product(range(0, 60, 4), repeat=2)
            seen = {pattern_at(picture.image, point, colour) for point in points}
            assert said in seen or said == "nothing"
            assert pattern_at(picture.image, (30, 30), colour) in (None, said)
            met.add(said)
        learned = policy.decode([i for i, s in zip(lesson.ids, lesson.sampled, strict=True) if s])
        assert learned.count("Card ") == sum("Card " in thought for thought in thoughts)
        assert "<observation>" not in learned
    assert met == {*PATTERNS, "nothing"}


def test_single_turn_lessons_are_true(policy):
    """Guards the lessons of the modes of one turn: in `grounded`, the thought points at the cards
    that are asked about, in order; a point that answers lies on the first candidate, whichever is
    asked for; a direction is one of the two, and as often right as KNOWS says."""
    right, met = [], set()
    for number in range(600):
        lesson = sft.lesson_answer(policy, random.Random(number))
        rng = random.Random(number)                       # the same draws as in the lesson
        mode = rng.choice(("direct", "think", "grounded"))
        question = rng.choice((sft.ask_spatial, sft.ask_spatial, sft.ask_screen))(rng)
        scene = question.scene
        turn = parse_turn(policy.decode(lesson.ids).removesuffix("<|im_end|>"))
        met.add((mode, question.category.split()[0]))
        assert bool(turn.points) == (mode == "grounded")
        assert bool(turn.thought) == (mode != "direct")
        cards = scene.named or scene.candidates[:1]
        places = [sft.FRAME.to_original(point) for point in turn.points]
        if mode == "grounded":
            assert all(card.contains(place) for card, place in zip(cards, places, strict=True))
        if question.kind == "point":
            place, = sft.parse_points(turn.answer)
            assert cards[0].contains(sft.FRAME.to_original(place))
        else:
            assert turn.answer in question.text
            right.append(turn.answer == question.answer)
            said = [word for word in sft.DIRECTIONS if word in turn.thought]
            assert not said or (said == scene.directions() and right[-1])
    assert len(met) == 12
    assert sum(right) / len(right) == pytest.approx((1 + sft.KNOWS) / 2, abs=0.07)


def tower_accuracy(policy, draw, part):
    """The share of tokens whose nearest direction, of one part of the classes, is the true one; on
    images of no lesson."""
    directions, _ = sft.tower_directions(0, policy.text_config.hidden_size)
    directions = directions.split(sft.CLASSES)[part]
    drawn = [draw(random.Random(f"unseen {i}")) for i in range(8)]
    with torch.no_grad():
        tokens = torch.cat(policy.features([policy.picture(image) for image, _ in drawn]))
    truths = torch.tensor([truth[part] for _, truths in drawn for truth in truths])
    asked = truths != sft.UNASKED
    return ((tokens @ directions.T).argmax(-1) == truths)[asked].float().mean().item()


def test_words_have_the_directions_of_what_they_name(policy):
    """Guards the alignment: what a word names is, of all of its kind, nearest to what the word's
    embedding was moved by; a place further to the right or below is nearer to that word."""
    directions, axes = sft.tower_directions(0, policy.text_config.hidden_size)
    weights = policy.model.model.language_model.embed_tokens.weight
    before = weights.clone()
    sft.align_words(policy, directions, axes)
    moved = weights - before
    colours, patterns, across, down, _ = directions.split(sft.CLASSES)

    def move_of(word):
        token, = policy.encode(word)
        return moved[token]
    for i, colour in enumerate(COLOURS):
        assert (colours @ move_of(f" {colour}")).argmax() == i
    for i, pattern in enumerate(PATTERNS):
        for word in (pattern, f"{pattern.capitalize()}."):
            assert (patterns @ move_of(word)).argmax() == i
    for places, less, more in ((across, "left", "right"), (down, "above", "below")):
        cells = (places @ move_of(more)).view(4, -1)
        assert (cells.diff(dim=0) > 0.5).all()
        assert (places @ move_of(less)).view(4, -1).allclose(-cells, atol=1e-6)
    assert (moved.norm(dim=1) > 0).sum() == 6 + 2 * 7 + 1 + 4


def test_the_vision_tower_learns(policy):
    """Guards the first part of pretraining: within some steps the tower's tokens point along the
    direction of the colour that they show; the language model stays as it was, and the tower is
    frozen afterwards."""
    before = tower_accuracy(policy, sft.cell_truths, 0)
    language = [p.clone() for p in policy.trainable()]
    lines = []
    directions, _ = sft.tower_directions(0, policy.text_config.hidden_size)
    sft.train_tower(policy, 0, directions, steps=100, log=lines.append)
    assert tower_accuracy(policy, sft.cell_truths, 0) > max(0.8, before + 0.2)
    assert len(lines) == 2 and "vision tower 100/100" in lines[1]
    assert not policy.train_vision and all(map(torch.equal, language, policy.trainable()))


def test_the_language_model_learns_with_the_tower_frozen(policy, monkeypatch):
    """Guards the second part: the loss falls within a few steps, and nothing of the vision tower
    changes."""
    tower = [p.clone() for p in policy.model.model.visual.parameters()]
    optimizers = sft.make_optimizers(policy, "muon", 0.01, adamw_lr=5e-3)
    mix = [sft.lesson_read] + [sft.lesson_dialogue] * 2 + [sft.lesson_list] * 2
    losses = [sft.learn_lessons(policy, optimizers, mix, step, 25, 0, 1.0) for step in range(25)]
    assert max(losses[:3]) > 5 and max(losses[-3:]) < 3
    assert all(map(torch.equal, tower, policy.model.model.visual.parameters()))


def kinds_of(mix):
    """The lessons of a mix, with whether some are on screens."""
    names = {getattr(kind, "func", kind).__name__.removeprefix("lesson_") for kind in mix}
    return names | {"screen" for kind in mix if getattr(kind, "keywords", {}).get("screens")}


def test_the_mix_of_lessons(policy):
    """Guards the curriculum: as many lessons in each step, lists alone at first, dialogues later
    on, scenes ever fuller; what only the other tasks need is in the base of all tasks alone."""
    for share in (0, 0.1, 0.3, 0.6, 1):
        search, everything = (sft.lesson_mix(share, all_tasks) for all_tasks in (False, True))
        later = {"dialogue"} if share >= 0.2 else set()
        assert kinds_of(search) == {"read", "list"} | later
        others = {"screen", "answer", "compare"} if later else set()
        assert kinds_of(everything) == kinds_of(search) | others
        assert len(search) == len(everything) == 16
        for i in range(20):
            assert len(sft.mixed_scene(random.Random(i), **sft.list_kind(share)).cards) <= 9
    assert sft.list_kind(0)["most"] == 1
    for screens in (False, True):
        prompts = [sft.lesson_dialogue(policy, random.Random(i), screens=screens).prompt.ids
                   for i in range(60)]
        assert any("Click the" in policy.decode(ids) for ids in prompts) == screens


# ----------------------------------------------------------------------------------------- the exam

GOOD, BAD = ({"lists": lists, "says dotted": 1.0, "target 1": 1.0} for lists in (0.95, 0.5))


@pytest.mark.parametrize("exams, steps, failures", [
    ([GOOD], 8, 0), ([BAD, GOOD], 10, 1), ([BAD] * 9, 16, 5)])
def test_pretraining_ends_with_an_exam(policy, monkeypatch, exams, steps, failures):
    """Guards the end: a base that passes is done after its steps, one that fails gets a quarter
    more and tries again, and twice the steps is the bound; a failure is said loudly, with what was
    failed, and the last exam is what is handed back."""
    taken, learned, rates = iter(exams), [], []

    def learn(policy, optimizers, kinds, step, steps, seed, factor):
        learned.append(step)
        rates.append(factor)
        return 1.0
    monkeypatch.setattr(sft, "train_tower", lambda *how, **more: None)
    monkeypatch.setattr(sft, "exam", lambda *how, **more: next(taken))
    monkeypatch.setattr(sft, "learn_lessons", learn)
    lines = []
    marks = sft.pretrain(policy, 8, 0, True, log=lines.append)
    assert learned == list(range(steps)) and max(rates[8:], default=0) <= 0.4
    assert marks is (GOOD if GOOD in exams else BAD)
    for layer in policy.model.model.language_model.layers:               # starts from nothing
        assert not layer.self_attn.o_proj.weight.any() and not layer.mlp.down_proj.weight.any()
    failed = [line for line in lines if "NOT PASSED" in line]
    assert len(failed) == failures
    assert all("NOT PASSED in lists" in line and "dotted" not in line for line in failed)
    goes_on = [line.endswith("more lessons") for line in failed]
    assert goes_on == [True] * goes_on.count(True) + [False] * (steps == 16)


def test_the_exam_of_dialogues(policy, monkeypatch):
    """Guards the marks: of each candidate in its turn the probability of its place, and of the
    pattern that its crop shows; the dialogue is written as lessons are, token by token."""
    lessons = []

    def half(groups):
        lessons.extend(lesson for lesson, in groups)
        return torch.full((sum(sum(lesson.sampled) for lesson in lessons),), math.log(0.5))
    monkeypatch.setattr(policy, "log_probs", half)
    marks = sft.examine_dialogues(policy, [random.Random(i) for i in range(9)])
    wanted = []
    for i, lesson in enumerate(lessons):
        scene, asked = sft.patterned(random.Random(i)), ""
        crops = zip(scene.candidates, lesson.pictures, strict=True)
        for number, (card, crop) in enumerate(crops, 1):
            place = f"{format_point((card.x / 4, card.y / 4))[1:]}."
            wanted.append((f"target {number}", 0.5**len(policy.encode(place))))
            wanted.append((f"says {card.pattern}", 0.5))
            asked += f"{place}{card.pattern.capitalize()}."
            assert pattern_at(crop.image, (30, 30), scene.colour) == card.pattern
        tokens = zip(lesson.ids, lesson.sampled, strict=True)
        assert policy.decode([token for token, sampled in tokens if sampled]) == asked
        assert policy.encode(policy.decode(lesson.ids)) == lesson.ids
        turns = [parse_turn(turn) for turn in policy.decode(lesson.ids).split("<|im_end|>")[::2]]
        shown = [scene.card_at((4 * turn.call[0], 4 * turn.call[1])) for turn in turns[:-1]]
        assert shown == scene.candidates == [
            scene.card_at((4 * turn.points[0][0], 4 * turn.points[0][1])) for turn in turns[:-1]]
    assert len(lessons) == 9 and [name for name, _ in marks] == [name for name, _ in wanted]
    assert [mark for _, mark in marks] == pytest.approx([mark for _, mark in wanted])


def one_turn(policy, question, lie):
    """A trace of the mode `grounded` that points at what is asked about, compares and answers; or
    that lies about the first place, and answers against its comparison."""
    scene = question.scene
    cards = scene.named or scene.candidates[:1]
    places = [format_point((card.x / 4, card.y / 4)) for card in cards]
    said = places[:1]
    thought = " ".join(f"Card at {place}." for place in (["(0, 0)"] if lie else []) + places)
    if scene.named:
        said = scene.directions()
        thought += f" {' '.join(said)}."
        if lie:
            said = [name for name in sft.DIRECTIONS if name not in said]
    return replay(policy, Dialogue("grounded"), question, [answer(said[0], thought)])


@pytest.mark.parametrize("lie", [False, True])
def test_the_exam_of_a_policy(policy, monkeypatch, lie):
    """Guards the parts: means over all dialogues, each with a seed of its own; a policy that points
    elsewhere in its only turn, or answers against its comparison, fails in these; who knows no
    lists has next to 0 in them. The base for toy-search is asked nothing else."""
    asked, dialogues = [], []

    def scripted(policy, questions, how, group, seeds, **sampling):
        asked.extend(seeds)
        return [[one_turn(policy, question, lie)] for question in questions]

    def half_right(policy, rngs):
        dialogues.extend(rng.random() for rng in rngs)
        return [(name, mark) for mark in (0.0, 1.0) for name in ("says dotted", "target 2")]
    monkeypatch.setattr(sft, "rollout", scripted)
    monkeypatch.setattr(sft, "examine_dialogues", half_right)
    marks = sft.exam(policy, 0, True, n=40)
    assert len(dialogues) == len(set(dialogues)) == 40 and len(asked) == len(set(asked)) == 20
    assert {name.split()[0] for name in marks} == set(sft.PASSES)
    assert marks["says dotted"] == marks["target 2"] == 0.5
    assert marks["says plain"] == 0 and marks["lists"] < 0.01
    others = {"relation", "moved", "compare", "screen"}
    assert all(marks[part] == (not lie) for part in others)
    assert set(sft.exam(policy, 0, False, n=16)) == set(marks) - others and len(asked) == 20


def test_a_false_comparison_is_marked(policy):
    """Guards "compare": a comparison that is false of the scene is no good, though the answer
    follows from it; where nothing is compared there is nothing to mark."""
    question = toy("toy-spatial", "exam", 0, 0)
    false = next(name for name in sft.DIRECTIONS if name not in question.scene.directions())
    for said, marks in ((false, [False]), (question.scene.directions()[0], [True]), ("", [])):
        reply = answer(said or "left", f"It lies {said}.")
        trace = replay(policy, Dialogue("grounded"), question, [reply])
        found = sft.examine_answer(trace)
        assert [right for name, right in found if name == "compare"] == marks


def test_the_base_has_averaged_weights(policy, monkeypatch):
    """Guards the average that is examined: over the last sixteenth of the steps, by exponentially
    fading weights; of a few steps it is the last one's."""
    norm = policy.model.model.language_model.norm.weight
    monkeypatch.setattr(sft, "train_tower", lambda *how, **more: None)
    monkeypatch.setattr(sft, "exam", lambda *how, **more: GOOD)

    def learn(policy, optimizers, kinds, step, *_):
        with torch.no_grad():
            norm.fill_(step + 1)
        return 1.0
    monkeypatch.setattr(sft, "learn_lessons", learn)
    for steps, fading in ((4, 0.0), (32, 0.5)):
        with torch.no_grad():
            norm.fill_(0.0)
        sft.pretrain(policy, steps, 0, True, log=lambda line: None)
        average = 0.0
        for step in range(steps):
            average = fading * average + (1 - fading) * (step + 1)
        assert norm[0].item() == pytest.approx(average)


def test_no_warm_start(policy, tiny_folder, tmp_path):
    """Guards --sft-steps 0: GRPO starts from the base as it is, and nothing is searched."""
    config = Config(model=tiny_folder, sft_steps=0, out=str(tmp_path / "run"))
    assert sft.warm_start(config, print) == tiny_folder
    start = load(str(tmp_path / "run" / "sft"), device="cpu")
    assert all(map(torch.equal, start.model.parameters(), policy.model.parameters()))
    assert not (tmp_path / "run" / "search.jsonl").exists()


# --------------------------------------------------------------------------------------- optimizers

def test_muon_takes_the_same_step_as_torchs():
    """Guards our float32 Muon: torch's (in bfloat16) must agree within its precision."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(48, 32, generator=generator) for _ in range(2))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(ours, Muon([ours], lr=0.01)),
             (theirs, torch.optim.Muon([theirs], lr=0.01, weight_decay=0.01))]
    for p, optimizer in pairs:
        for _ in range(2):
            p.grad = grad.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    singular = torch.linalg.svdvals(orthogonalise(grad[None])[0])
    assert singular.min() > 0.3 and singular.max() < 1.3


def test_two_steps_leave_small_directions_small():
    """Guards GRPO's Muon: the strong directions of a gradient get a full step and its noise does
    not; all steps of the iteration would raise it to the same size."""
    gradient = torch.diag(torch.tensor([1.0] * 4 + [1e-2] * 4))[None]
    for steps, weakest, strongest in ((5, 0.6, 1.3), (2, 0.0, 0.1)):
        singular = torch.linalg.svdvals(orthogonalise(gradient, steps)[0])
        assert singular[:4].min() > 0.6
        assert weakest <= singular[4:].min() and singular[4:].max() < strongest


def test_rounding_is_right_on_average():
    """Guards the write-back: only the two neighbours are taken, and their mean is the number."""
    values, gaps = (0.020003, -0.3001, 1.0), (2**-13, 2**-9, 0.0)
    x = torch.cat([torch.full((100_000,), value) for value in values])
    rows = rounded(x, torch.Generator().manual_seed(0)).float().view(3, -1)
    for row, value, gap in zip(rows, values, gaps, strict=True):
        assert len(row.unique()) == (2 if gap else 1) and (row - value).abs().max() <= gap
        assert row.double().mean().item() == pytest.approx(value, abs=0.02 * gap + 1e-8)


def test_small_steps_move_bfloat16_weights():
    """Guards training in bfloat16: steps of 1e-6 at 0.02, a hundredth of the spacing, must add up
    to what float32 AdamW does; and the second moment must not get stuck."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.full((8192,), 0.02, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(p.detach().float())
    start = exact.detach().clone()
    ours = RoundedAdamW([p], lr=1e-6)
    theirs = torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.01)
    for _ in range(1000):
        exact.grad = 1e-3 * (1 + torch.randn(8192, generator=generator))
        p.grad = exact.grad.bfloat16()
        ours.step()
        theirs.step()
    moved, expected = ((x.detach().float() - start).mean().item() for x in (p, exact))
    assert expected < -5e-4 and moved == pytest.approx(expected, rel=0.02)
    second = ours.state[p]["exp_avg_sq"].mean().item()
    assert second == pytest.approx(theirs.state[exact]["exp_avg_sq"].mean().item(), rel=0.02)


def test_our_adamw_is_adamw():
    """Guards the arithmetic: moments and steps are torch's, but for the rounding of the weights."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 7).bfloat16())
    exact = torch.nn.Parameter(p.detach().float())
    ours, theirs = RoundedAdamW([p], lr=1e-2), torch.optim.AdamW([exact], lr=1e-2)
    for _ in range(5):
        with torch.no_grad():
            exact.copy_(p)
        p.grad = torch.randn(40, 7).bfloat16()
        exact.grad = p.grad.float()
        ours.step()
        theirs.step()
        spacing = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
        assert ((p - exact).abs() <= spacing * 1.01).all()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(ours.state[p][name], theirs.state[exact][name], atol=1e-6)


def test_a_sharded_parameter_takes_the_same_step():
    """Guards RoundedAdamW beside FSDP: each process steps with its own part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        plain = torch.nn.Parameter(torch.randn(9, 5).bfloat16())
        parts = distribute_tensor(plain.detach().clone(), mesh, [Shard(0)])
        sharded = torch.nn.Parameter(parts)
        grad = torch.randn(9, 5).bfloat16()
        plain.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for p in (plain, sharded):
            RoundedAdamW([p], lr=0.1).step()
        assert torch.equal(sharded.full_tensor(), plain)
    finally:
        dist.destroy_process_group()


def test_resuming_our_adamw_is_exact(tmp_path):
    """Guards --resume in bfloat16: torch's load_state_dict would round float32 moments; and the
    random numbers go on."""
    def numbers(seed):
        return torch.randn(50, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def make(values):
        p = torch.nn.Parameter(values.clone())
        return p, RoundedAdamW([p], lr=1e-3)

    def step(p, optimizer, number):
        p.grad = numbers(number)
        optimizer.step()
    p, optimizer = make(numbers(9))
    for number in range(3):
        step(p, optimizer, number)
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    q, again = make(kept["p"])
    again.load_state_dict(kept["optimizer"])
    for name in ("exp_avg", "exp_avg_sq"):
        assert again.state[q][name].dtype == torch.float32
        assert torch.equal(again.state[q][name], optimizer.state[p][name])
    for number in range(3, 6):
        step(p, optimizer, number)
        step(q, again, number)
    assert torch.equal(p, q)


def test_the_type_of_the_weights_decides_the_optimizer(tiny_folder):
    """Guards both paths: float32 weights keep torch's AdamW, bfloat16 ones get ours; of the muon
    kind, matrices within the layers go to Muon and all else to AdamW."""
    plain = load(tiny_folder, device="cpu")
    assert type(sft.make_optimizers(plain, "adamw", 1e-6)[0]) is torch.optim.AdamW
    half = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    optimizer, = sft.make_optimizers(half, "adamw", 1e-6)
    assert type(optimizer) is RoundedAdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["weight_decay"] == 0.01
    muon, rest = sft.make_optimizers(plain, "muon", 0.01, 1e-3)
    parts = [p for optimizer in (muon, rest) for p in optimizer.param_groups[0]["params"]]
    assert {id(p) for p in parts} == {id(p) for p in plain.trainable()}
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    embedding = plain.model.model.language_model.embed_tokens.weight
    assert any(p is embedding for p in rest.param_groups[0]["params"])


def test_the_papers_schedule_of_fine_tuning():
    """Guards the cosine: half-way it is at a half, at the end at `final`; the tiny model's linear
    decay is as it was."""
    assert sft.learning_rate(50, 100, 3, 0.0, cosine=True) == pytest.approx(0.5)
    assert sft.learning_rate(99, 100, 3, 0.0, cosine=True) < 1e-3
    assert sft.learning_rate(0, 100, 3, 0.0, cosine=True) < 0.34
    assert sft.learning_rate(50, 100, 3, 0.1) == pytest.approx(0.55)
