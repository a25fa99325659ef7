"""What rollout.py promises about coordinates, the zoom tool and the dialogue."""
import pytest
from PIL import Image, ImageDraw

from evaluate import toy_search
from model import UserError
from rollout import (FORCED_ANSWER, MODES, Dialogue, Frame, Question, ToolError, call_text, parse_call, parse_points, parse_turn,
                     read_image, rollout, window, zoom)
import rollout as rollout_module


@pytest.mark.parametrize("text, points", [
    ("the cup (12, 40).", [(12, 40)]), ("[12,40]", [(12, 40)]), ("at ( 12.5 , 40 ) and (-3, 7)", [(12.5, 40), (-3, 7)]),
    ("(1, 2, 3, 4) (a, b) (1 2)", []), ("(999999999, 2)", [(999999999, 2)]), ("(1,\n2)", [(1, 2)]), ("", []),
])
def test_points_in_text(text, points):
    """Guards parsing: decimals, negatives, brackets and inner blanks are points; boxes are not."""
    assert parse_points(text) == points


def test_frames_convert_between_seen_and_original():
    """Guards the one place of conversion, and that the border is outside."""
    frame = Frame((64, 32), (640, 640))
    assert frame.to_original((32, 16)) == (320, 320) and frame.to_seen((320, 320)) == (32, 16)
    assert frame.inside((0, 0)) and frame.inside((63.9, 31.9)) and not frame.inside((64, 5)) and not frame.inside((-1, 5))


@pytest.mark.parametrize("point", [(0, 0), (299, 199), (150, 100), (299, 0)])
def test_the_window_at_a_border_is_moved_and_not_stretched(point):
    """Guards close-ups near a border: the same size everywhere, inside the image, with the point in them."""
    left, top, right, bottom = window((300, 200), point, 40)
    assert right - left == bottom - top == 80 and 0 <= left and 0 <= top and right <= 300 and bottom <= 200
    assert left <= point[0] <= right and top <= point[1] <= bottom


def test_a_window_larger_than_the_image():
    """Guards small images: the largest square there is."""
    assert window((100, 30), (90, 5), 50) == (70, 0, 100, 30)


def test_zoom_adds_real_detail():
    """Guards against crops of the down-scaled image: one dark px of the original must be visible in the close-up."""
    image = Image.new("RGB", (2000, 2000), "white")
    image.putpixel((1500, 300), (0, 0, 0))
    crop = zoom(image, (1500, 300), 10, 200)
    assert crop.size == (200, 200) and min(crop.convert("L").tobytes()) < 60
    dotted = zoom(image, (1500, 300), 10, 200, dot=True)
    assert dotted.getpixel((100, 100)) == (255, 0, 0)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"name": "other", "arguments": {"coordinate": [1, 2]}}',
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


def test_a_turn_keeps_thought_and_answer():
    """Guards against a step with a thought and an answer losing its thought, and against points outside the thought."""
    turn = parse_turn("<think>The cup at (3, 4).</think>\n<answer>\na red\ncup (9, 9)</answer>")
    assert (turn.thought, turn.points, turn.answer, turn.call) == ("The cup at (3, 4).", [(3, 4)], "a red\ncup (9, 9)", None)
    call = parse_turn("<think>x (3, 4)</think>" + call_text((5, 6)))
    assert call.call == (5, 6) and call.answer is None
    assert parse_turn("<tool_call>{").error and parse_turn("<answer>").answer is None
    parse_turn("<think>" * 50_000 + "<tool_call>" * 50_000)        # linear time


class Script:
    """A policy that writes given turns: on_turn is called as the engine would call it."""

    def __init__(self, policy, dialogue, question):
        self.policy, self.dialogue = policy, dialogue
        (self.trace,) = dialogue.start(policy, question, 1)

    def say(self, text, cut=False):
        ids = self.policy.encode(text) + ([] if cut else [self.policy.tokenizer.eos_token_id])
        self.trace.ids += ids
        self.trace.sampled += [True] * len(ids)
        self.trace.log_probs += [-1.0] * len(ids)
        chunk = self.dialogue.on_turn(self.policy, self.trace, cut)
        if chunk:
            self.trace.add(chunk)
        return self.policy.decode(chunk.ids) if chunk else None


@pytest.fixture
def question():
    image = Image.new("RGB", (256, 256), "grey")
    ImageDraw.Draw(image).rectangle((100, 100, 120, 120), fill="red")
    return Question("Which?", [image], "red")


