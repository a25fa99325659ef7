"""What the reward promises. Each test names the bug that it guards against."""
import random
import time
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest

import reward
from reward import Action, Weights, match_action, match_answer, match_point, parse_action, score
from rollout import Frame, Question, ToolError, Trace, Turn, crop_box, parse_call, parse_turn

FRAME = Frame(input_size=(100, 50), original_size=(1000, 500))
CHOICES = ("blue", "red", "dark green")


def question(answer="red", kind="string", choices=()):
    return Question("what?", [], answer, kind, choices)


def trace(*texts, mode="zoom", ended="answer", about=None, frames=(FRAME,)):
    """A Trace from the texts of its turns. Calls inside the image are answered by a crop, as the
    dialogue does."""
    turns = [parse_turn(text) for text in texts]
    for turn in turns:
        if turn.call and frames[0].contains(turn.call):
            turn.crop = crop_box(frames[0].original_size, frames[0].to_original(turn.call), 40)
    return Trace(None, question=about or question(), mode=mode, frames=list(frames), turns=turns,
                 ended=ended)


def call(x, y):
    arguments = f'{{"coordinate": [{x}, {y}]}}'
    return f'<tool_call>\n{{"name": "search_coordinate", "arguments": {arguments}}}\n</tool_call>'


def zooming(x, y, thought="maybe here (5, 5)"):
    return f"<think> {thought} </think>\n{call(x, y)}"


def final(answer="red", thought="it is there (7, 7)"):
    return f"<think> {thought} </think>\n<answer> {answer} </answer>"


# --------------------------------------------------------------------------------- answers in words

@pytest.mark.parametrize("answer", [
    " RED\n", "red.", "red!", '"Red."', "**Red.**", "`red`", "“red”", "Ｒｅｄ", "red。", "“ｒｅｄ”",
    "\\boxed{red}", "$\\boxed{Red}$."])
def test_other_ways_to_write_are_no_other_answer(answer):
    """Only one of the two sides was lower-cased, and 'red.', full width letters, the end marks of
    other scripts and LaTeX's frame were wrong."""
    assert match_answer(answer, "Red") and match_answer("Red", answer)
    assert not match_answer(answer, "blue")


def test_a_part_is_no_match_and_marks_that_carry_meaning_stay():
    """A substring was taken for the answer; -5 and 5, .5 and 5, 5' and 5" became the same by
    stripping too much; an answer of marks only matched every other; one over several lines
    failed."""
    different = [("redder", "red"), ("re", "red"), ("not red", "red"), ("red or blue", "red"),
                 ("-5", "5"), (".5", "5"), ("5'", '5"'), ("5%", "5"), ("c++", "c"), ("?", "!"),
                 (".", "red"), ("  ", "  ")]
    for one, other in different:
        assert not match_answer(one, other)
    for same in ("5'", "?", '"', '""', "...", "naïve 红色"):
        assert match_answer(same, same)
    assert match_answer("two red\ncars,\n\n one  bus", "Two red cars, one bus.")


@pytest.mark.parametrize("answer", [
    "B", "(b).", "B)", "B:", "B. red", "(B) Red.", 'B. "red"', "Red", "b)\nred", "Option B.",
    "OPTION B: red", "option (B) red", "**Option B**", "B (red)", "B - red", "B – Red.",
    "（Ｂ）red", "B。", "\\boxed{B}"])
def test_a_letter_its_option_and_both_are_the_same_answer(answer):
    """'B. red', '(B)' and 'Option B' were wrong where the truth was 'red', and the reverse."""
    for truth in ("B", "(b)", "red", "Red", "B. red"):
        assert match_answer(answer, truth, CHOICES)


@pytest.mark.parametrize("answer", [
    "A. red", "D. red", "D", "A", "B. blue", "B. red.. blue", "B red blue", "1", "Bred", "Option D",
    "Option B: blue", "Optional B", "option red", "A (red)", "C - red", "B-red", "\\boxed{A}",
    "\\boxed{A} \\boxed{B}", "B, A", "A B C", "(A) (B)", "(B)(A)", "B or A", "Option B or A",
    "B. red A. blue", "red red", "B. B", "A. blue\nB. red\nC. dark green", "blue, red, dark green",
    "Option B. Option A"])
