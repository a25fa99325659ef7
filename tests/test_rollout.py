"""What rollout.py promises about settings, coordinates, the zoom tool and the dialogue."""
import json
import re
from dataclasses import fields, replace
from itertools import groupby
from threading import Lock

import pytest
from PIL import Image, ImageDraw

import rollout as rollout_module
from evaluate import hint_for
from model import UserError
from rollout import (
    MODES,
    SYSTEM_PROMPTS,
    Config,
    Dialogue,
    Frame,
    Question,
    ToolError,
    Trace,
    crop_box,
    describe_config,
    describe_fields,
    format_call,
    make_config,
    make_dialogue,
    parse_call,
    parse_points,
    parse_turn,
    read_image,
    rollout,
    toy,
    zoom,
)
from train_sft import TINY

# ----------------------------------------------------------------------------------------- settings

SCRIPTS = ("train_sft", "train_rl", "evaluate")
FIELDS = [field.name for field in fields(Config) if field.name != "given"]


def flags_of(script):
    return set().union(*describe_fields(script).values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_each_setting_of_a_script_once(name, script, monkeypatch):
    """Guards --help, which is made from Config's source: a field without its comment, a section
    that names no script, a default that is not the one in force, another script's flag."""
    monkeypatch.setenv("COLUMNS", "400")
    out, _ = script(name, "--help")
    for field in FIELDS:
        flag = "--" + field.replace("_", "-")
        lines = re.findall(rf"^ +{flag}[, ].*(?:\n {{20,}}.*)?$", out, re.M)
        assert len(lines) == (field in flags_of(name)), field
        default = getattr(Config, field)
        for line in lines:
            assert len(re.split(r"\s{2,}", line.strip())) == 2, f"{field} has no help text"
            if default not in (None, "", False):
                assert line.count(f"[{default}") == 1, line


def test_each_setting_belongs_to_a_script():
    """Guards Config: a field that no script has as a flag, and a flag in the wrong script."""
    flags = set.union(*map(flags_of, SCRIPTS))
    assert flags == set(FIELDS)
    assert flags_of("train_sft") < flags_of("train_rl")
    common = {"model", "task", "mode", "dialogue", "seed", "crop_half", "temperature"}
    assert common <= set.intersection(*map(flags_of, SCRIPTS))
    assert {"group", "lr", "kl", "dry_run"} <= flags_of("train_rl") - flags_of("train_sft")
    own = {"n", "tool", "json", "image", "question", "save"}
    assert own <= flags_of("evaluate") - flags_of("train_rl")


@pytest.mark.parametrize("script, family, given, expected", [
    ("train_rl", "drawn", {}, dict(temperature=1.0, lr=6e-3, group=8, max_pixels=None)),
    ("evaluate", "drawn", {}, dict(temperature=1.0, top_p=1.0, crop_half=32, turn_tokens=48)),
    ("evaluate", "search", {}, dict(max_pixels=12_960_000, crop_half=182, crop_size=672,
                                    crop_dot=False, temperature=0.5, top_p=0.99)),
    ("train_sft", "search", {}, dict(max_pixels=2_850_000, temperature=1.0, top_p=1.0)),
    ("evaluate", "gui", {}, dict(max_pixels=12_960_000, crop_half=100, crop_size=512,
                                 crop_dot=True, response_tokens=3072)),
    ("train_sft", "gui", {}, dict(max_pixels=4_194_304, crop_half=50, crop_size=384)),
    ("evaluate", "gui", {"mode": "direct"}, dict(turn_tokens=2048, response_tokens=2048,
                                                 top_p=1.0)),
    ("evaluate", "spatial", {}, dict(max_image_side=1260, max_pixels=4_194_304)),
    ("train_sft", "spatial", {}, dict(max_image_side=None)),
    ("train_rl", "gui", {"model": "a"}, dict(lr=1e-6, group=8, clip_norm=0.2, warm_up=25,
                                             optimizer="adamw", diversity=0.2)),
    ("train_rl", "gui", {"model": "a", "mode": "think"}, dict(group=5, clip_norm=1.0, warm_up=0)),
    ("train_rl", "drawn", {"model": "a"}, dict(lr=1e-6, group=8, turn_tokens=48)),
    ("evaluate", "gui", {"model": "a"}, dict(lr=6e-3, temperature=0.5)),
])
def test_defaults_by_family_then_evaluation_then_model(script, family, given, expected):
    """Guards the order of PRESETS: what is particular counts more than what is general."""
    config = make_config(given, family, script)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.family == family


def test_a_given_flag_counts_more_than_any_preset():
    """Guards flags: one that repeats Config's own default was taken for one that was not given."""
    given = {"temperature": 1.0, "crop_half": 32, "max_pixels": 1000}
    config = make_config(given, "gui", "evaluate")
    assert (config.temperature, config.crop_half, config.max_pixels) == (1.0, 32, 1000)
    assert config.crop_size == 512 and set(config.given) == set(given)


def test_a_star_marks_what_was_given():
    """Guards the settings that a run prints: which of them the user chose."""
    config = make_config({"temperature": 0.7, "mode": "think"}, "gui", "evaluate")
    settings = describe_config(config, "evaluate").partition("\n")[2].split()
    assert "temperature=0.7*" in settings and "mode=think*" in settings
    assert "max_pixels=12960000" in settings and "top_p=1.0" in settings
    assert sum(setting.endswith("*") for setting in settings) == 2
    assert not any(setting.startswith("group=") for setting in settings)     # not evaluate's


@pytest.mark.parametrize("name, flags, message", [
    ("train_rl", ["--group", 1], "--group 1"),
    ("train_rl", ["--steps", 0], "--steps 0"),
    ("train_rl", ["--questions", -3], "--questions -3"),
    ("train_rl", ["--lr", "inf"], "--lr inf"),
    ("train_rl", ["--kl", "nan"], "--kl nan"),
    ("train_rl", ["--overlong", "drop"], "invalid choice"),
    ("train_rl", ["--temperature", 0], "--temperature 0"),
    ("train_rl", ["--top-p", 0], "--top-p"),
    ("train_sft", ["--temperature", 0], "--temperature 0"),
    ("train_sft", ["--group", 8], "unrecognized arguments"),
    ("train_sft", ["--sft-lr", -1], "--sft-lr -1"),
    ("evaluate", ["--temperature", -1], "--temperature -1"),
    ("evaluate", ["--top-p", 1.5], "--top-p"),
    ("evaluate", ["--mode", "look"], "invalid choice"),
    ("evaluate", ["--family", "toys"], "invalid choice"),
    ("evaluate", ["--family", "drawn", "--n", "0"], "--n 0"),
    ("evaluate", ["--max-crops", -1], "--max-crops -1"),
    ("evaluate", ["--cache-tokens", "many"], "invalid int"),
    ("evaluate", ["--sead", 3], "unrecognized arguments"),
    ("evaluate", ["words"], "unrecognized arguments"),
])
def test_a_bad_value_is_refused_in_a_line(script, tiny_folder, name, flags, message):
    """Guards settings: an error in the midst of a run, or a run that does something else."""
    model = ["--model", tiny_folder] if name == "evaluate" else []
    out, err = script(name, *model, *flags, code=2)
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err


# ---------------------------------------------------------------------------- coordinates and crops

@pytest.mark.parametrize("text, points", [
    ("the cup (12, 40).", [(12, 40)]), ("[12,40]", [(12, 40)]),
    ("at ( 12.5 , 40 ) and (-3, 7)", [(12.5, 40), (-3, 7)]), ("(1, 2, 3, 4) (a, b) (1 2)", []),
    ("(999999999, 2)", [(999999999, 2)]), ("(1,\n2)", [(1, 2)]), ("", []),
])
def test_points_in_text(text, points):
    """Guards parsing: decimals, negatives, brackets and inner blanks are points; boxes are not."""
    assert parse_points(text) == points


def test_frames_convert_between_model_input_and_original():
    """Guards the one place of conversion, and that the border is outside."""
    frame = Frame((64, 32), (640, 640))
    assert frame.to_original((32, 16)) == (320, 320) and frame.to_input((320, 320)) == (32, 16)
    assert frame.contains((0, 0)) and frame.contains((63.9, 31.9))
    assert not frame.contains((64, 5)) and not frame.contains((-1, 5))


@pytest.mark.parametrize("point", [(0, 0), (299, 199), (150, 100), (299, 0)])
def test_the_window_at_a_border_is_moved_and_not_stretched(point):
    """Guards crops near a border: the same size everywhere, inside the image, with the point in
    them."""
    left, top, right, bottom = crop_box((300, 200), point, 40)
    assert right - left == bottom - top == 80
    assert left >= 0 and top >= 0 and right <= 300 and bottom <= 200
    assert left <= point[0] <= right and top <= point[1] <= bottom


def test_an_image_smaller_than_the_window_is_shown_in_full_and_undistorted():
    """Guards small images: a third of a 300x200 image was cut away, or its crop was stretched to
    a square. Where one side alone is shorter, that side is shown in full."""
    assert crop_box((100, 30), (90, 5), 50) == (0, 0, 100, 30)
    assert crop_box((300, 200), (150, 100), 182) == (0, 0, 300, 200)
    assert crop_box((500, 30), (250, 5), 50) == (200, 0, 300, 30)
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 149, 99), fill="black")
    crop = zoom(image, (280, 10), 182, 672)
    assert crop.size == (672, 448)
    black = crop.convert("L").point(lambda v: 255 * (v < 128)).getbbox()
    assert black == pytest.approx((0, 0, 336, 224), abs=1)
    assert zoom(image, (150, 100), 50, 200).size == (200, 200)