def look(x, y):
    return f"<think>Here ({x}, {y}).</think>\n{call_text((x, y))}"


def test_a_dialogue_with_a_look(policy, question):
    """Guards the way of a dialogue: a look is answered with the window of the original, an answer ends it."""
    script = Script(policy, Dialogue(), question)
    reply = script.say(look(27, 27))
    assert "<observation>" in reply and "</observation>" in reply and reply.count("<|image_pad|>") == 16
    assert script.trace.turns[0].crop == (76, 76, 140, 140)
    assert script.say("<think>Red.</think><answer>red</answer>") is None
    assert script.trace.ended == "answer" and script.trace.answer == "red" and script.trace.crops == [(27, 27)]


def test_bad_calls_do_not_end_the_dialogue(policy, question):
    """Guards against a conversation left hanging: a bad call and a point outside are answered in words; the policy goes on."""
    script = Script(policy, Dialogue(), question)
    assert "not valid JSON" in script.say("<think>a (1, 1)</think><tool_call>{</tool_call>")
    assert "outside" in script.say(look(900, 3))
    assert "<|image_pad|>" in script.say(look(3, 3)) and script.trace.crops == [(3, 3)]


def test_after_the_last_look_the_answer_is_asked_for(policy, question):
    """Guards the bound on looks: what is written for the policy is not marked as sampled, and the answer is still read."""
    script = Script(policy, Dialogue(max_crops=2), question)
    assert script.say(look(1, 1)) and script.say(look(9, 9))
    reply = script.say(look(5, 5))
    assert reply.endswith(FORCED_ANSWER) and "no looks left" in reply
    assert script.say("red</answer>") is None
    trace = script.trace
    assert trace.ended == "forced" and trace.answer == "red" and trace.turns[-1].forced and len(trace.crops) == 2
    written = policy.decode([t for t, sampled in zip(trace.ids, trace.sampled) if not sampled])
    assert "no looks left" in written and "red" not in written and "Here" not in written


@pytest.mark.parametrize("text, cut, ended", [("<think>a</think>", False, "stopped"), ("<think>a", True, "length")])
def test_how_a_trace_can_end(policy, question, text, cut, ended):
    """Guards the reasons to end, which decide what is left out of the loss."""
    script = Script(policy, Dialogue(), question)
    assert script.say(text, cut) is None and script.trace.ended == ended


def test_an_observation_that_does_not_fit_ends_the_trace(policy, question):
    """Guards the bound on tokens: a trace whose close-up would pass it ends as "length", not without a reason."""
    policy.end_tokens = set(range(policy.text_config.vocab_size))             # every token ends a turn ...
    dialogue = Dialogue()
    def on_turn(policy, trace, cut):                                           # ... with a look
        trace.turns.append(parse_turn(look(5, 5)))
        return dialogue.look(policy, trace, trace.turns[-1])
    dialogue.on_turn = on_turn
    for (trace,) in rollout(policy, [question], dialogue, 1, [0], turn_tokens=9, response_tokens=40):
        assert trace.ended == "length" and len(trace.ids) <= 40


def test_without_the_tool_the_answer_is_asked_for_at_once(policy, question):
    """Guards --no-tool: no look is possible."""
    script = Script(policy, Dialogue(tool=False), question)
    assert policy.decode(script.trace.prompt.ids).endswith(FORCED_ANSWER)
    assert script.say("red</answer>") is None and script.trace.answer == "red" and script.trace.ended == "forced"


@pytest.mark.parametrize("mode", MODES)
def test_roll_outs_of_every_mode(policy, question, mode):
    """Guards all modes end to end with the real engine: every trace ends for a reason, within its bounds."""
    groups = list(rollout(policy, [question] * 3, Dialogue(mode), 2, range(3), turn_tokens=12, response_tokens=90))
    assert len(groups) == 3
    for trace in (t for g in groups for t in g):
        assert trace.ended in ("answer", "forced", "length", "stopped") and len(trace.ids) <= 90 and trace.turns
        assert all(not sampled or t not in (policy.image_token,) for t, sampled in zip(trace.ids, trace.sampled))


