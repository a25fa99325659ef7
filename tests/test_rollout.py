"""What rollout.py promises about settings, images, coordinates, the zoom tool and the dialogue."""
import argparse
import base64
import io
import json
import os
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import draw, noise
from PIL import Image

import rollout
from model import Chunk, UserError, load
from rollout import Dialogue, Question, crop_box, format_call, parse_turn, read_image, zoom

SHORT = {"direct": "Answer.", "think": "Think.", "grounded": "Point.", "zoom": "Zoom."}
TINY = Dialogue(system_prompts=SHORT, crop_half=32, crop_size=64)
GIVEN = ["--model", "m", "--task", "t"]


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return load(tiny_folder, device="cpu")

# ----------------------------------------------------------------------------------------- settings


@pytest.fixture
def read(monkeypatch):
    """read(*words) -> the Namespace of a script with these flags."""
    def settings(*words, sections=("rollout", "train_sft", "train_rl")):
        parser = argparse.ArgumentParser()
        rollout.shared_flags(parser)
        parser.add_argument("--lr", type=rollout.number(), default=1e-6)
        parser.add_argument("--group", type=rollout.whole(2), default=8)
        for flag, default in (("--resume", False), ("--tool", True)):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        return rollout.parse(parser, *sections)
    return settings


def write_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("family, training, expected", [
    ("search", True, dict(max_pixels=2_850_000, crop_half=182, crop_size=672)),
    ("gui", True, dict(max_pixels=4_194_304, crop_half=50, crop_size=384, crop_dot=True)),
    ("web", False, dict(max_pixels=12_960_000, crop_half=100, crop_size=512, crop_dot=True)),
    ("spatial", False, dict(max_pixels=4_194_304, max_image_side=1260))])
def test_settings_of_a_family(family, training, expected):
    """Guards the paper's and the authors' numbers: evaluation with the pixels of training."""
    assert rollout.family_settings(family, training) == expected


def test_modes_of_one_turn_have_defaults_of_their_own(read):
    """Guards the paper's second column; a flag that repeats the default of the other column was
    taken for one that was not given."""
    assert read(*GIVEN, "--mode", "think").group == 5
    kept = read(*GIVEN, "--mode", "think", "--group", 8, "--turn-tokens", 1024)
    assert kept.group == 8
    assert rollout.sampling_of(kept) == dict(temperature=1.0, top_p=1.0, turn_tokens=1024,
                                             response_tokens=2048)


def test_flags_count_more_than_the_config_file(read, tmp_path):
    """Guards --config: sections of other scripts, and the folder of the file in its paths."""
    config = {"rollout": {"model": "{here}/base", "task": "a", "mode": "think"},
              "evaluate": {"n": 3}, "train_rl": {"lr": 5e-4, "resume": True, "group": 4}}
    path = write_json(tmp_path / "run.json", config)
    args = read("--config", path, "--lr", 1, "--no-resume")
    assert (args.model, args.task, args.turn_tokens) == (f"{tmp_path}/base", "a", 2048)
    assert (args.lr, args.resume, args.group) == (1.0, False, 4)
    assert read("--config", path, sections=("rollout",)).lr == 1e-6


def test_the_tiny_run_is_the_default(read, tmp_path, monkeypatch):
    """Guards the bare command, and a tiny setting in a run of the user's own."""
    path = tmp_path / "recipe.json"
    write_json(path, {"rollout": {"model": "base", "task": "a", "turn_tokens": 48}})
    monkeypatch.setattr(rollout, "RECIPE", path)
    args = read("--model", "mine", sections=("rollout", "evaluate"))
    assert (args.model, args.turn_tokens, args.training) == ("mine", 48, False)
    assert read().turn_tokens == 48 and read(*GIVEN).turn_tokens == 1024
    with pytest.raises(UserError, match="--model without --task"):
        read("--model", "mine")
    with pytest.raises(UserError, match="--model: give"):
        read("--task", "mine")


@pytest.mark.parametrize("config", [
    "{", "[]", "null", {"toys": {}}, {"rollout": 3}, {"train_rl": {"lr": None}},
    {"train_rl": {"lr": True}}, {"train_rl": {"": 1}}, {"train_rl": {"grou": 8}},
    {"train_rl": {"group": 8.0}}, {"train_rl": {"resume": "yes"}}])