def test_zoom_adds_real_detail():
    """Guards against crops of the down-scaled image: one dark px of the original must be visible in
    the crop."""
    image = Image.new("RGB", (2000, 2000), "white")
    image.putpixel((1500, 300), (0, 0, 0))
    crop = zoom(image, (1500, 300), 10, 200)
    assert crop.size == (200, 200) and min(crop.convert("L").tobytes()) < 60


@pytest.mark.parametrize("size", [200, 384, 512, 672])
@pytest.mark.parametrize("point", [(1000, 1000), (5, 1990)])
def test_the_dot_marks_the_point_and_can_be_seen(size, point):
    """Guards the red dot: too small to be seen, without its outline on a red ground, or in the
    midst of a crop whose window was moved inside the image."""
    image = Image.new("RGB", (2000, 2000), "black")
    left, top, right, _ = crop_box(image.size, point, 100)
    scale = size / (right - left)
    dotted = zoom(image, point, 100, size, dot=True)
    x, y = (point[0] - left) * scale, (point[1] - top) * scale
    assert dotted.getpixel((round(x), round(y))) == (255, 0, 0)
    row = [dotted.getpixel((column, round(y))) for column in range(size)]
    runs = [(colour, len(list(same))) for colour, same in groupby(row)]
    red, white, black = (255, 0, 0), (255, 255, 255), (0, 0, 0)
    assert [colour for colour, _ in runs][-4:] == [white, red, white, black]
    assert 0.04 < sum(width for _, width in runs[-4:-1]) / size < 0.07