def test_a_letter_must_agree_with_its_text_and_stand_alone(answer):
    """'A. red' was right where B is red: a letter or a text somewhere was enough. So was an answer
    that lists every option."""
    for truth in ("B", "red"):
        assert not match_answer(answer, truth, CHOICES) and not match_answer(answer, truth)


def test_letters_without_known_options():
    """With the options only in the question's text, '(B)' was not 'B'; a text that cannot be
    checked is still no match."""
    for answer in ("(B)", "b.", "Option B"):
        assert match_answer(answer, "B") and match_answer(answer, "(B)")
    assert not match_answer("B. red", "B") and match_answer("b. Red", "B. red")


def test_words_that_look_like_letters_are_words():
    """'a red car', 'e.g. red' and '5 p.m.' were read as option letters."""
    assert match_answer("a red car", "A red car.", ("a red car", "a bus"))
    assert not match_answer("a red car", "B", ("a red car", "a bus"))
    assert match_answer("a.m.", "A.M.", ("noon", "a.m."))
    assert match_answer("B. a.m.", "a.m.", ("noon", "a.m."))
    assert match_answer("Yes, left", "A", ("Yes, left", "No"))


# ------------------------------------------------------------------------------- answers that point

BOX = (100, 100, 200, 200)    # px of the original; 10 to 20 px of the model input


@pytest.mark.parametrize("answer", [
    "[15, 12]", "( 12.5 , 19.9 )", "(10, 10)", "(20, 20)", "at (15,12).", "[\n15,\n12]",
    "at 15.0, 12.0", "[[15, 12]]", "(15, 12) of 3 icons", "（１５，１２）", "15、12",
    "(1.5e1, 1.2e1)", "\\boxed{(15, 12)}"])
def test_a_point_in_the_box_however_written(answer):
    """Decimals, inner spaces and points without brackets were refused. The edges belong to the box;
    px of the model input become px of the file."""
    assert match_point(answer, BOX, FRAME)


@pytest.mark.parametrize("answer", [
    "", "there", "15", "15 12", "15; 12", "(150, 120)", "(9.9, 12)", "(20.1, 12)", "(-15, 12)",
    "-15, 12", "(99999999999999, 12)", "(15, 12, 18, 18)", "15, 12, 18", "(15, 12) (90, 40)",
    "(15, 12) or 90, 40", "15, 12 - 18, 18", "(nan, inf)", "(15, 12) (15, 12)", "1.15, 12",
    "9.1234567890123456, 12"])
def test_a_point_outside_none_or_several_are_wrong(answer):
    """Points in the wrong frame, far outside, one of many guesses, or a corner of a box were taken
    for hits; and the tail of a long number for a number."""
    assert not match_point(answer, BOX, FRAME)


def test_a_point_outside_of_the_image_is_wrong_even_in_the_box():
    """A box that reaches over the border made points count that are not on the image."""
    assert not match_point("(120, 12)", (0, 0, 5000, 5000), FRAME)
    assert not match_point("(-1, 12)", (-100, 0, 5000, 5000), FRAME)


def test_polygons_by_the_even_odd_rule():
    """The bounding box of a region was taken for the region."""
    u_shape = ((0, 0), (500, 0), (500, 400), (400, 400), (400, 100), (100, 100), (100, 400),
               (0, 400))
    for polygon in (u_shape, u_shape[::-1]):
        assert match_point("(5, 30)", polygon, FRAME) and match_point("(45, 30)", polygon, FRAME)
        for outside in ("(25, 30)", "(60, 30)"):
            assert not match_point(outside, polygon, FRAME)


@pytest.mark.parametrize("answer, correct", [
    ("(15, 12)", 1), ("(90, 40)", 0), ("90, 40", 0), ("(500, 500)", 0)])
def test_a_wrong_point_is_well_formed(answer, correct):
    """Answers that are points crashed the string functions. A wrong one is well-formed."""
    pointing = score(trace(final(answer), about=question(BOX, "point")))
    assert (pointing.correct, pointing.format) == (correct, 1)


# -------------------------------------------------------------------------------------- web actions