def test_a_broken_config_file_is_told_in_a_line(read, tmp_path, config):
    """Guards --config: misspelt names, wrong types and absurd values were passed over, or ended in
    a traceback."""
    path = write_json(tmp_path / "run.json", config)
    with pytest.raises(UserError) as error:
        read("--config", path, *GIVEN)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, message", [
    (["--group", 1], "no whole number from 2"), (["--group", "2.5"], "no whole number"),
    (["--lr", "inf"], "no number"), (["--lr", "nan"], "no number"),
    (["--temperature", 0], "--temperature"), (["--temperature", 1e-39], "--temperature"),
    (["--temperature", 1e300], "no number"), (["--top-p", 0], "no number"),
    (["--top-p", 0.5], "in training"), (["--tem", 3], "unrecognized arguments"),
    (["--config", "none.json"], "none.json")])
def test_a_bad_value_is_refused_in_a_line(read, flags, message):
    """Guards settings: an error in the midst of a run, or a run that does something else."""
    with pytest.raises(UserError, match=message) as error:
        read(*GIVEN, *flags)
    assert "\n" not in str(error.value)


def test_evaluation_may_be_greedy_or_truncated(read):
    """Guards what only training refuses."""
    args = read(*GIVEN, "--temperature", 0, "--top-p", 0.99, sections=("rollout", "evaluate"))
    assert (args.temperature, args.top_p) == (0, 0.99)


@pytest.mark.parametrize("error, code, message", [
    (UserError("two\nlines \xe9 \x1b[2J \ud83d"), 2, "error: two lines ? [U+001B][2J [U+D83D]\n"),
    (OSError(28, "No space left", "a.png"), 2, "error: [Errno 28] No space left: 'a.png'\n"),
    (KeyboardInterrupt(), 130, "interrupted; "), (KeyError("a"), 1, "Traceback"),
    (SystemExit(3), 3, "")])