@pytest.mark.parametrize("text", [
    "", "{", "[1, 2]", "null", '{"name": "other", "arguments": {"coordinate": [1, 2]}}',
    '{"name": "search_coordinate"}', '{"name": "search_coordinate", "arguments": [1, 2]}',
    '{"name": "search_coordinate", "arguments": {"coordinate": [1]}}',
    '{"name": "search_coordinate", "arguments": {"coordinate": [true, false]}}',
    '{"name": "search_coordinate", "arguments": {"coordinate": ["1", "2"]}}',
    '{"name": "search_coordinate", "arguments": {"coordinate": [NaN, Infinity]}}',
    '{"name": "search_coordinate", "arguments": {"coordinate": [1e99, 2]}}',
    "[" * 5000, '{"a": ' * 60, "9" * 5000])
def test_bad_calls_are_told_in_words(text):
    """Guards the tool against whatever a model writes: a ToolError, never a crash."""
    with pytest.raises(ToolError):
        parse_call(text)


def test_a_call_that_is_too_long_is_told_so():
    """It was told that there is only one tool, which it had named."""
    with pytest.raises(ToolError, match="too long"):
        parse_call('{"name": "search_coordinate", "arguments": {"coordinate": [1, 2]}}' + " " * 400)


def test_a_turn_keeps_thought_and_answer():
    """Guards against a step with a thought and an answer losing its thought, and against points
    outside the thought."""
    turn = parse_turn("<think>The cup at (3, 4).</think>\n<answer>\na red\ncup (9, 9)</answer>")
    assert (turn.thought, turn.points) == ("The cup at (3, 4).", [(3, 4)])
    assert (turn.answer, turn.call) == ("a red\ncup (9, 9)", None)
    call = parse_turn("<think>x (3, 4)</think>" + format_call((5, 6)))
    assert call.call == (5, 6) and call.answer is None
    assert parse_turn("<tool_call>{").error and parse_turn("<answer>").answer is None
    parse_turn("<think>" * 50_000 + "<tool_call>" * 50_000)        # linear time