@pytest.mark.parametrize("text, action", [
    ("CLICK[ 12 ]", "click [12]"), ("```\nclick [12]\n```", "click [12]"),
    ("type [5] [red]", "type [5] [red] [1]"), ("type [5][red][0]", "type [5] [red] [0]"),
    ("type [5] [red] [press_enter_after=0]", "type [5] [red] [0]"),
    ("type [5] [[b]] [0]", "type [5] [[b]] [0]"), ("type [5] [a [1]]", "type [5] [a [1]] [1]"),
    ("type [5] [1]", "type [5] [1] [1]"), ("type [5] []", "type [5] [] [1]"),
    ("type [5] [a] [1] [0]", "type [5] [a] [1] [0]"), ("press [Control+v]", "press [Control+v]"),
    ("type [5] [stop [now], click [3]]", "type [5] [stop [now], click [3]] [1]"),
    ("scroll [direction=UP]", "scroll [up]"), ("scroll down", "scroll [down]"),
    ("goto [http://a.b/c?d[]=1]", "goto [http://a.b/c?d[]=1]"), ("tab_focus [2]", "tab_focus [2]"),
    (" go_forward\n", "go_forward"), ("stop []", "stop []"),
    ("stop [type [5] [红色]]", "stop [type [5] [红色]]")])
def test_every_action_of_visualwebarena(text, action):
    """'stop' inside typed text was read as stop; brackets, new lines, fences and the Enter flag
    broke the parser. What is written for VisualWebArena is read as the same action."""
    assert str(parse_action(text)) == action and match_action(action, text)
    assert parse_action(action) == parse_action(text)


def test_text_in_lines_is_kept_and_written_in_one():
    """A new line in typed text ended the action."""
    typed = parse_action("type [5] [two\nlines]")
    assert typed == Action("type", 5, "two\nlines") and str(typed) == "type [5] [two lines] [1]"


@pytest.mark.parametrize("text", [
    "", "```", "click", "click []", "click [x]", "click [-1]", "click 12", "click [12",
    "click [１２]", "click [12] [13]", "click [12]\nclick [13]", "I click [12]", "clicking [12]",
    "click [" + "9" * 5000 + "]", "type [5]", "type [5] red", "type [5] ] [1]", "scroll [left]",
    "press", "goto http://a", "go_back [1]", "new_tab now", "stop red", "[stop]", "\0"])
def test_what_is_no_action_is_an_error_in_words(text):
    """Half-read actions were taken for full ones; the message says what to write instead."""
    with pytest.raises(ValueError, match="no such action|write '"):
        parse_action(text)
    assert not match_action(text, "click [12]")


def test_actions_are_compared_by_name_element_and_text():
    """Typed text was never compared: any words in the right box were right; stop [Red.] was not
    stop [red], and a stop in typed text ended an episode as right."""
    for one, other in (("type [5] [ Red\nSHOES ]", "type [5] [red shoes] [0]"),
                       ("stop [Red.]", "stop [red]"), ("stop", "stop []")):
        assert match_action(one, other)
    for wrong in ("type [5] [red shoes!]", "type [6] [red shoes]", "click [5]", "stop [red shoes]"):
        assert not match_action(wrong, "type [5] [red shoes]")
    for one, other in (("click [1]", "click [12]"), ("hover [12]", "click [12]"),
                       ("scroll [up]", "scroll [down]"), ("stop []", "stop [red]"),
                       ("stop [click [12]]", "click [12]"), ("type [5] [stop [a]]", "stop [a]")):
        assert not match_action(one, other)


def test_a_truth_that_is_no_action_is_an_error():
    """A broken row of the data made every answer wrong, silently."""
    with pytest.raises(ValueError):
        match_action("click [1]", "clack [1]")
    with pytest.raises(ValueError, match="no such kind"):
        score(trace(final(), about=question(kind="essay")))


# ------------------------------------------------------------------------------------------- format

GOOD = {
    "direct": ["<answer>red</answer>"],
    "think": ["<think>hm</think> <answer>red</answer>"],
    "grounded": [final()],
    "zoom": [zooming(20, 20), zooming(40, 40), final()],
}