def test_how_a_script_ends(error, code, message, monkeypatch):
    """Guards exit codes, and a traceback in place of a line: where the terminal has no such
    characters, too, and where stdout is closed."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        rollout.run_script(Mock(side_effect=error))
    assert stop.value.code == code
    assert written.buffer.getvalue().decode().startswith(message)


# ---------------------------------------------------------------------------- coordinates and crops

@pytest.mark.parametrize("text, points", [
    ("the cup (12, 40).", [(12, 40)]), ("[12,40]", [(12, 40)]),
    ("at ( 12.5 ,\n40 ) and (-3, 7)", [(12.5, 40), (-3, 7)]), ("(1.5e1, 2E+2)", [(15, 200)]),
    ("(1, 2, 3, 4) (a, b) (1 2)", [])])
def test_points_in_text(text, points):
    """Guards parsing: decimals, negatives, brackets and inner blanks are points; boxes are not."""
    assert rollout.parse_points(text) == points


@pytest.mark.parametrize("size, point, box", [
    ((300, 200), (150, 100), (110, 60, 190, 140)), ((300, 200), (0, 0), (0, 0, 80, 80)),
    ((300, 200), (299, 199), (220, 120, 300, 200)), ((500, 30), (250, 5), (210, 0, 290, 30))])
def test_the_window_of_a_crop(size, point, box):
    """Guards crops: at a border the window is moved and not stretched; where a side of the image is
    shorter, it is shown in full: a third of such an image was cut away."""
    assert crop_box(size, point, 40) == box


def test_a_small_image_is_shown_undistorted():
    """Guards small images, whose crop was stretched to a square; and thin ones, whose crop was too
    thin for the model and ended the run in the midst of a dialogue."""
    image = Image.new("RGB", (300, 200), "white")
    image.paste("black", (0, 0, 150, 100))
    crop = zoom(image, (280, 10), 182, 672).convert("L")
    assert crop.size == (672, 448)
    assert crop.getpixel((332, 220)) < 20 and crop.getpixel((340, 228)) > 235
    assert zoom(Image.new("RGB", (1, 200)), (0, 0), 182, 672).size == (4, 672)


@pytest.mark.parametrize("size, point, place", [
    (200, (1000, 1000), (100, 100)), (672, (5, 1990), (17, 638))])
def test_the_dot_marks_the_point_and_can_be_seen(size, point, place):
    """Guards the red dot: too small to be seen, without its outline on a red ground, or in the
    midst of a crop whose window was moved inside the image."""
    dotted = zoom(Image.new("RGB", (2000, 2000)), point, 100, size, dot=True)
    left, top, right, bottom = dotted.getbbox()              # of what is not black
    assert 0.04 < (right - left) / size < 0.07
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(place, abs=1)
    assert dotted.getpixel(place) == (255, 0, 0)
    assert dotted.getpixel((left, place[1])) == (255, 255, 255)


CALL = '{"name": "search_coordinate", "arguments": %s}'


@pytest.mark.parametrize("text, message", [
    ("{", "valid JSON"), ("[" * 400, "valid JSON"), ("[1, 2]", "only tool"),
    ('{"name": "other", "arguments": {"coordinate": [1, 2]}}', "only tool"),
    ('{"name": "search_coordinate"}', "two numbers"), (CALL % "[1, 2]", "two numbers"),
    (CALL % '{"coordinate": [1]}', "two numbers"),
    (CALL % '{"coordinate": [true, false]}', "two numbers"),
    (CALL % '{"coordinate": ["1", "2"]}', "two numbers"),
    (CALL % '{"coordinate": [NaN, Infinity]}', "two numbers"),
    (CALL % '{"coordinate": [1e99, 2]}', "two numbers"), ("[" * 5000, "too long"),
    (CALL % '{"coordinate": [1, 2]}' + " " * 400, "too long")])
def test_bad_calls_are_told_in_words(text, message):
    """Guards the tool against whatever a model writes: a ToolError, never a crash."""
    with pytest.raises(rollout.ToolError, match=message):
        rollout.parse_call(text)


def test_a_turn_keeps_thought_and_answer():
    """Guards against a step with a thought and an answer losing its thought, and against points
    outside the thought."""
    turn = parse_turn("<think>The cup at (3, 4).</think>\n<answer>\na red\ncup (9, 9)</answer>")
    assert (turn.thought, turn.points) == ("The cup at (3, 4).", [(3, 4)])
    assert turn.answer == "a red\ncup (9, 9)"
    turn = parse_turn("<think>x (3, 4)</think>" + format_call((5, 6)))
    assert turn.call == (5, 6) and turn.answer is None
    assert parse_turn("<tool_call>{").error and parse_turn("<answer>").answer is None
    parse_turn("<think>" * 50_000 + "<tool_call>" * 50_000)        # linear time


# ------------------------------------------------------------------------------------- the dialogue

@pytest.fixture
def question():
    return Question("Which?", [Image.new("RGB", (256, 256), "grey")], "red")


@pytest.fixture
def start(policy, question):
    """start(dialogue) -> a Trace, and say(text): writes a turn as the policy. -> what answers it"""
    def started(dialogue, question=question):
        (trace,) = dialogue.start(policy, question, 1)

        def say(text, truncated=False):
            end = [] if truncated else [policy.tokenizer.eos_token_id]
            trace.add(Chunk(policy.encode(text) + end, []), sampled=True)
            chunk = dialogue.on_turn(policy, trace, truncated)
            if chunk:
                trace.add(chunk)
            return policy.decode(chunk.ids) if chunk else None
        return trace, say
    return started


def zooming(x, y):
    return f"<think>Here ({x}, {y}).</think>\n{format_call((x, y))}"


def test_a_dialogue_with_a_zoom_call(start):
    """Guards the way of a dialogue: a bad call and a point outside are answered in words and do not
    end it, a zoom call with the window of the original; an answer ends it."""
    trace, say = start(TINY)
    assert "not valid JSON" in say("<think>a (1, 1)</think><tool_call>{</tool_call>")
    assert "outside" in say(zooming(900, 3))
    reply = say(zooming(27, 27))
    assert "<observation>" in reply and "</observation>" in reply
    assert reply.count("<|image_pad|>") == 16 and trace.turns[2].crop == (76, 76, 140, 140)
    assert say("<think>Red.</think><answer>red</answer>") is None
    assert (trace.ended, trace.answer, trace.zoom_points) == ("answer", "red", [(27, 27)])


def test_after_the_last_call_the_answer_is_asked_for(start):
    """Guards the bound on zoom calls, refused ones included: the answer is asked for, and the rest
    of the turn that was begun for the policy is read with it."""
    trace, say = start(replace(TINY, max_crops=2))
    assert say(zooming(1, 1)) and say(zooming(900, 9))
    reply = say(zooming(5, 5))
    assert reply.endswith(TINY.forced_answer) and TINY.no_calls_left in reply
    assert say("red</answer>") is None
    assert (trace.ended, trace.answer, trace.zoom_points) == ("forced", "red", [(1, 1)])


@pytest.mark.parametrize("text, truncated, ended", [
    ("<think>a</think>", False, "stopped"), ("<think>a", True, "truncated")])
def test_how_a_trace_can_end(start, text, truncated, ended):
    """Guards the reasons to end, which decide what is left out of the loss."""
    trace, say = start(TINY)
    assert say(text, truncated) is None and trace.ended == ended


def test_an_observation_that_does_not_fit_ends_the_trace(policy, question, monkeypatch):
    """Guards the bound on tokens: a trace whose crop would pass it ends as "truncated", not without
    a reason."""
    def on_turn(dialogue, policy, trace, truncated):         # every turn has a zoom call
        trace.turns.append(parse_turn(zooming(5, 5)))
        return dialogue.answer_call(policy, trace, trace.turns[-1])
    monkeypatch.setattr(Dialogue, "on_turn", on_turn)
    groups = rollout.rollout(policy, [question], TINY, 1, [0], turn_tokens=9, response_tokens=40)
    ((trace,),) = groups
    assert trace.ended == "truncated" and len(trace.ids) <= 40
    assert len(trace.zoom_points) == len(trace.turns) - 1    # those that were shown


def test_without_the_tool_the_answer_is_asked_for_at_once(policy, start):
    """Guards --no-tool: no zoom call is possible."""
    trace, say = start(replace(TINY, tool=False))
    assert policy.decode(trace.prompt.ids).endswith(TINY.forced_answer)
    assert say("red</answer>") is None
    assert (trace.ended, trace.answer, trace.overlong) == ("forced", "red", False)


@pytest.mark.parametrize("dot, pictures", [(False, 1), (True, 2)])
def test_traces_of_a_question_share_their_crops(policy, question, dot, pictures):
    """Guards the time and memory of crops: a window is encoded once a question; and, where a dot
    marks the point, two points whose windows are one get a crop each."""
    dialogue = replace(TINY, crop_dot=dot)
    traces = dialogue.start(policy, question, 3)
    shown = set()
    for trace, x in zip(traces, (1, 1, 2), strict=True):
        trace.ids += policy.encode(zooming(x, 1))
        shown.update(dialogue.on_turn(policy, trace, False).pictures)
        assert trace.turns[0].crop == (0, 0, 64, 64)         # at the border: one window
    assert len(shown) == pictures
    assert not dialogue.start(policy, question, 1)[0].crops


@pytest.mark.parametrize("mode", rollout.MODES)
def test_rollouts_of_every_mode(policy, question, mode):
    """Guards all modes end to end with the real engine: every trace ends for a reason, within its
    bounds, and no image is kept."""
    questions = [replace(question) for _ in range(3)]
    groups = rollout.rollout(policy, questions, replace(TINY, mode=mode), 2, range(3),
                             turn_tokens=12, response_tokens=90)
    for question, group in zip(questions, groups, strict=True):
        assert len(group) == 2 and not question.loaded
        for trace in group:
            assert trace.question is question and trace.mode == mode
            assert trace.ended and trace.turns and len(trace.ids) <= 90
            pairs = zip(trace.ids, trace.sampled, strict=True)
            assert (policy.image_token, True) not in pairs


@pytest.mark.slow
def test_a_trace_does_not_depend_on_what_runs_beside_it(policy):
    """Guards random numbers that belong to questions: whichever others are asked, in whatever
    order, and however many run at a time, a question with its seed gets the same traces, token by
    token; with another seed it gets others."""
    questions = [Question(f"Which{' one' * i}?", [noise(256, 256, i)], "red") for i in range(5)]

    def traces(numbers, seed="a", **limits):
        seeds = [f"{seed} {i}" for i in numbers]
        groups = rollout.rollout(policy, [questions[i] for i in numbers], TINY, 3, seeds,
                                 turn_tokens=12, response_tokens=90, **limits)
        return dict(zip(numbers, groups, strict=True))

    together = traces(range(5))
    other_seed = traces(range(5), "b")
    for others in (traces([4, 3, 2, 1, 0]), traces([1, 4, 0], cache_tokens=1),
                   traces(range(5), cache_tokens=900)):
        for i, group in others.items():
            for trace, same in zip(group, together[i], strict=True):
                assert trace.ids == same.ids and trace.sampled == same.sampled
                assert trace.log_probs == pytest.approx(same.log_probs, abs=1e-5)
    for i, group in together.items():
        assert len({tuple(trace.ids) for trace in group}) == 3
        assert [trace.ids for trace in group] != [trace.ids for trace in other_seed[i]]


@pytest.mark.parametrize("size", [(10, 2000), (3000, 15)])
def test_a_trace_is_drawn(start, size):
    """Guards the picture of a trace: a thin image was drawn 153,800 px high."""
    trace, say = start(TINY, Question("?", [Image.new("RGB", size, "blue")], ""))
    assert say(zooming(3, 3))
    say("<think>a (1, 2). b (900, 3).</think><answer>red</answer>")
    picture = rollout.draw_trace(trace)
    assert picture.width == 768 and picture.height <= 1024 + 192
    assert len(picture.getcolors(2**20)) > 3


# ----------------------------------------------------------------------------- the dialogue's parts

def asked(policy, dialogue, question):
    """The prompt of a question, as text."""
    return policy.decode(dialogue.prompt(policy, question)[0].ids)


@pytest.fixture
def made(read, policy):
    """made(checkpoint, *flags) -> the Dialogue of a run with a checkpoint."""
    def dialogue(checkpoint, *flags, family=None):
        args = read(*GIVEN, *flags)
        args.family = family
        return rollout.make_dialogue(args, str(checkpoint), policy)
    return dialogue


def test_which_part_of_a_dialogue_counts(made, policy, question, tmp_path, monkeypatch):
    """Guards whose wording counts, from the least to the most: the crops of the family, the
    checkpoint's dialogue.json, --dialogue FILE; and that a part leaves the others as they were."""
    theirs = Dialogue("zoom", True, {"zoom": "Ünd?"}, "a", "b", "c", "d", "e", False, "unrounded",
                      9, 8, True, 1)
    policy.save(tmp_path / "theirs", dialogue=theirs.to_json())
    path = write_json(tmp_path / "mine.json", {"crop_size": 40, "hints": True})
    mine = replace(theirs, crop_size=40, hints=True)
    assert made(tmp_path, "--mode", "think", "--no-tool") == Dialogue("think", tool=False)
    gui = Dialogue(crop_half=50, crop_size=384, crop_dot=True)
    assert made(tmp_path, family="gui") == gui and made(tmp_path / "theirs", family="gui") == theirs
    assert made(tmp_path / "theirs", "--dialogue", path) == mine
    assert "Ünd?" in asked(policy, theirs, question)
    monkeypatch.setattr(policy, "default_system_message", lambda: "Look closer.")
    assert made(tmp_path) == Dialogue(system_prompts={}) and made(tmp_path / "theirs") == theirs