# ------------------------------------------------------------------------------------- the dialogue

class Script:
    """A policy that writes given turns: on_turn is called as the engine would call it."""

    def __init__(self, policy, dialogue, question):
        self.policy, self.dialogue = policy, dialogue
        (self.trace,) = dialogue.start(policy, question, 1)

    def say(self, text, truncated=False):
        end = [] if truncated else [self.policy.tokenizer.eos_token_id]
        ids = self.policy.encode(text) + end
        self.trace.ids += ids
        self.trace.sampled += [True] * len(ids)
        self.trace.log_probs += [-1.0] * len(ids)
        chunk = self.dialogue.on_turn(self.policy, self.trace, truncated)
        if chunk:
            self.trace.add(chunk)
        return self.policy.decode(chunk.ids) if chunk else None


@pytest.fixture
def question():
    image = Image.new("RGB", (256, 256), "grey")
    ImageDraw.Draw(image).rectangle((100, 100, 120, 120), fill="red")
    return Question("Which?", [image], "red")


def zooming(x, y):
    return f"<think>Here ({x}, {y}).</think>\n{format_call((x, y))}"


def test_a_dialogue_with_a_zoom_call(policy, question):
    """Guards the way of a dialogue: a zoom call is answered with the window of the original, an
    answer ends it."""
    script = Script(policy, TINY, question)
    reply = script.say(zooming(27, 27))
    assert "<observation>" in reply and "</observation>" in reply
    assert reply.count("<|image_pad|>") == 16
    assert script.trace.turns[0].crop == (76, 76, 140, 140)
    assert script.say("<think>Red.</think><answer>red</answer>") is None
    assert script.trace.ended == "answer" and script.trace.answer == "red"
    assert script.trace.zoom_points == [(27, 27)]


def test_bad_calls_do_not_end_the_dialogue(policy, question):
    """Guards against a conversation left hanging: a bad call and a point outside are answered in
    words; the policy goes on."""
    script = Script(policy, TINY, question)
    assert "not valid JSON" in script.say("<think>a (1, 1)</think><tool_call>{</tool_call>")
    assert "outside" in script.say(zooming(900, 3))
    assert "<|image_pad|>" in script.say(zooming(3, 3)) and script.trace.zoom_points == [(3, 3)]


def test_after_the_last_call_the_answer_is_asked_for(policy, question):
    """Guards the bound on zoom calls: what is written for the policy is not marked as sampled, and
    the answer is still read."""
    script = Script(policy, replace(TINY, max_crops=2), question)
    assert script.say(zooming(1, 1)) and script.say(zooming(9, 9))
    reply = script.say(zooming(5, 5))
    assert reply.endswith(TINY.forced_answer) and TINY.no_calls_left in reply
    assert script.say("red</answer>") is None
    trace = script.trace
    assert trace.ended == "forced" and trace.answer == "red" and trace.turns[-1].forced
    assert len(trace.zoom_points) == 2
    pairs = zip(trace.ids, trace.sampled, strict=True)
    written = policy.decode([token for token, sampled in pairs if not sampled])
    assert TINY.no_calls_left in written and "red" not in written and "Here" not in written


@pytest.mark.parametrize("text, truncated, ended", [
    ("<think>a</think>", False, "stopped"), ("<think>a", True, "truncated")])
def test_how_a_trace_can_end(policy, question, text, truncated, ended):
    """Guards the reasons to end, which decide what is left out of the loss."""
    script = Script(policy, TINY, question)
    assert script.say(text, truncated) is None and script.trace.ended == ended