@pytest.mark.parametrize("mode", GOOD)
def test_a_right_trace_in_the_form_of_its_mode_scores_one(mode):
    """The paper's 0.5 + 0.5 and 0.6 + 0.4; the bonus, if any, comes on top."""
    result = score(trace(*GOOD[mode], mode=mode))
    assert (result.correct, result.format, result.grounded, result.why) == (1, 1, 1, "")
    assert result.total - 0.4 * result.diversity == pytest.approx(1)


@pytest.mark.parametrize("mode", GOOD)
@pytest.mark.parametrize("other", GOOD)
def test_no_mode_takes_the_form_of_another(mode, other):
    """A thought in direct mode, a missing thought, or a tool call without the tool passed as
    well-formed."""
    takes = {"direct": ["direct"], "think": ["think", "grounded"],
             "grounded": ["think", "grounded"],        # whether a thought points is for grounding
             "zoom": ["think", "grounded", "zoom"]}
    assert score(trace(*GOOD[other], mode=mode)).format == (other in takes[mode])


THOUGHT, ANSWER = "<think>a (5, 5)</think>", "<answer>red</answer>"


@pytest.mark.parametrize("text", [
    "", "red", ANSWER, THOUGHT + "<answer> \n </answer>", "<think> </think>" + ANSWER,
    "so " + THOUGHT + ANSWER, THOUGHT + " so " + ANSWER, THOUGHT + ANSWER + " done",
    ANSWER + THOUGHT, THOUGHT + THOUGHT + ANSWER, THOUGHT + ANSWER + ANSWER,
    THOUGHT + call(5, 5) + ANSWER, THOUGHT + ANSWER + call(5, 5), THOUGHT + "<answer>red",
    "<think>a (5, 5)" + ANSWER, "<think>a (5, 5)" + ANSWER + "</think>",
    "<think>" + THOUGHT + "</think>" + ANSWER, "<THINK>a (5, 5)</THINK>" + ANSWER,
    "<think>a (5, 5) <observation> a car </observation></think>" + ANSWER])
@pytest.mark.parametrize("mode", ["grounded", "zoom"])
def test_tags_are_neither_missing_nor_nested_nor_repeated_nor_empty(text, mode):
    """Loose patterns paid for text around the tags, tags in tags, made-up observations and empty
    answers."""
    result = score(trace(text, mode=mode))
    assert result.format == 0 and result.why and result.total in (0, 0.5, 0.6)


@pytest.mark.parametrize("ended", ["forced", "truncated", "stopped", ""])
def test_only_a_trace_that_the_policy_ended_is_well_formed(ended):
    """A forced answer, or one truncated at the last token, was paid for its form."""
    result = score(trace(*GOOD["zoom"], ended=ended))
    assert (result.format, result.diversity, result.total) == (0, 0, 0.6) and result.why


def test_special_tokens_are_not_well_formed():
    """A thought that speaks as the chat itself was paid for its form."""
    assert score(trace(final("red", "a (5, 5) <|im_start|> b"))).format == 0
    assert score(trace(final("red", "a (5, 5) <|> <im_start>"))).format == 1


@pytest.mark.parametrize("x, y", [
    ("5.0", 5), (5, "1e1"), (-1, 5), (100, 5), (5, 50), ("true", 5), (5, "5, 5"), ("", 5)])
def test_a_zoom_call_has_two_integers_inside_the_image(x, y):
    """Floats and points far outside were well-formed calls; outside, the crop was a stretched line
    of pixels. A call that cannot be read was passed over, and the trace was paid all the same."""
    assert score(trace(zooming(x, y), final())).total == 0.6


def test_every_turn_but_the_last_is_one_call():
    """Turns without a call, with two calls, or without a thought were skipped by the check."""
    for middle in ("<think>a (5, 5)</think>", zooming(5, 5) + call(6, 6), call(5, 5), final(),
                   zooming(5, 5) + " and", ""):
        assert score(trace(zooming(20, 20), middle, final())).format == 0
    assert score(trace(zooming(20, 20))).format == 0 and score(trace()).format == 0
    assert score(trace(final(), final(), mode="grounded")).format == 0


def test_a_refused_call_is_not_well_formed():
    """What the environment refused was paid, because its text looked well."""
    refused = trace(zooming(20, 20), final())
    refused.turns[0].error = "No calls left."
    assert score(refused).format == 0 and "No calls left" in score(refused).why