def test_a_checkpoint_of_ours_without_its_dialogue_is_refused(made, tmp_path):
    """Guards a policy from other wording and crops than it was trained with, without a word."""
    write_json(tmp_path / "notes.json", {})
    with pytest.raises(UserError, match=f"{tmp_path}: dialogue.json is missing"):
        made(tmp_path)


@pytest.mark.parametrize("text", [
    "{", "[1, 2]", "null", '{"crop": 3}', '{"mode": "think"}', '{"hints": 1}',
    '{"crop_half": true}', '{"crop_half": 32.5}', '{"coordinates": "px"}',
    '{"system_prompts": {"zoom": 3}}', '{"system_prompts": {"look": "Look."}}', '{"crop_half": 0}',
    '{"crop_size": 1000000}', '{"max_crops": -1}', "[" * 99_999])
def test_a_broken_part_of_a_dialogue_is_told_in_a_line(made, tmp_path, text):
    """Guards --dialogue: a misspelt part was passed over without a word, and a part of another type
    ended in a traceback."""
    path = write_json(tmp_path / "mine.json", text)
    for broken in (path, "none.json"):
        with pytest.raises(UserError) as error:
            made(tmp_path, "--dialogue", broken)
        assert str(error.value).startswith(f"{broken}: ") and "\n" not in str(error.value)