def test_an_observation_that_does_not_fit_ends_the_trace(policy, question, monkeypatch):
    """Guards the bound on tokens: a trace whose crop would pass it ends as "truncated", not without
    a reason."""
    policy.end_tokens = set(range(policy.text_config.vocab_size))    # every token ends a turn ...

    def on_turn(dialogue, policy, trace, truncated):                 # ... with a zoom call
        trace.turns.append(parse_turn(zooming(5, 5)))
        return dialogue.answer_call(policy, trace, trace.turns[-1])
    monkeypatch.setattr(Dialogue, "on_turn", on_turn)
    limits = dict(turn_tokens=9, response_tokens=40)
    for (trace,) in rollout(policy, [question], TINY, 1, [0], **limits):
        assert trace.ended == "truncated" and len(trace.ids) <= 40


def test_without_the_tool_the_answer_is_asked_for_at_once(policy, question):
    """Guards --no-tool: no zoom call is possible."""
    script = Script(policy, replace(TINY, tool=False), question)
    assert policy.decode(script.trace.prompt.ids).endswith(TINY.forced_answer)
    assert script.say("red</answer>") is None and script.trace.answer == "red"
    assert script.trace.ended == "forced"


def test_traces_of_a_question_share_their_crops(policy, question):
    """Guards the time and memory of crops: a window is encoded once a question; and, where a dot
    marks the point, two points whose windows are one get a crop each."""
    for dot, pictures in ((False, 1), (True, 2)):
        dialogue = replace(TINY, crop_dot=dot)
        traces = dialogue.start(policy, question, 3)
        shown = []
        for trace, x in zip(traces, (1, 1, 2), strict=True):        # at the border: one window
            trace.ids += policy.encode(zooming(x, 1))
            shown += dialogue.on_turn(policy, trace, False).pictures
        assert len({trace.turns[0].crop for trace in traces}) == 1
        assert len({id(picture) for picture in shown}) == pictures
        assert not dialogue.start(policy, question, 1)[0].crops


@pytest.mark.parametrize("mode", MODES)
def test_rollouts_of_every_mode(policy, question, mode):
    """Guards all modes end to end with the real engine: every trace ends for a reason, within its
    bounds."""
    dialogue = replace(TINY, mode=mode)
    limits = dict(turn_tokens=12, response_tokens=90)
    groups = list(rollout(policy, [question] * 3, dialogue, 2, range(3), **limits))
    assert [len(group) for group in groups] == [2, 2, 2]
    for trace in sum(groups, []):
        assert trace.ended in ("answer", "forced", "truncated", "stopped") and trace.turns
        assert len(trace.ids) <= 90
        assert isinstance(trace, Trace) and trace.mode == mode
        pairs = zip(trace.ids, trace.sampled, strict=True)
        assert policy.image_token not in [token for token, sampled in pairs if sampled]


def test_a_trace_does_not_depend_on_what_runs_beside_it(policy):
    """Guards random numbers that belong to questions: whichever others are asked, in whatever
    order, and however many run at a time, a question with its seed gets the same traces, token by
    token; with another seed it gets others."""
    questions = [toy("toy-search", "train", 0, i) for i in range(5)]

    def traces(numbers, seed="a", **limits):
        numbers = list(numbers)
        seeds = [f"{seed} {i}" for i in numbers]
        groups = rollout(policy, [questions[i] for i in numbers], TINY, 3, seeds, turn_tokens=12,
                         response_tokens=90, **limits)
        return {questions.index(group[0].question): group for group in groups}

    together = traces(range(5))
    for others in (traces(reversed(range(5))), traces([3]), traces([1, 4, 0], cache_tokens=1),
                   traces(range(5), cache_tokens=900)):
        for number, group in others.items():
            for trace, same in zip(group, together[number], strict=True):
                assert trace.ids == same.ids and trace.sampled == same.sampled
                assert trace.log_probs == pytest.approx(same.log_probs, abs=1e-5)
    tokens = {number: [trace.ids for trace in group] for number, group in together.items()}
    for ids in tokens.values():
        assert len(set(map(tuple, ids))) == 3                  # the traces of a group differ
    for number, group in traces(range(5), "b").items():
        assert [trace.ids for trace in group] != tokens[number]