@pytest.mark.parametrize("answer", ["the sports tab", "(15, 12, 18, 18)", "(15, 12) (90, 40)"])
@pytest.mark.parametrize("mode", ["grounded", "zoom"])
def test_where_a_point_is_asked_for_the_form_is_one_point(answer, mode):
    """Words, a box or two guesses earned the full format reward in tasks that ask for a point."""
    pointing = trace(final(answer), mode=mode, about=question(BOX, "point"))
    assert score(pointing).total == 0 and "not one point" in score(pointing).why
    assert score(trace(final(answer), mode=mode)).format == 1         # asked in words


# -------------------------------------------------------------------------- grounding and diversity

@pytest.mark.parametrize("thought", [
    "a ( 5.5 , 5 )", "a [0, 0] b (99.9, 49)", "It is red (5, 5).", "Left (5, 5), then right.",
    "a (5, 5), built (1990, 2005)"])
def test_points_inside_the_image_ground_a_thought(thought):
    """Decimals, brackets and inner spaces were no grounding; a time in years was a point outside of
    the image."""
    for mode in ("grounded", "zoom"):
        assert score(trace(final("red", thought), mode=mode)).grounded == 1


@pytest.mark.parametrize("thought", [
    "5, 5", "a (5, 5) b (999999, 2)", "a (-1, 5)", "a (5, -1)", "a (100, 5)", "a (5, 50)",
    "Built (1990, 2005)", "a (5, 5) b (2005, 1990)", "a (5, 5) b (1990.5, 2005)",
    "a (5, 5) b (1024, 1990)", "a (5, 5) b (1990, 2160)"])
def test_every_point_must_be_inside_the_image(thought):
    """(999999, 2) was grounding: nobody compared it with the image's size. One good point does not
    excuse a bad one, and years do not ground."""
    for mode, least in (("grounded", 0.5), ("zoom", 0.6)):
        result = score(trace(final("red", thought), mode=mode))
        assert (result.format, result.grounded, result.total) == (1, 0, least) and result.why


def test_two_numbers_like_years_are_a_point_of_a_large_image():
    """The rule about years must not take a screenshot's points away."""
    large = Frame(input_size=(3840, 2160), original_size=(3840, 2160))
    assert score(trace(final("red", "the tab (1990, 2005)"), frames=[large])).grounded == 1


def test_grounding_is_about_every_thought_and_only_about_thoughts():
    """Only the last turn was checked; a point in the answer or the call stood in for one in the
    thought."""
    assert score(trace(zooming(20, 20), final("red", "so red"))).grounded == 1
    assert score(trace(zooming(20, 20, "hm"), final("red", "so red"))).grounded == 0
    assert score(trace(zooming(20, 20, "a (500, 5)"), final())).grounded == 0
    assert score(trace(final("(15, 12)", "hm"), about=question(BOX, "point"))).grounded == 0


def test_grounding_is_not_asked_for_in_direct_and_think():
    """The baselines without points lost half of their reward, or were fined for a number in
    parentheses."""
    for text, mode in (("<answer>red</answer>", "direct"),
                       ("<think>a (999, 999)</think><answer>red</answer>", "think")):
        assert score(trace(text, mode=mode)).total == 1


def test_further_distinct_crops_are_paid_up_to_a_bound():
    """Each crop was paid, without end; one 1 px away passed as a new one."""
    bonus = []
    for calls in range(5):
        turns = [zooming(9 + 10 * i, 20) for i in range(calls)]
        bonus.append(score(trace(*turns, final())).diversity)
    assert bonus == [0, 0, 0.2, 0.4, 0.4]
    near = [zooming(20, 20), zooming(21, 20), zooming(20, 29), zooming(20, 20)]
    assert score(trace(*near, final())).diversity == 0
    assert score(trace(zooming(20, 20), zooming(20, 30), final())).diversity == 0.2
    closer = Weights(0.6, 0.4, 0.2, 2, min_distance=1)
    assert score(trace(*near[:2], final()), closer).diversity == 0.2


