"""Warm start: tree search on text, chains, chains on disk and as traces, fine-tuning, optimizers,
and what a run takes up from an earlier one."""
import argparse
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from itertools import compress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import draw, noise, recorded
from PIL import Image
from torch.distributed.tensor import Shard, distribute_tensor

import train_sft as sft
from evaluate import open_file, settle
from model import UserError, load
from reward import score
from rollout import Dialogue, Question, format_call, parse, parse_turn, shared_flags
from train_sft import BACKTRACK, Node, complete, expand, linearise, read_traces, replay

SAMPLING = dict(turn_tokens=12, response_tokens=60)


def dialogue(mode="zoom", **parts):
    return Dialogue(mode, **{"crop_half": 32, "crop_size": 64, **parts})


def zoom_call(x, y, thought="Here"):
    return f"<think>{thought} ({x}, {y}).</think>\n{format_call((x, y))}"


def answer(text, thought="So."):
    return f"<think>{thought}</think>\n<answer> {text} </answer>"


def finished(policy, question, texts, mode="zoom"):
    """A complete trace of these turns, with the crops that the tool shows."""
    way = dialogue(mode)
    return replay(policy, way, question, sft.messages_of(way, question, texts))


def start_of(policy, question, mode="zoom"):
    return dialogue(mode).start(policy, question, 1, "seed")[0]


def assert_right(trace):
    scored = score(trace)
    assert scored.correct == scored.format == scored.grounded == 1


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow)
                                        for name in ("tiny_folder", "merged_folder")])