# ----------------------------------------------------------------------------- the dialogue's parts

def asked(policy, dialogue, question):
    """The prompt of a question, as text."""
    return policy.decode(dialogue.prompt(policy, question)[0].ids)


def write_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_which_part_of_a_dialogue_counts(policy, question, tmp_path):
    """Guards whose wording counts, from the least to the most: the settings' defaults, the
    checkpoint's dialogue.json, --dialogue FILE, flags; and that a part leaves the others as they
    were."""
    theirs = replace(TINY, crop_half=7, crop_size=48, max_crops=2, before_crop="Theirs: ")
    write_json(tmp_path / "dialogue.json", theirs.to_json())
    mine = write_json(tmp_path / "mine.json", {"crop_size": 40, "max_crops": 3, "hints": False})

    def made(checkpoint="", **given):
        config = make_config(given, "drawn", "evaluate")
        return make_dialogue(config, checkpoint, policy)

    assert made().system_prompts == SYSTEM_PROMPTS and made().crop_half == Config.crop_half
    assert made(str(tmp_path)).to_json() == theirs.to_json()
    changed = made(str(tmp_path), dialogue=mine, max_crops=9)
    expected = replace(theirs, crop_size=40, max_crops=9, hints=False)
    assert changed.to_json() == expected.to_json()
    assert made(mode="think").mode == "think" and not made(tool=False).tool
    assert "Zoom." in asked(policy, made(str(tmp_path)), question)
    assert "search_coordinate" in asked(policy, made(), question)


def test_a_dialogue_is_kept_as_it_is(tmp_path, policy):
    """Guards dialogue.json: what is written is read; mode and tool are the run's."""
    dialogue = Dialogue("think", False, {"think": "Ünd?"}, "a", "b", "c", "d", "e", False,
                        "unrounded", 9, 8, True, 1)
    policy.save(tmp_path / "kept", dialogue=dialogue.to_json())
    config = make_config({"mode": "think", "tool": False}, "drawn", "evaluate")
    assert make_dialogue(config, str(tmp_path / "kept"), policy) == dialogue
    assert not {"mode", "tool"} & set(dialogue.to_json())


@pytest.mark.parametrize("text", [
    "", "{", "[1, 2]", "null", "3", '{"crop": 3}', '{"mode": "think"}', '{"hints": 1}',
    '{"crop_half": "32"}', '{"crop_half": true}', '{"crop_half": 32.5}', '{"coordinates": "px"}',
    '{"coordinates": 5}', '{"system_prompts": "Look."}', '{"system_prompts": {"zoom": 3}}',
    '{"system_prompts": {"look": "Look."}}', '{"crop_half": 0}', '{"crop_size": -5}',
    '{"max_crops": -1}'])
def test_a_broken_part_of_a_dialogue_is_told_in_a_line(script, tiny_folder, tmp_path, text):
    """Guards --dialogue: a misspelt part was passed over without a word, and a part of another type
    ended in a traceback."""
    path = write_json(tmp_path / "mine.json", text)
    flags = ["--model", tiny_folder, "--n", 1, "--turn-tokens", 2]
    _, err = script("evaluate", *flags, "--dialogue", path, code=2)
    assert err.startswith(f"error: {path}: ") and err.count("\n") == 1
    _, err = script("evaluate", *flags, "--dialogue", "none.json", code=2)
    assert err.startswith("error: none.json: ") and err.count("\n") == 1


def test_evaluation_asks_as_the_checkpoint_was_trained(script, tiny_folder, tmp_path, monkeypatch):
    """Guards evaluate.py: a checkpoint's own dialogue.json was not read, or its parts were lost by
    --dialogue."""
    prompt, lock, asked = Dialogue.prompt, Lock(), []

    def noted(dialogue, policy, question):
        chunk, frames = prompt(dialogue, policy, question)
        with lock:
            asked.append((dialogue, policy.decode(chunk.ids)))
        return chunk, frames
    monkeypatch.setattr(Dialogue, "prompt", noted)
    mine = write_json(tmp_path / "mine.json", {"max_crops": 2, "crop_half": 5})
    flags = ["--n", 1, "--turn-tokens", 2, "--response-tokens", 4]
    script("evaluate", "--model", tiny_folder, *flags, "--dialogue", mine, "--crop-half", 9)
    assert {dialogue.tool for dialogue, _ in asked} == {True, False}
    for dialogue, text in asked:
        assert dialogue.to_json() == replace(TINY, max_crops=2, crop_half=9).to_json()
        assert "Zoom." in text and "search_coordinate" not in text