def test_the_same_window_is_no_further_crop():
    """At the border, and of a small image, calls far apart show one window: it was paid again."""
    corner = [zooming(0, 0), zooming(3, 3), zooming(0, 3)]
    assert score(trace(*corner, final()), Weights(0.6, 0.4, 0.2, 2, 1)).diversity == 0
    small = Frame(input_size=(300, 300), original_size=(70, 70))
    far = [zooming(10, 10), zooming(150, 150), zooming(290, 290)]
    assert score(trace(*far, final(), frames=[small])).diversity == 0
    assert score(trace(*corner, zooming(50, 20), final())).diversity == 0.2


def test_going_back_is_no_new_place_and_a_slow_walk_comes_to_one():
    """Compared only with the crop before, going back was a new crop; compared with all, a slow walk
    had none."""
    assert reward.distinct_crops([(x, 0) for x in range(0, 21)], 10) == 3
    assert reward.distinct_crops([(0, 0), (30, 0), (0, 0), (29, 0)], 10) == 2


def test_zoom_calls_are_those_that_were_answered_by_a_crop():
    """Refused calls were counted as tool use."""
    turns = [zooming(20, 20), zooming(20, 20), zooming(500, 5)]
    assert score(trace(*turns, final())).zoom_calls == 2


def test_no_bonus_without_form_and_grounding():
    """Zooming was paid in traces that never came to a proper end."""
    turns = [zooming(20, 20), zooming(40, 40), zooming(60, 40)]
    assert score(trace(*turns, final("red", "a (500, 5)"))).diversity == 0
    assert score(trace(*turns, "red")).total == 0
    assert score(trace(*turns, final(), ended="truncated")).diversity == 0