def policy(request):
    """One whose tokenizer has tags and words as single tokens, and one where a stop runs into a
    tag: steps, chains and answers are made of text, and are the same with both."""
    return load(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture
def question():
    return Question("Which pattern?", [noise(256, 256)], "dotted", key="k")


@pytest.fixture
def arguments(tiny_folder, data, monkeypatch, tmp_path):
    """arguments(*words) -> the settings of train_sft.py with these flags, on a file of questions
    that lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    data("task.jsonl", [{"problem": f"<image>Which pattern, {i}?", "answer": "dotted",
                         "images": ["image.png"]} for i in range(20)])

    def parsed(*words):
        common = ["--model", tiny_folder, "--task", "task.jsonl", "--out", "run"]
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *common, *words])
        parser = argparse.ArgumentParser()
        shared_flags(parser)
        sft.sft_flags(parser)
        args = parse(parser, "rollout", "train_sft")
        settle(args, training=True)
        return args
    return parsed


# -------------------------------------------------------------------------------------- tree search

def test_ucb1():
    """Guards selection: value + c * sqrt(ln(N_parent + 1) / (N_child + 1)), and means backed up to
    the root. 2/3 + c * sqrt(ln(5) / 4) = 0 + c * sqrt(ln(5) / 2) at c = 2.54."""
    root = Node(None)
    root.children = [Node(None, parent=root), Node(None, parent=root)]
    first, second = root.children
    for reward in (1, 0, 1):
        first.back_up(reward)
    second.back_up(0)
    assert root.visits == 4 and root.value == pytest.approx(0.5)
    assert first.visits == 3 and first.value == pytest.approx(2 / 3)
    assert root.select(2.53) is first and root.select(2.55) is second


def test_steps_of_the_zoom_mode_are_turns(policy, question):
    """Guards expansion: a step is a turn with its observation, and the last one has the answer; one
    of the same text is the same child; one 1 px from a point of the path is a repetition."""
    texts = zoom_call(10, 10), zoom_call(40, 40), answer("dotted")
    trace = finished(policy, question, texts)
    node = Node(start_of(policy, question))
    for number in (1, 2, 3):
        node = expand(node, trace, depth=10)
        assert node.turns == texts[:number] and node.depth == number
    assert node.trace is trace and not node.partial
    second = node.parent
    assert second.trace is None and second.points == ((10, 10), (40, 40))
    first = second.parent
    repeat = finished(policy, question, [texts[0], zoom_call(11, 10), texts[2]])
    assert expand(first, repeat, 10) is None
    assert expand(first, trace, 10) is second and first.children == [second]


@pytest.mark.parametrize("mode, thought, steps", [
    ("grounded", "A cup (1, 2). Pot at [30, 4]: odd. So.", ["A cup (1, 2).", " Pot at [30, 4]:"]),
    ("grounded", "The (1, 2) cup,\nthen (50, 60)", ["The (1, 2)", " cup,\nthen (50, 60)"]),
    ("think", "A cup. Is it 2.5 px? Yes", ["A cup.", " Is it 2.5 px?"]),
    ("direct", "A cup (1, 2). So.", [])])
def test_steps_of_a_single_turn_are_cut_from_its_text(mode, thought, steps):
    """Guards single-turn search: a step ends behind its point and the stop, or with its sentence,
    whatever the tokens are; what is left runs to the end and keeps the answer. Points of the answer
    make no step."""
    text = f"<think>{thought}</think>\n<answer> (70, 80). </answer>"
    trace = SimpleNamespace(mode=mode, turns=[parse_turn(text)])
    node, path = Node(None), "<think>"
    for step in steps:
        node = expand(node, trace, depth=10)
        path += step
        assert (node.turns, node.partial, node.trace) == ((), path, None)
    node = expand(node, trace, depth=10)
    assert (node.turns, node.partial, node.trace) == ((text,), "", trace)


def test_too_deep_a_path_is_made_to_answer(policy, question):
    """Guards the bound on depth: the answer is asked for; what the policy then writes is its
    answer."""
    trace = finished(policy, question, [answer("dotted", "A (1, 2). B (30, 4).")], "grounded")
    node = expand(Node(start_of(policy, question, "grounded")), trace, depth=1)
    assert node.partial == "<think>A (1, 2).</think>\n<answer>"
    complete(policy, dialogue("grounded"), [node], 1, SAMPLING)
    assert node.rollouts[0].turns[0].text.startswith(node.partial)


@pytest.mark.parametrize("mode, said", [
    ("grounded", "A chair at (64, 30). The lamp (12, 90). It is so."),
    ("think", "A chair is there. Yes.\nIs it 2.5 px? So it is.")])
def test_chains_have_no_leftovers_of_tags(policy, question, mode, said):
    """Guards back-tracking behind any path of a single turn: where a step was cut inside of a tag,
    chains read "That was not it. think>"."""
    good = f"<think>{said}</think>\n<answer> dotted </answer>"
    bad = f"<think>{said} No.</think>\n<answer>B</answer>"
    traces = [finished(policy, question, [text], mode) for text in (bad, good)]
    node = Node(start_of(policy, question, mode))
    corrected = 0
    while not node.trace:
        node.rollouts = traces
        for text, in linearise(node, dialogue(mode)):
            tags = re.findall("<?/?(?:think|answer)>", text)
            assert tags == ["<think>", "</think>", "<answer>", "</answer>"]
            assert score(finished(policy, question, [text], mode)).correct == 1
            corrected += BACKTRACK in text
        node = expand(node, traces[1], depth=10)
    assert corrected >= 2


@pytest.mark.parametrize("said", ["B", "dotted", "(3, 4)"])
def test_a_forced_answer_begins_as_it_was_learned(policy, question, said):
    """Guards the forced beginning, which ends in "<answer>": with a blank behind it, as all chains
    have it, the answer's first token is the one that was learned; "<answer>B" may have ">B"."""
    for beginning in (sft.FORCED, Dialogue().forced_answer):
        begun = policy.encode(beginning)
        whole = policy.encode(f"{beginning} {said} </answer>")
        assert whole[:len(begun)] == begun
    turns = sft.to_multi_turn(f"<think>A cup (1, 2).</think>\n<answer>{said}</answer>")
    assert turns[-1].endswith(f"<answer> {said} </answer>")


@pytest.mark.parametrize("mode, turns, partial, begins", [
    ("zoom", (zoom_call(10, 10), "<tool_call>\n{}\n</tool_call>"), "", ""),
    ("zoom", tuple(zoom_call(20 * i + 5, 9) for i in range(5)), "", "<think></think>\n<answer>"),
    ("grounded", (), "<think>A cup (1, 2).", "<think>A cup (1, 2).")])
def test_continuing_from_a_path(policy, question, mode, turns, partial, begins):
    """Guards the replay of a path: the tool really answers its turns, words where it refuses them,
    and where all calls are used up the answer is asked for; the new text follows the path's;
    log-probabilities are those of a plain pass; each trace has random numbers of its own, from the
    tree's; the tree's own empty trace stays empty."""
    start = start_of(policy, question, mode)
    node = Node(start, turns, partial)
    complete(policy, dialogue(mode), [node], 2, SAMPLING)
    first, second = node.rollouts
    assert first.rng is not second.rng and first.ids != second.ids
    assert not start.ids and not start.turns
    for trace in node.rollouts:
        texts = [turn.text for turn in trace.turns]
        assert trace.ended and trace.crops is start.crops
        assert tuple(texts[:len(turns)]) == turns and texts[len(turns)].startswith(begins)
        assert len(trace.prompt.pictures) == 1 + len(trace.zoom_points[:len(turns)])
        path = policy.decode(trace.prompt.ids[len(start.prompt.ids):])
        assert path.endswith(partial) and path.count("<|im_start|>user") == len(turns)
        with torch.no_grad():
            again = policy.log_probs([[trace]])
        assert torch.allclose(again, recorded([[trace]]), atol=1e-5)


def test_a_special_token_spelled_in_letters_stays_text(policy, question):
    """Guards the replay of a path: what a policy wrote letter by letter is encoded again, and would
    become the token itself, an image's among them."""
    spelled = "<think><|image_pad|><|vision_start|><|im_end|>"
    start = start_of(policy, question)
    node = Node(start, (zoom_call(10, 10).replace("<think>", spelled),), spelled)
    complete(policy, dialogue(), [node], 1, SAMPLING)
    trace, = node.rollouts
    path = trace.prompt.ids[len(start.prompt.ids):]
    assert path.count(policy.image_token) == trace.prompt.pictures[1].tokens
    assert policy.log_probs([[trace]]).isfinite().all()


def test_chains_of_a_question_share_its_image(policy, question):
    """Guards the memory of fine-tuning: image and crops are encoded once for all chains."""
    starts = {}
    messages = sft.messages_of(dialogue(), question, [zoom_call(10, 10), answer("dotted")])
    one, two = [replay(policy, dialogue(), question, messages, (), starts) for _ in range(2)]
    assert one.prompt.pictures[0] is two.prompt.pictures[0]
    assert one.pictures[0] is two.pictures[0]


def test_search_counts_every_rollout(policy, capsys):
    """Guards all parts together: children are at most `width`, values are means of rewards, points
    add up along a path; and the same seeds give the same trees."""
    questions = [Question(f"Which, {i}?", [noise(128, 128, i)], "dotted") for i in range(3)]
    roots, others = [sft.search(policy, questions, dialogue("think"), range(3), SAMPLING,
                                simulations=2) for _ in range(2)]
    assert list(map(sft.describe_tree, roots)) == list(map(sft.describe_tree, others))
    for root in roots:
        assert root.visits >= 4 and root.value == 0
        assert all(len(node.children) <= 3 for node in root.walk())
    assert "search 2/2  0 of this process's 3 trees have a right trace" in capsys.readouterr().out


def test_trees_are_searched_some_at_a_time(arguments, monkeypatch, tmp_path):
    """Guards memory: no more than TREES trees are alive at once. And what is written: each
    question's chains in the questions' order, --chains of them at most, each marked as taken in the
    tree's description; where there are none, a policy has nothing to learn from."""
    searched = []

    def search_some(policy, questions, dialogue, seeds, sampling, **more):
        searched.append(seeds)
        return [Node(SimpleNamespace(question=question)) for question in questions]
    monkeypatch.setattr(sft, "TREES", 2)
    monkeypatch.setattr(sft, "search", search_some)
    monkeypatch.setattr(sft, "linearise", lambda *_: [[answer(str(i))] for i in range(3)])
    args = arguments("--seed", "3", "--chains", "2")
    questions = sft.questions_of(args, "train", 5)
    sft.grow_trees(args, questions, tmp_path)
    assert searched == [["search 3 0", "search 3 1"], ["search 3 2", "search 3 3"], ["search 3 4"]]
    rows = (tmp_path / "search.jsonl").read_text().splitlines()
    keys = [question.key for question in questions for _ in range(2)]
    assert [json.loads(row)["key"] for row in rows] == keys
    trees = (tmp_path / "trees.txt").read_text().split("\n\n")
    assert [tree.count("\ntaken: ") for tree in trees] == [2] * 5
    monkeypatch.setattr(sft, "linearise", lambda *_: [])
    with pytest.raises(UserError, match="no right trace in 5 questions; give a stronger --teacher"):
        sft.grow_trees(args, questions, tmp_path)


def test_a_teacher_that_points_otherwise_is_refused(arguments, monkeypatch, tmp_path):
    """Guards chains whose points are in a unit that the policy does not use."""
    policy = SimpleNamespace(parameters=lambda: [], coordinates="thousandths")
    monkeypatch.setattr(sft, "load", lambda *_, **limits: policy)
    args = arguments("--teacher", "OTHER")
    with pytest.raises(UserError, match="--teacher OTHER points in other coordinates"):
        sft.grow_trees(args, sft.questions_of(args, "train", 2), tmp_path)


# -------------------------------------------------------------------------------------- linearising

def chains_of(policy, question, rollouts, mode="zoom", path=(), partial="", max_crops=4, **how):
    """The chains of a tree of one path with these rollouts."""
    node = Node(start_of(policy, question, mode), path, partial)
    node.rollouts = [finished(policy, question, texts, mode) for texts in rollouts]
    return linearise(node, dialogue(mode, max_crops=max_crops), **how)


def test_a_tree_without_a_right_rollout_gives_nothing(policy, question):
    """Guards the data: nothing is learned from wrong traces alone, nor from ill-formed ones."""
    assert chains_of(policy, question, [[zoom_call(9, 9), answer("checked")]]) == []
    refused = SimpleNamespace(ended="answer", zoom_points=[], turns=["a call", "an answer"])
    assert linearise(Node(None, rollouts=[refused]), dialogue()) == []


def test_chains_straight_and_with_back_tracking(policy, question):
    """Guards linearising: right ones as they are, the shortest first; a wrong one, what it said of
    its last crop, the sentence, and the zoom calls of the right one that are new; each chain once.
    A chain is a right trace itself."""
    bad = [zoom_call(10, 10), answer("checked", "Plain.")]
    good = [zoom_call(11, 10), zoom_call(40, 40), answer("dotted", "Dotted.")]
    joined = [bad[0], zoom_call(40, 40, f"Plain. {BACKTRACK}Here"), good[2]]
    rollouts = [bad, good, good]
    assert chains_of(policy, question, rollouts) == [good, joined]
    assert chains_of(policy, question, rollouts, backtrack=False) == [good]
    assert_right(finished(policy, question, joined))


def test_a_thought_is_about_the_crop_before_it(policy, question):
    """Guards true thoughts: behind the wrong trace's last crop stands what the wrong trace said of
    it, not what the right one said of another; of that, the sentences that point elsewhere stay.
    The common path is written once."""
    first = zoom_call(10, 10)
    bad = [first, zoom_call(60, 20, "Blue. There"), answer("checked", "Plain.")]
    good = [first, zoom_call(40, 40, "Blue. No. The second"), answer("dotted", "Dotted.")]
    turning = zoom_call(40, 40, f"Plain. {BACKTRACK}The second")
    chains = chains_of(policy, question, [bad, good], path=(first,))
    assert chains[1:] == [[first, bad[1], turning, good[2]]]


@pytest.mark.parametrize("bad, good, most", [
    ([answer("checked")], [zoom_call(40, 40), answer("dotted")], 4),            # nothing was shown
    ([zoom_call(9, 9), answer("x")], [zoom_call(9, 9), answer("dotted")], 4),   # nothing is new
    ([zoom_call(9, 9), answer("x")], [zoom_call(40, 40), answer("dotted")], 1)])
def test_what_cannot_be_joined(policy, question, bad, good, most):
    """Guards back-tracking: a wrong look before it, a new one after it, and no more calls than the
    tool answers."""
    assert chains_of(policy, question, [bad, good], max_crops=most) == [good]


@pytest.mark.parametrize("path", ["", "<think>At (9, 9)."])
def test_back_tracking_within_a_single_turn(policy, question, path):
    """Guards single-turn linearising: the wrong thought, the sentence, the rest of the right one
    behind the path that both share; one answer. Where the right one only answers, nothing."""
    begin = path or "<think>"
    wrong = f"{begin} A (1, 2).</think>\n<answer> checked </answer>"
    short = f"{begin}</think>\n<answer> dotted </answer>"
    right = f"{begin} B (30, 4).</think>\n<answer> dotted </answer>"
    said = wrong.partition("</think>")[0].replace("<think> ", "<think>")
    joined = f"{said} {BACKTRACK}B (30, 4).</think>\n<answer> dotted </answer>"
    chains = chains_of(policy, question, [[wrong], [right], [short]], "grounded", partial=path)
    assert chains == [[short], [right], [joined]]


# --------------------------------------------------------------------- from single to several turns

def thoughts_and_calls(turns):
    parsed = [parse_turn(turn) for turn in turns]
    return [turn.thought for turn in parsed], [turn.call for turn in parsed]


def test_single_turn_to_multi_turn():
    """Guards the conversion: each new point a zoom call, at most four, what is left stays with the
    answer; without a point nothing changes."""
    text = ("<think>A cup (1, 2). Again (1, 2). A pot [30, 4]: odd. So be it.</think>\n"
            "<answer>(3, 4)</answer>")
    thoughts, calls = thoughts_and_calls(sft.to_multi_turn(text, later=0))
    assert calls == [(1, 2), (30, 4), None]
    assert thoughts == ["A cup (1, 2).", "Again (1, 2). A pot [30, 4]: odd.", "So be it."]
    _, calls = thoughts_and_calls(sft.to_multi_turn(text, later=1))
    assert calls == [(30, 4), (1, 2), None]
    many = "P (0, 5). P (20, 5). P (40, 5). P (60, 5). P (80, 5). P (100, 5)."
    turns = sft.to_multi_turn(answer("x", many), max_crops=4, later=0)
    assert len(turns) == 5 and turns[4] == answer("x", "P (80, 5). P (100, 5).")
    assert sft.to_multi_turn(answer("x", "No.")) == [answer("x", "No.")]


def test_sentences_are_not_cut():
    """Guards thoughts as real outputs have them: the point in mid-sentence, decimals, several
    points in a sentence (the first is shown), steps on lines of their own."""
    text = ("<think>At (120, 200) there is a chair. The lamp at (12.5, 40.25) and the cup at "
            "(7, 8) are red!\n1. The sign (90, 30) says EXIT\nIt is red.</think>\n"
            "<answer>red</answer>")
    thoughts, calls = thoughts_and_calls(sft.to_multi_turn(text, later=0))
    assert thoughts == ["At (120, 200) there is a chair.",
                        "The lamp at (12.5, 40.25) and the cup at (7, 8) are red!",
                        "1. The sign (90, 30) says EXIT", "It is red."]
    assert calls == [(120, 200), (12, 40), (90, 30), None]


def test_no_thought_is_empty(policy, question):
    """Guards chains that end in a point: our own reward calls an empty thought ill-formed, and such
    a trace would be dropped."""
    turns = sft.to_multi_turn(answer("dotted", "A (10, 10). B (40, 40)."))
    assert turns[2] == answer("dotted", "The answer is dotted.")
    assert_right(finished(policy, question, turns))


# ----------------------------------------------------------------------------------- chains on disk

@pytest.mark.parametrize("how", [{"crop_dot": True, "before_dotted": "Dotted: "},
                                 {"system_prompts": {}, "coordinates": "unrounded"}])
def test_what_is_read_again_is_the_same_dialogue(policy, monkeypatch, tmp_path, how):
    """Guards search.jsonl: the prompt, the crops and the words of a trace that is read again are
    those of the search, hints and answers that are points among them, its question made from the
    row. A polygon, which no row of the release has, is found by its question."""
    path = draw(tmp_path / "scene.png", (100, 90), (40, 50, 70, 80))
    monkeypatch.setitem(policy.image_processor.size, "shortest_edge", 256)
    way = dialogue(**how)
    words = Question("Which pattern?", [path], "dotted", key="a")
    place = Question("Description: the sign", [path], (40, 50, 70, 80), "point", key="b",
                     hint="Say (x, y).")
    corners = replace(place, key="c", answer=((40, 50), (70, 50), (70, 80), (40, 80)))
    x, y = map(round, way.start(policy, place, 1)[0].frames[0].to_input((55, 65)))
    to_the_point = [zoom_call(x, y), answer(f"({x}, {y})")]
    chains = [(words, [zoom_call(10, 10), zoom_call(40, 40), answer("dotted")]),
              (place, to_the_point), (corners, to_the_point)]
    rows = [json.dumps(sft.row_of_chain(way, *chain)) for chain in chains]
    file = tmp_path / "elsewhere/search.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(rows))
    read = read_traces(file, [corners])
    assert read[2][0] is corners
    for (question, texts), recording in zip(chains, read, strict=True):
        trace = replay(policy, way, *recording)
        node = Node(way.start(policy, question, 1)[0], tuple(texts[:-1]))
        complete(policy, way, [node], 1, SAMPLING)
        sampled, = node.rollouts
        last = policy.encode(texts[-1]) + [policy.tokenizer.eos_token_id]
        assert trace.prompt.ids + trace.ids == sampled.prompt.ids + last
        assert trace.windows == sampled.windows[:len(texts) - 1]
        assert_right(trace)


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
    draw(tmp_path / "images/scene.png")
    for i in range(5):
        Image.new("RGB", (64, 64), (40 * i, 90, 200)).save(tmp_path / f"images/crop{i}.png")

    def write(rows):
        path = tmp_path / "released.json"
        path.write_text(json.dumps(rows))
        return path
    return write


def replayed(policy, path):
    """The trace of the first row of a file."""
    question, messages, crops = read_traces(path)[0]
    return replay(policy, dialogue(), question, messages, crops)


@pytest.mark.parametrize("name", ["/etc/hostname", "../scene.png", "images/../../x.png"])
@pytest.mark.parametrize("place", [0, 1])
def test_traces_name_images_inside_the_root_alone(release, name, place):
    """Guards other files of a user's from a file of traces: an image's name must not lead out."""
    row = released(1)
    row["images"][place] = name
    with pytest.raises(UserError, match="released.json:1: no trace .* lies outside of"):
        read_traces(release([row]))
    assert read_traces(release([row]), image_root="/")


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_the_releases_dialogues_are_replayed_as_they_are(policy, release, calls):
    """Guards --traces FILE of the release: the crops are the files' images, five of them too (one
    more than our tool gives), the user's words are theirs, and exactly the assistant's tokens are
    learned, end tokens too."""
    row = released(calls)
    trace = replayed(policy, release([row]))
    text = policy.decode(trace.prompt.ids + trace.ids)
    text = re.sub(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>", "<image>", text)
    expected, spoken = "", ""
    for message in row["messages"]:
        said = message["content"] + "<|im_end|>"
        expected += f"<|im_start|>{message['role']}\n{said}\n"
        if message["role"] == "assistant":
            spoken += said
    assert text == expected.removesuffix("\n")
    assert policy.decode(list(compress(trace.ids, trace.sampled))) == spoken
    colours = [picture.image.getpixel((9, 9)) for picture in trace.pictures]
    assert colours == [(40 * i, 90, 200) for i in range(calls)]
    assert_right(trace)


def test_an_image_without_a_call_is_told(policy, release):
    """Guards rows that hold only the question's images, where an observation shows the window
    around the call: there has to be one."""
    row = released(1, images=["images/scene.png"])
    path = release([row])
    assert len(replayed(policy, path).pictures) == 1
    row["messages"][2]["content"] = "<think>Hm.</think>"
    with pytest.raises(UserError, match="json:1: an <image> follows a turn without a zoom call"):
        replayed(policy, release([row]))


BROKEN = {
    "an image less": lambda row: row["images"].pop(),
    "no last answer": lambda row: row["messages"].pop(),
    "no truth": lambda row: row.pop("gt_answer"),
    "no dialogue": lambda row: row.pop("messages"),
    "only a system message": lambda row: row.update(messages=row["messages"][:1], images=[]),
    "a content that is a number": lambda row: row["messages"][4].update(content=5),
    "no image in the question": lambda row: row["messages"][1].update(content="What?"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_rows_that_are_no_dialogue_are_refused(release, harm):
    """Guards the reader: a row whose images and places do not agree, or that ends without the
    assistant, is named by its number, in a line."""
    row = released(2)
    harm(row)
    with pytest.raises(UserError, match="json:2: no trace") as error:
        read_traces(release([released(1), row]))
    assert "\n" not in str(error.value)


def test_a_missing_crop_names_its_file_and_row(policy, release, tmp_path):
    """Guards the message: images are opened when a row is replayed; --image-root counts more than
    the file's folder."""
    path = release([released(3)])
    (tmp_path / "images/crop2.png").unlink()
    with pytest.raises(UserError, match=r"crop2\.png .*json:1"):
        replayed(policy, path)
    (question, _, crops), = read_traces(path, image_root=str(tmp_path / "elsewhere"))
    assert question.images == [tmp_path / "elsewhere/images/scene.png"]
    assert crops[0] == tmp_path / "elsewhere/images/crop0.png"


def test_special_tokens_of_a_file_are_only_text(policy, release):
    """Guards the chat: a row cannot end a turn, or stand for an image, by writing a token; each of
    the policy's tokens has a finite loss."""
    row = released(1)
    for message in row["messages"]:
        message["content"] += "<|im_end|><|vision_start|><|image_pad|><|vision_end|><|im_start|>"
    trace = replayed(policy, release([row]))
    pictures = trace.prompt.pictures + trace.pictures
    ids = trace.prompt.ids + trace.ids
    assert ids.count(policy.image_token) == sum(picture.tokens for picture in pictures)
    assert ids.count(policy.tokenizer.eos_token_id) == len(row["messages"])
    assert policy.log_probs([[trace]]).isfinite().all()


# ----------------------------------------------------------------------------------------- learning

@pytest.mark.slow
def test_only_right_well_formed_and_grounded_traces_are_learned(arguments, monkeypatch, capsys,
                                                                 tmp_path):
    """Guards the filter before fine-tuning, and what the log says of it: a right answer alone would
    teach what the reward then punishes. A single turn becomes several."""
    chains = [
        [zoom_call(10, 10), answer("dotted")],
        [answer("dotted", "A (10, 10). B (40, 20). Dotted.")],
        [zoom_call(10, 10), answer("checked")],
        [zoom_call(10, 10), answer("dotted", "")],
        [f"<think>Hm.</think>\n{format_call((9, 9))}", answer("dotted")],
    ]
    question = Question("Which?", [tmp_path / "image.png"], "dotted")
    rows = [json.dumps(sft.row_of_chain(dialogue(), question, texts)) for texts in chains]
    learned = []
    monkeypatch.setattr(sft, "fine_tune", lambda policy, traces, **how: learned.extend(traces))
    args = arguments("--traces", "traces.jsonl")
    Path("traces.jsonl").write_text("\n".join(rows))
    sft.learn_traces(args, tmp_path)
    assert [len(trace.turns) for trace in learned] == [2, 3]
    printed = capsys.readouterr().out
    assert "sft: 2 of 5 traces are right, well-formed and grounded" in printed
    for why in ("its answer is wrong", "turn 2: a tag is empty", "no thought has a point"):
        assert f"sft: 1 dropped: {why}" in printed
    Path("traces.jsonl").write_text("\n".join(rows[2:]))
    with pytest.raises(UserError, match="none of its 3 traces is right"):
        sft.learn_traces(args, tmp_path)


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_whatever_the_micro_batches(tiny_folder):
    """Guards the loss: it falls, and it does not depend on how the batch is cut."""
    policies = [load(tiny_folder, device="cpu") for _ in range(3)]
    traces = []
    for text in (answer("dotted"), answer("plain", "A longer thought.")):
        question = Question("Which?", [noise(64, 64)], "dotted")
        traces.append(finished(policies[0], question, [text], "direct"))
    for policy, micro_tokens in zip(policies[1:], (1, 10**6), strict=True):
        sft.fine_tune(policy, traces, steps=4, batch=2, lr=3e-3, seed=0, micro_tokens=micro_tokens)
    with torch.no_grad():
        before, small, large = [-policy.log_probs([traces]).mean().item() for policy in policies]
    assert small < 0.7 * before and small == pytest.approx(large, rel=0.02)


def test_the_papers_schedule_of_fine_tuning(policy, question, monkeypatch):
    """Guards the learning rate: a warm-up over 3 % of the steps, then a cosine down to 0; each step
    learns from `batch` traces, all of them equally often."""
    rates, seen = [], []
    monkeypatch.setattr(sft, "optimizer_step", lambda policy, optimizer, lr, clip: (
        rates.append(lr) or 1.0))
    monkeypatch.setattr(sft, "micro_batches", lambda groups, *_: seen.extend(groups) or [])
    traces = [finished(policy, question, [answer(str(i))]) for i in range(5)]
    sft.fine_tune(policy, traces, steps=100, batch=2, lr=2.0, seed=0)
    assert rates[0] == pytest.approx(2 / 3) and rates[50] == pytest.approx(1.0)
    assert max(rates) in rates[2:4] and rates[99] < 1e-3
    assert [seen.count([trace]) for trace in traces] == [40] * 5


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_not_kept(tiny_folder, monkeypatch, capsys, tmp_path):
    """Guards hours: a step without a finite gradient is skipped and counted, after five in a row
    fine-tuning is stopped, and weights that are not finite are never saved."""
    policy = load(tiny_folder, device="cpu")
    traces = [finished(policy, Question("?", [noise(64, 64)], "x"), [answer("x")])]
    norms = iter([1.0, math.nan, math.inf, 1.0, *[math.nan] * 5])
    monkeypatch.setattr(sft, "optimizer_step", lambda *_, **how: next(norms))
    monkeypatch.setattr(sft, "micro_batches", lambda *_: [])
    sft.fine_tune(policy, traces, steps=4, lr=1.0, seed=0)
    assert "skipped 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="5 gradients in a row .* lower --sft-lr"):
        sft.fine_tune(policy, traces, steps=9, lr=1.0, seed=0)
    with torch.no_grad():
        policy.trainable()[0].flatten()[9] = math.inf
    with pytest.raises(UserError, match="weights are not finite, and are not saved"):
        sft.save_checkpoint(policy, dialogue(), 1.0, tmp_path / "sft")
    assert not (tmp_path / "sft").exists()


# --------------------------------------------------------------------------------------- optimizers

def test_a_step_is_clipped_and_at_its_own_rate():
    """Guards optimizer_step: the rate of this step, the norm before clipping, gradients cleared;
    where the norm is not finite, the weights stay as they are, and the caller knows."""
    p = torch.nn.Parameter(torch.zeros(4))
    policy = SimpleNamespace(trainable=lambda: [p])
    optimizer = torch.optim.SGD([p], lr=9.0)
    for gradient, norm in ((3.0, 6.0), (math.nan, math.nan)):
        p.grad = torch.full((4,), gradient)
        found = sft.optimizer_step(policy, optimizer, lr=0.1, clip=1.0)
        assert found == pytest.approx(norm, nan_ok=True) and p.grad is None
        assert torch.allclose(p, torch.tensor(-0.05))


@pytest.mark.parametrize("dtype, kind", [(torch.float32, torch.optim.AdamW),
                                         (torch.bfloat16, sft.RoundedAdamW)])
def test_the_type_of_the_weights_decides_the_optimizer(tiny_folder, dtype, kind):
    """Guards both paths: float32 weights get torch's AdamW, bfloat16 ones ours."""
    optimizer = sft.make_optimizer(load(tiny_folder, device="cpu", dtype=dtype), 1e-6)
    assert type(optimizer) is kind and optimizer.defaults["weight_decay"] == 0.01


def test_our_adamw_is_adamw_on_average():
    """Guards training in bfloat16: moments are those of torch's AdamW, and steps of 1e-6 at 0.02, a
    hundredth of the spacing, must add up to what it does."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([0.02, -0.02]).repeat(4096, 1).bfloat16()
    p = torch.nn.Parameter(start.clone())
    exact = torch.nn.Parameter(start.float())
    ours = sft.RoundedAdamW([p], lr=1e-6, weight_decay=10)
    theirs = torch.optim.AdamW([exact], lr=1e-6, weight_decay=10)
    for _ in range(1000):
        p.grad = (1 + torch.randn(4096, 2, generator=generator)).bfloat16()
        exact.grad = p.grad.float()
        ours.step()
        theirs.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(ours.state[p][name], theirs.state[exact][name], atol=1e-6)
    expected = (exact - start).mean(0)
    moved = (p.float() - start).mean(0)
    assert torch.allclose(moved, expected, rtol=0.02, atol=0)


def test_a_sharded_parameter_takes_the_same_step(request):
    """Guards RoundedAdamW beside FSDP: each process steps with its own part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    plain = torch.nn.Parameter(torch.randn(9, 5).bfloat16())
    sharded = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    plain.grad = torch.randn(9, 5).bfloat16()
    sharded.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
    for p in (plain, sharded):
        sft.RoundedAdamW([p], lr=0.1).step()
    assert torch.equal(sharded.full_tensor(), plain)


# --------------------------------------------------------------------------------------- warm start

@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A search that finds one chain a question at once, and no fine-tuning. -> the list of how
    often each was done"""
    done = []

    def grow(args, questions, out):
        done.append("search")
        rows = [sft.row_of_chain(dialogue(), question, [zoom_call(9, 9), answer("dotted")])
                for question in questions]
        (out / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sft, "grow_trees", grow)
    monkeypatch.setattr(sft, "fine_tune", lambda *_, **how: done.append("sft"))
    return done


def begin(args):
    """train_sft.py with parsed flags. -> the path of sft/"""
    with sft.open_run(args, last=["sft"]):
        return sft.make_sft(args)


@pytest.mark.slow
def test_a_stage_that_is_there_is_taken_up_again(arguments, quick, tmp_path):
    """Guards a run that goes on: neither the search nor the fine-tuning is done twice; a finished
    warm start is only kept where --resume says so."""
    folder = begin(arguments("--search-questions", "2"))
    assert quick == ["search", "sft"] and (folder / "dialogue.json").is_file()
    assert json.loads((folder / "notes.json").read_text())["minutes"] > 0
    with pytest.raises(UserError, match="holds a run already; give --resume"):
        begin(arguments("--search-questions", "2"))
    begin(arguments("--search-questions", "2", "--resume", "--micro-tokens", "99"))
    assert quick == ["search", "sft"]
    folder.rename(tmp_path / "elsewhere")
    begin(arguments("--search-questions", "2"))
    assert quick == ["search", "sft", "sft"]


@pytest.mark.parametrize("stage", sft.STAGES)
def test_a_folder_belongs_to_its_settings(arguments, stage, tmp_path):
    """Guards results that are half of one setting and half of another: whatever an earlier run
    made, up to its search alone, is not taken up under other settings, with --resume or without."""
    sft.open_run(arguments("--seed", "4"), []).close()
    sft.open_run(arguments(), []).close()                             # nothing is made yet
    (tmp_path / "run" / stage).touch()
    sft.open_run(arguments("--resume", "--micro-tokens", "99"), []).close()
    for words, why in ((["--sft-lr", "0.1"], "sft_lr 1e-06, not 0.1"),
                       (["--no-backtrack", "--resume"], "backtrack True, not False")):
        with pytest.raises(UserError, match=f"was started with {why}; give the same, or ano"):
            sft.open_run(arguments(*words), [])
    (tmp_path / "run/args.json").unlink()
    with pytest.raises(UserError, match="no args.json says what was made"):
        sft.open_run(arguments(), [])


@pytest.mark.parametrize("name, file", [
    ("model", "model/model.safetensors"), ("teacher", "teacher/dialogue.json"),
    ("dialogue", "parts.json"), ("traces", "traces.jsonl"), ("questions", "task.jsonl")])
def test_other_content_under_the_same_path(arguments, tiny_folder, tmp_path, name, file):
    """Guards a run that goes on from another checkpoint, file of traces or wording than it began
    with: a path alone does not say what lies there."""
    for folder in ("model", "teacher"):
        shutil.copytree(tiny_folder, folder)
    for path in ("parts.json", "traces.jsonl"):
        Path(path).write_text("{}")
    words = ["--model", "model", "--teacher", "teacher", "--dialogue", "parts.json", "--traces",
             "traces.jsonl"]
    sft.open_run(arguments(*words), []).close()
    Path("run/sft").mkdir()
    sft.open_run(arguments(*words), []).close()
    content = Path(file).read_bytes()
    Path(file).write_bytes(content.replace(b"dotted", b"plain", 1) + b"\n")
    open_file.cache_clear()
    with pytest.raises(UserError, match=f"sha1_of_{name} "):
        sft.open_run(arguments(*words), [])


@pytest.mark.parametrize("name", ["args.json", "search.jsonl"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\0" * 300, b"\x80\xff", b'{"id": 1, "mess'])
def test_a_damaged_file_is_told(arguments, quick, name, content):
    """Guards against tracebacks after a crash of the machine; nothing is learned from half a
    file."""
    args = arguments()
    sft.open_run(args, []).close()
    Path("run/search.jsonl").touch()
    Path("run", name).write_bytes(content)
    with pytest.raises(UserError, match=f"run/{name}") as error:
        begin(args)
    assert not quick and "\n" not in str(error.value)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/none/run", "nul\0"])
def test_a_folder_that_cannot_be_used(arguments, out):
    """Guards --out: a file, a path below one, a folder that nobody may write to, no path; and one
    that another run is writing in."""
    args = arguments()
    with sft.open_run(args, []), pytest.raises(UserError, match="another run is writing there"):
        sft.open_run(args, [])
    sft.open_run(args, []).close()
    Path("file").touch()
    args.out = out
    with pytest.raises(UserError, match="cannot be written .*; make room, or give another name"):
        sft.open_run(args, [])


@pytest.mark.slow
def test_policies_of_the_warm_start(arguments, quick, tmp_path):
    """Guards what GRPO starts from: two policies with the weights of sft/, or one where there is no
    penalty; without fine-tuning those of the base, and no search."""
    args = arguments("--sft-steps", "0")
    args.kl = 0.01
    policy, reference, _ = sft.warm_start(args)
    assert quick == [] and policy is not reference
    weights, reference = policy.state_dict(), reference.state_dict()
    for name, weight in load(args.model, device="cpu").state_dict().items():
        assert torch.equal(weight, weights[name]) and torch.equal(weight, reference[name])
    args.kl = 0
    assert sft.warm_start(args)[1] is None


@pytest.mark.parametrize("words, message", [
    (("--chains", "0"), "chains"), (("--sft-lr", "nan"), "sft-lr"),
    (("--sft-steps", "-1"), "steps"), (("--search-mode", "think"), "search-mode")])
def test_flags_that_cannot_be_are_refused(arguments, words, message):
    """Guards the flags: a line that names the flag, before anything is loaded."""
    with pytest.raises(UserError, match=message):
        arguments(*words)


def test_time_that_is_left(monkeypatch):
    """Guards the log: the time of the rest at the pace so far."""
    monkeypatch.setattr(sft.time, "monotonic", lambda: 112.0)
    assert sft.remaining(100.0, 1, 5) == "12 s, 48 s left"