SAYS_IT = ("Which?\n(A) red\n(B) blue\n"
           "Answer with the option's letter from the given choices directly.")
WAY = "Question: Which way?\nAnswer Choices:\nA. Yes, left\nB. No"


@pytest.mark.parametrize("kind, text, hint", [
    ("point", "Description: the search button", "one point (x, y)"),
    ("point", "Pinpoint several points on the table.", "one point (x, y)"),
    ("point", "Where is it? Answer as [x, y].", None),
    ("point", "Where is it? Write <answer> (x,y) </answer>.", None),
    ("choice", WAY, "letter or the text"),
    ("choice", WAY + "\nAnswer with the text of the option.", None),
    ("choice", "Which letter is on the sign?\n(A) B\n(B) A\nSelect from the following choices.",
     "letter or the text"),
    ("choice", SAYS_IT, None),
    ("action", "OBJECTIVE: buy it\n\nPREVIOUS ACTIONS:\n1. click [3]\n\nIMAGE:",
     "tab_focus [0], close_tab"),
    ("action", "OBJECTIVE: buy it\nELEMENTS:\n<answer> click [id], stop [answer]", "scroll [down]"),
    ("string", "Which? Answer in a word.", None),
])
def test_rows_that_do_not_say_what_is_wanted_get_a_hint(policy, question, kind, text, hint):
    """Guards real rows ("Description: ...") against answers of the wrong sort; no hint twice, and
    none for a checkpoint that was trained without."""
    question.text, question.kind, question.hint = text, kind, hint_for(kind, text)
    said = asked(policy, TINY, question)
    assert text in said
    assert hint in said if hint else "The answer is" not in said
    assert "The answer is" not in asked(policy, replace(TINY, hints=False), question)


def test_drawn_questions_are_asked_as_before(policy):
    """Guards trained tiny checkpoints: the tokens of a drawn question's prompt are its text and the
    images, nothing else."""
    drawn = toy("toy-search", "test", 0, 0)
    content = [{"type": "image"}, {"type": "text", "text": drawn.text}]
    messages = [{"role": "system", "content": TINY.system_prompts["zoom"]},
                {"role": "user", "content": content}]
    chunk = policy.prompt(messages, drawn.load())
    assert TINY.prompt(policy, drawn)[0].ids == chunk.ids


# ------------------------------------------------------------------------------------------- images

def test_a_photograph_is_turned_upright(tmp_path):
    """Guards EXIF orientation: a point is meant in the image as a person sees it."""
    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (0, 0, 100, 50))                        # top left in the file
    exif = Image.Exif()
    exif[0x0112] = 6                                           # to be turned a quarter clockwise
    image.save(tmp_path / "photo.jpg", exif=exif)
    (upright,) = Question("?", [tmp_path / "photo.jpg"], "").load()
    assert upright.size == (200, 400)
    red, green, _ = upright.getpixel((175, 50))                # top right as a person sees it
    assert red > 200 and green < 60 and upright.getpixel((25, 50)) == (255, 255, 255)


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    """Guards reading: missing, no image, huge, very thin: one line that names file and row."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    big, thin = tmp_path / "big.png", tmp_path / "thin.png"
    Image.new("1", (400, 400)).save(big)
    Image.new("1", (900, 3)).save(thin)
    monkeypatch.setattr(rollout_module, "MAX_IMAGE_PIXELS", 10_000)
    for path, word in ((tmp_path / "none.png", "no such"), (text, "cannot be read"),
                       (big, "scale it down"), (thin, "thin")):
        with pytest.raises(UserError, match=word) as error:
            read_image(path, "rows.jsonl, line 7")
        told = str(error.value)
        assert str(path) in told and "line 7" in told and "\n" not in told