def test_texts_that_editors_leave_behind(made, read, tmp_path):
    """Guards settings against a mark of byte order, and against half a character, which ended the
    run in the tokenizer."""
    text = '\ufeff{"system_prompts": {"zoom": "Look \\ud83d!"}}'
    path = write_json(tmp_path / "mine.json", text)
    assert made(tmp_path, "--dialogue", path).system_prompts == {"zoom": "Look ?!"}
    assert rollout.parse_json('["\\ud83d\\ude00", "\\ude00"]') == ["😀", "?"]
    path = write_json(tmp_path / "run.json", '\ufeff{"rollout": {"model": "a", "task": "b"}}')
    assert read("--config", path).model == "a"


def test_a_hint_stands_behind_the_question(policy, question):
    """Guards real rows that do not say what is wanted ("Description: ..."); and checkpoints that
    were trained without hints."""
    question.hint = "The answer is one point (x, y)."
    assert "Which?\nThe answer is one point" in asked(policy, TINY, question)
    assert "The answer is" not in asked(policy, replace(TINY, hints=False), question)


# ------------------------------------------------------------------------------------------- images

def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode, format", [("RGBA", "GIF"), ("LA", "PNG")])
def test_transparency_lies_on_white(mode, format):
    """Guards transparent images: black on transparent black was all black."""
    image = Image.new("RGBA", (40, 20))
    image.paste("black", (0, 0, 20, 20))
    read = read_image(encoded(image.convert(mode), format))
    assert read.mode == "RGB"
    assert read.getpixel((5, 5)) == (0, 0, 0) and read.getpixel((35, 5)) == (255, 255, 255)