def test_twenty_crops_and_a_wrong_answer_stay_below_the_right_one():
    """Unbounded, they scored more than the right answer: the policy learned to zoom, not to see."""
    turns = [zooming(20 * (i % 5), 10 * (i // 5)) for i in range(20)]
    wrong = score(trace(*turns, final("blue")))
    assert wrong.zoom_calls == 20 and wrong.total == pytest.approx(0.56)
    assert wrong.total < score(trace("<answer>red</answer>")).total < score(trace(final())).total


# ---------------------------------------------------------------------------------------- the score

@pytest.mark.parametrize("weights", [
    dict(correct=0.4, format=0.6), dict(correct=0.6, format=0.4, diversity=0.2, max_extra=3),
    dict(format=0, diversity=1e300, max_extra=10**300), dict(correct=0, format=0),
    dict(format=-0.1), dict(max_extra=-1), dict(diversity=float("nan")),
    dict(correct=float("inf"))])
def test_weights_that_let_a_wrong_trace_pass_are_refused(weights):
    """Nothing stopped a bonus or a format weight that is worth more than a right answer."""
    with pytest.raises(ValueError):
        Weights(**weights)


def test_the_largest_bonus_that_is_allowed():
    """Guards --diversity 0.25, which makes the best wrong trace equal the least right one, from
    being refused for a rounding."""
    assert Weights(0.6, 0.4, 0.25, 2).diversity == 0.25


def test_the_total_is_made_of_the_named_parts():
    """The logged parts did not add up to the reward that was trained on."""
    for weights in (reward.SINGLE_TURN, reward.MULTI_TURN, Weights(2, 1, 0.5, 1)):
        for texts in (GOOD["zoom"], [final("blue")], ["red"], [final("red", "hm")]):
            s = score(trace(*texts), weights)
            assert s.total == weights.total(s.correct, s.format, s.grounded, s.diversity)


def test_no_wrong_trace_ever_scores_above_a_right_one():
    """The promise of the bounded bonus: with any weights that are accepted, over traces that are
    right or not, well-formed or not, grounded or not, with no, few or many zoom calls."""
    rng = random.Random(0)
    turns = [zooming(9 + 10 * i, 20) for i in range(9)]
    kinds = product((0, 2, 4, 9), ("red", "blue"), ("a (5, 5)", "a (500, 5)"), ("answer", "forced"))
    traces = [trace(*turns[:calls], final(answer, thought), ended=ended)
              for calls, answer, thought, ended in kinds]
    accepted = 0
    while accepted < 200:
        values = (rng.random(), rng.random(), rng.random(), rng.randrange(6), rng.choice([1, 10]))
        try:
            weights = Weights(*values)
        except ValueError:
            continue
        accepted += 1
        scores = [score(trace, weights) for trace in traces]
        best_wrong = max(s.total for s in scores if not s.correct)
        right = [s for s in scores if s.correct]
        assert best_wrong <= min(s.total for s in right)
        assert best_wrong < min(s.total for s in right if s.format and s.grounded)


# ----------------------------------------------------------------------------------- untrusted text

UNITS = ["<", "<think>", "</think>", "<answer>a</answer>", "(", "( ", "[1,", "(1 ,", "(1, 1)", " ",
         "\n", "a.", "b)", "(b)", '"', "“", "*\"", ".", "1", "1, ", "1 , 1;", "1" * 15 + ".",
         "option ", "type [5] [", "] [1]", "[ ", "] ", "]\n\n[", "`", "stop [", "{", '{"a":', "\\",
         "\0", "ß", "é\u0301", "红", "😀"]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_long_hostile_text_is_read_in_linear_time(unit):
    """Patterns that backtrack hang for hours on a policy that repeats itself."""
    text = unit * (20_000 // len(unit))
    began = time.process_time()
    for around in ("%s", "<answer>%s</answer>", "type [5] [%s", "type [5] [%s] [0", "scroll [%s",
                   "stop [%s]", "b. %s", '"%s"', "(1%s", "1 %s", "`%s`", "option %s",
                   "\\boxed{%s}", "b (%s)"):
        hostile = around % text
        match_answer(hostile, "red", CHOICES)
        match_answer(hostile, "B")
        match_action(hostile, "type [5] [red]")
        match_point(hostile, BOX, FRAME)
        turn = Turn(hostile, thought=hostile, answer=hostile)
        for mode in GOOD:
            assert not score(replace(trace(mode=mode), turns=[turn])).correct
    with pytest.raises(ToolError):
        parse_call(text)
    assert time.process_time() - began < 3                # some tenths, where nothing is squared


def mutated(rng, text):
    """A text with some characters or pieces exchanged, doubled or left out."""
    pieces = [*UNITS, "ﷺ", "\ud83d", "٣", "²", "\u2028", "\\boxed{", "$", "e9", "- "]
    for _ in range(rng.randint(1, 4)):
        start, length = rng.randrange(len(text) + 1), rng.randrange(4)
        text = text[:start] + rng.choice([*pieces, "", text[:9]]) + text[start + length:]
    return text


MUTATED_TEXTS = 20_000         # of a seed: every piece is put in some hundred times
SOURCES = [zooming(20, 20), final(), final("(15, 12)", "a [5, 5]"), final("(B) red"),
           final("type [5] [red shoes] [1]"), final("stop [red]", "Built (1990, 2005), at (7, 7)."),
           "Which?\n(A) blue\n(B) red", "type [5] [red shoes] [1]", "scroll [down]", "(B) red",
           "option b", "(15, 12)",
           '{"name": "search_coordinate", "arguments": {"coordinate": [20, 30]}}']


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_no_text_can_break_the_reward(seed):
    """An answer, a call, a question or a whole turn may be anything: no parser raises what its
    caller does not expect, and in each mode no wrong trace has more than any right one."""
    rng = random.Random(seed)
    asked = [question(), question("B", "choice", CHOICES), question(BOX, "point"),
             question("type [5] [red shoes]", "action"), question("stop [red]", "action")]
    totals = {(mode, correct): set() for mode in GOOD for correct in (0, 1)}
    for i in range(MUTATED_TEXTS):
        text = mutated(rng, SOURCES[i % len(SOURCES)])
        reward.parse_options(text)
        match_answer(text, "B", CHOICES)
        match_point(text, BOX, FRAME)
        match_action(text, "type [5] [red shoes]")
        for read, fault in ((parse_call, ToolError), (parse_action, ValueError)):
            with suppress(fault):
                read(text)
        mode = rng.choice(list(GOOD))
        before = rng.choice([zooming(20 + i % 70, 20), mutated(rng, zooming(20, 20))])
        texts = [before, text] if mode == "zoom" else [text]
        written = trace(*texts, mode=mode, about=asked[i // 7 % 5])
        if written.answer is None:
            written.ended = "stopped"
        found = score(written)
        totals[mode, int(found.correct)].add(found.total)
    for mode in GOOD:
        assert max(totals[mode, 0]) <= min(totals[mode, 1])