def test_a_trace_does_not_depend_on_what_runs_beside_it(policy):
    """Guards random numbers that belong to questions: whichever others are asked, in whatever order, and however many run at a
    time, a question with its seed gets the same traces, token by token; with another seed it gets others."""
    questions = [toy_search("train", 0, i) for i in range(5)]
    def traces(numbers, seed="a", **limits):
        seeds = [f"{seed} {i}" for i in numbers]
        groups = rollout(policy, [questions[i] for i in numbers], Dialogue(), 3, seeds, turn_tokens=12, response_tokens=90, **limits)
        return {questions.index(group[0].question): group for group in groups}
    together = traces(range(5))
    for others in (traces(reversed(range(5))), traces([3]), traces([1, 4, 0], cache_tokens=1), traces(range(5), cache_tokens=900)):
        for number, group in others.items():
            for trace, same in zip(group, together[number], strict=True):
                assert trace.ids == same.ids and trace.sampled == same.sampled
                assert trace.log_probs == pytest.approx(same.log_probs, abs=1e-5)
    tokens = {number: [t.ids for t in group] for number, group in together.items()}
    assert all(len(set(map(tuple, ids))) == 3 for ids in tokens.values())              # the traces of a group differ
    assert all([t.ids for t in group] != tokens[number] for number, group in traces(range(5), "b").items())


def test_system_prompts(policy, question):
    """Guards whose system prompt counts: the flag's, else the checkpoint's, else the mode's."""
    def begins(dialogue):
        return policy.decode(dialogue.prompt(policy, question)[0].ids)
    assert "Zoom." in begins(Dialogue()) and "Mine." in begins(Dialogue(system_prompt="Mine."))
    policy.system_prompts = {}
    assert "search_coordinate" in begins(Dialogue())


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    """Guards reading: missing, no image, huge, very thin: one line that names file and row."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    big, thin = tmp_path / "big.png", tmp_path / "thin.png"
    Image.new("1", (400, 400)).save(big)
    Image.new("1", (900, 3)).save(thin)
    monkeypatch.setattr(rollout_module, "MAX_IMAGE_PIXELS", 10_000)
    for path, word in ((tmp_path / "none.png", "no such"), (text, "cannot be read"), (big, "scale it down"), (thin, "thin")):
        with pytest.raises(UserError, match=word) as error:
            read_image(path, "rows.jsonl, line 7")
        assert str(path) in str(error.value) and "line 7" in str(error.value) and "\n" not in str(error.value)


SAYS_IT = "Which?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize("kind, text, hint", [
    ("point", "Description: the search button", "one point (x, y)"),
    ("point", "Pinpoint several points on the table.", "one point (x, y)"),
    ("point", "Where is it? Answer as [x, y].", None),
    ("point", "Where is it? Write <answer> (x,y) </answer>.", None),
    ("choice", "Question: Which way?\nAnswer Choices:\nA. Yes, left\nB. No", "letter or the text"),
    ("choice", "Question: Which way?\nAnswer Choices:\nA. Yes, left\nB. No\nAnswer with the text of the option.", None),
    ("choice", "Which letter is on the sign?\n(A) B\n(B) A\nSelect from the following choices.", "letter or the text"),
    ("choice", SAYS_IT, None),
    ("action", "OBJECTIVE: buy it\n\nPREVIOUS ACTIONS:\n1. click [3]\n\nIMAGE:", "tab_focus [0], close_tab"),
    ("action", "OBJECTIVE: buy it\nELEMENTS:\n<answer> click [id], stop [answer]", "scroll [down]"),
    ("string", "Which? Answer in a word.", None),
])
def test_rows_that_do_not_say_what_is_wanted_get_a_hint(policy, question, kind, text, hint):
    """Guards real rows ("Description: ...") against answers of the wrong sort; no hint twice, and none for drawn questions."""
    question.text, question.kind = text, kind
    asked = policy.decode(Dialogue().prompt(policy, question)[0].ids)
    assert text in asked and (hint in asked if hint else "The answer is" not in asked)


def test_drawn_questions_are_asked_as_before(policy):
    """Guards trained tiny checkpoints: the tokens of a drawn question's prompt are its text and the images, nothing else."""
    drawn = toy_search("test", 0, 0)
    content = [{"type": "image"}, {"type": "text", "text": drawn.text}]
    messages = [{"role": "system", "content": policy.system_prompts["zoom"]}, {"role": "user", "content": content}]
    assert Dialogue().prompt(policy, drawn)[0].ids == policy.prompt(messages, drawn.load()).ids