@pytest.mark.parametrize("most, kind, format", [
    (65_535, "uint16", "PNG"), (65_535, "int32", "TIFF"), (1, "float32", "TIFF"),
    (255, "float32", "TIFF")])
def test_more_than_eight_bits_are_scaled(most, kind, format):
    """Guards 16-bit and float images: they were cut off to black or white."""
    ramp = np.tile(np.linspace(0, 1, 40), (20, 1))
    image = Image.fromarray((most * ramp).astype(kind))
    read = np.asarray(read_image(encoded(image, format)))[..., 0]
    assert read == pytest.approx(255 * ramp, abs=1.5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_no_pixels(format):
    """Guards photographs: a point is meant in the image as a person sees it, turned by its EXIF;
    damaged EXIF was a traceback, or "cannot be read"."""
    image = Image.new("L", (400, 200), "white")
    image.paste("black", (0, 0, 100, 50))                    # top left in the file
    exif = Image.Exif()
    exif[0x0112] = 6                                         # to be turned clockwise
    exif[0x0131] = "written by some camera"
    data = exif.tobytes()
    for kept in (data, data[:-9]):
        upright = read_image(encoded(image, format, exif=kept))
        assert upright.size == (200, 400)
        assert max(upright.getpixel((175, 50))) < 20         # top right as a person sees it
    for at in range(4, len(data), 3):
        broken = data[:at] + b"\xff\xff\xff\xff" + data[at + 4:]
        assert read_image(encoded(image, format, exif=broken)).width in (200, 400)


def test_an_image_can_stand_in_its_row():
    """Guards data URIs, which were taken for paths; and the name of a broken one, which was as long
    as the image."""
    text = base64.b64encode(encoded(noise(40, 20), "WEBP")).decode()
    images = ["data:image/webp;base64," + text, partial(noise, 40, 20)]
    assert [image.size for image in Question("?", images, "").load()] == [(40, 20), (40, 20)]
    for broken in (text[:-50], "AAA", "é"):
        with pytest.raises(UserError, match="the embedded image .rows, line 3.: ") as error:
            read_image("data:image/png;base64," + broken, "rows, line 3")
        assert len(str(error.value)) < 300


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    """Guards reading: missing, a pipe (it hung), no image, a format that nobody named, huge, very
    thin: one line that names file and row."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no image")
    for name, size in (("a.eps", (9, 9)), ("big.png", (400, 400)), ("thin.png", (900, 3))):
        draw(tmp_path / name, size)
    monkeypatch.setattr(rollout, "MAX_IMAGE_PIXELS", 10_000)
    for name, word in (("none.png", "no such"), ("pipe.png", "no such"), ("thin.png", "thin"),
                       ("text.png", "cannot be read"), ("a.eps", "PNG, JPEG"),
                       ("big.png", "scale it down")):
        with pytest.raises(UserError, match=word) as error:
            read_image(tmp_path / name, "rows.jsonl, line 7")
        message = str(error.value)
        assert str(tmp_path / name) in message and "line 7" in message and "\n" not in message


def test_an_image_that_cannot_be_encoded_is_told_with_its_row(policy, question, monkeypatch):
    """Guards sizes that only the image processor knows: an image failed there without a name."""
    monkeypatch.setattr(policy, "picture", Mock(side_effect=UserError("too thin")))
    question.where = "rows.jsonl, line 7"
    with pytest.raises(UserError, match="rows.jsonl, line 7: too thin"):
        TINY.prompt(policy, question)
