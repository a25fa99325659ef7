"""The readers of the real data sets, and their official scores. The fixtures have the field names of the real files; their
contents are invented and their images drawn. What is at stake: a box in the wrong frame, or a row scored by the wrong rule,
gives a plausible number that is wrong."""
import json

import pytest
from PIL import Image

import evaluate
from conftest import (ACTION_RL, ATLAS, POINT_RL, PRO, PROBE, ROBOSPATIAL, SAT, SCREENSPOT, SEARCH, SFT, VSTAR, draw,
                      hr_bench, talk)
from evaluate import read_questions, summarise
from model import UserError
from evaluate import lenient_rule, official_rule
from reward import match_action, match_answer, match_point, option_text, parse_options
from rollout import Frame, Question, Trace, Turn


# ------------------------------------------------------------------------------------------------ formats

def test_release_evaluation_row_becomes_a_choice(data):
    """Guards: the image placeholder reaches the model twice; the options are lost, so that letters cannot be matched."""
    question = read_questions(data("sat2_test.jsonl", [talk(SAT, "Yes, left")]))[0]
    assert "<image>" not in question.text and question.text.startswith("Question: Which way?")
    assert (question.kind, question.answer, question.choices) == ("choice", "Yes, left", ("Yes, left", "No"))
    assert question.id == "7" and question.load()[0].size == (200, 100)


def test_release_row_with_lists_in_its_turn(data):
    """Guards: the second spelling of conversations, {"from": [...], "value": [...]}, read as one garbled turn."""
    lists = {"from": ["human", "gpt"], "value": [SAT, "No"]}
    rows = [talk("", "") | {"conversations": conversations} for conversations in (lists, [lists])]
    assert [q.answer for q in read_questions(data("rows.jsonl", rows))] == ["No", "No"]


def test_letter_and_text_name_the_same_option(data):
    """Guards: a truth given as a letter compared with an answer given as text (visual search against SAT)."""
    rows = [talk(SEARCH, answer) for answer in ("C", "(C)", "C.", "Dark green", "dark green.")]
    questions = read_questions(data("vigorl_SA_MCTS.jsonl", rows))
    assert [q.answer for q in questions] == ["C", "C", "C", "dark green", "dark green"]
    for question in questions:
        assert all(match_answer(said, question.answer, question.choices) for said in ("C", "(c) dark green", "Dark green."))
        assert not match_answer("red", question.answer, question.choices)


def test_options_that_are_letters_themselves(data):
    """Guards: V*'s label "A" taken for the option whose text is "A", and a text "A" for the label."""
    assert read_questions(data("test_questions.jsonl", [VSTAR]))[0].answer == "A"
    question = read_questions(data("other.jsonl", [talk(VSTAR["text"], "A")]))[0]    # the text of B
    assert question.answer == "B" and option_text(question.answer, question.choices) == "a"


@pytest.mark.parametrize("text, options", [
    ("Which?\n(A) red (B) dark blue (C) green", ("red", "dark blue", "green")),
    ("Is A. the nearest?\nAnswer Choices:\nA. Yes, left\nB) No\n", ("Yes, left", "No")),
    ("Point (A) is red, (B) is blue.\nWhich?\n(A) A is closer\n(B) B is closer", ("A is closer", "B is closer")),
    ("Is (A) or (B) nearer?\nAnswer Choices:\nA. the cup\nB. the box", ("the cup", "the box")),
    ("Is it (B) or (C)?", ()),
    ("A. Turing wrote what?", ()),
])
def test_options_are_parsed(text, options):
    """Guards: options on one line, after a preamble that looks like options, or imagined where there are none."""
    assert parse_options(text) == options


def test_release_categories(data):
    """Guards: BLINK's mean of sub-tasks and V*'s categories lost, since the release's rows have no field for them."""
    rows = [talk(SAT, "No", id="val_Multi-view_Reasoning_12"), talk(SEARCH, "A", image="vstar/relative_position/sa_1.png"),
            talk(SAT, "No", id="sat_12")]
    draw(data("blink_validation.jsonl", rows).parent / "vstar" / "relative_position" / "sa_1.png")
    questions = read_questions(data("blink_validation.jsonl", rows))
    assert [q.category for q in questions] == ["Multi-view_Reasoning", "relative_position", ""]


def test_release_rl_rows_for_pointing(data):
    """Guards: OS-Atlas boxes of the release taken for text; they are whole px of the file's image, corners."""
    question = read_questions(data("vigorl_osatlas_train_RL.jsonl", [POINT_RL]))[0]
    assert (question.kind, question.answer, question.text) == ("point", (20, 30, 40, 40), "Description: check sports news")


@pytest.mark.parametrize("answer, kind", [
    ("click [12]", "action"), ("type [3] [stop it (now)] [1]", "action"), ("scroll [down]", "action"), ("go_back", "action"),
    ("stop [N/A]", "action"), ("stop", "string"), ("Click here", "string"), ("yes", "string"), ("3", "string")])
def test_web_actions(data, answer, kind):
    """Guards: actions compared letter by letter; and words on a sign ("stop") taken for actions."""
    question = read_questions(data("vigorl_ical_train_RL.jsonl", [ACTION_RL | {"answer": answer}]))[0]
    assert (question.kind, question.answer) == (kind, answer)
    assert kind != "action" or match_action(answer, question.answer)    # a truth that the reward can read


def test_sft_file(data):
    """Guards: close-ups of a trace handed to the model as further images of the question."""
    question = read_questions(data("MCTS_72b_reasoning_chains_train.json", [SFT]))[0]
    assert [path.name for path in question.images] == ["image.png"]
    assert question.answer == "A" and question.text.startswith("What colour")


def test_two_images(data):
    """Guards: only the first of a question's images shown."""
    row = {"problem": "<image><image>Which is later?", "answer": "the second", "images": ["image.png", "image.png"]}
    assert len(read_questions(data("rl.jsonl", [row]))[0].load()) == 2


def test_screenspot_boxes_are_x_y_width_height(data):
    """Guards: ScreenSpot's and ScreenSpot-Pro's boxes mixed up; both files have the same field, with other meanings."""
    question = read_questions(data("screenspot_mobile_v2.json", [SCREENSPOT]))[0]
    assert (question.kind, question.answer) == ("point", (20, 30, 40, 40))
    assert (question.text, question.category) == ("Description: send", "mobile | text")


def test_screenspot_pro_folder(data, tmp_path):
    """Guards: corners read as width and height; images that lie in ../images beside annotations not found."""
    draw(tmp_path / "pro" / "images" / "word.png")
    for name in ("a", "b"):
        data(f"pro/annotations/{name}.json", [PRO | {"img_filename": "word.png", "id": name}])
    for path in (tmp_path / "pro", tmp_path / "pro" / "annotations", tmp_path / "pro" / "annotations" / "a.json"):
        questions = read_questions(path)
        assert [q.id for q in questions] == ["a", "b"][:len(questions)] and len(questions) == (1 if path.suffix else 2)
        assert (questions[0].answer, questions[0].category) == ((20, 30, 40, 40), "Office | icon")
        questions[0].load()


def test_rows_of_a_folder_have_names_of_their_own(data):
    """Guards --traces: ScreenSpot's rows have no id, and row 1 of each of its files was "1": a trace met another's question."""
    for name in ("web", "mobile"):
        path = data(f"v2/{name}.json", [SCREENSPOT] * 2)
    assert [q.id for q in read_questions(path)] == ["1", "2"]
    assert [q.id for q in read_questions(path.parent)] == ["mobile-1", "mobile-2", "web-1", "web-2"]


def test_os_atlas_boxes_are_shares_of_the_original_image(data, tmp_path):
    """Guards: shares taken for px; or scaled by another image's size."""
    draw(tmp_path / "other.png", size=(1000, 500))
    questions = read_questions(data("desktop.json", [ATLAS, ATLAS | {"img_filename": "other.png"}]))
    assert questions[0].answer == pytest.approx((20, 30, 40, 40))
    assert questions[1].answer == pytest.approx((100, 150, 200, 200))


def test_boxes_hit_what_is_drawn(data):
    """Guards: any mistake of frame: the middle of each format's box is on the rectangle in the file's own image."""
    for name, row in (("s.json", SCREENSPOT), ("p.json", PRO), ("o.json", ATLAS)):
        question = read_questions(data(name, [row]))[0]
        x1, y1, x2, y2 = question.answer
        image = question.load()[0]
        assert image.getpixel((int((x1 + x2) / 2), int((y1 + y2) / 2))) == (255, 0, 0)
        assert match_point("(15, 17)", question.answer, Frame((100, 50), image.size))    # seen at half the size


def test_robospatial(data):
    """Guards: the polygon left in [0, 1] while points are said in px; the question still asking for points in [0, 1]."""
    point, yes = read_questions(data("annotations.json", ROBOSPATIAL))
    assert point.kind == "point" and point.text == "Point to the space left of the cup."
    assert [pytest.approx(corner) for corner in point.answer] == [(20, 30), (40, 30), (40, 50)]
    assert (yes.kind, yes.answer, yes.category) == ("string", "Yes", "configuration")


def test_hr_bench(data, monkeypatch):
    """Guards: a cell of megabytes refused by csv; images decoded (or kept) before they are asked for; cycles mixed up."""
    rows = [hr_bench(400, index=i, cycle_category=i) for i in range(2)]
    assert len(rows[0]["image"]) > 131072                      # csv's own limit
    path = data("hr_bench_4k.tsv", rows)
    monkeypatch.setattr(evaluate, "read_image", None)
    questions = read_questions(path)
    question = questions[1]
    monkeypatch.undo()
    assert question.text == 'Which "one"?\nLook.\n(A) red\n(B) blue\n(C) green\n(D) white'
    assert (question.kind, question.answer, question.category) == ("choice", "C", "single | cycle 1")
    assert match_answer("green", question.answer, question.choices)
    assert question.load()[0].size == (400, 400)


def test_visual_probe(data):
    """Guards: VisualProbe's `solution` not found where others have `answer`."""
    question = read_questions(data("val.json", [PROBE]))[0]
    assert (question.kind, question.answer, question.id, question.category) == ("string", "EXIT", "d1", "hard")


# ------------------------------------------------------------------------------------------------ bad input

def test_missing_image_names_the_row_and_the_flag(data, tmp_path):
    """Guards: a wrong --image-root found out only when training has begun."""
    with pytest.raises(UserError, match=r"a\.jsonl:1: no such image, .*gone\.png; .*--image-root"):
        read_questions(data("a.jsonl", [talk(SAT, "No", image="gone.png")]))
    with pytest.raises(UserError, match="--image-root"):
        read_questions(data("a.jsonl", [talk(SAT, "No")]), image_root=tmp_path / "elsewhere")
    second = read_questions(data("a.jsonl", [talk(SAT, "No"), talk(SAT, "No", image="gone.png")]))[1]
    with pytest.raises(UserError, match=r"gone\.png \(.*a\.jsonl:2\)"):
        second.load()


def test_image_root(data, tmp_path):
    """Guards: relative paths of the release not joined to the folder that was given, or to one above the file."""
    draw(tmp_path / "far" / "vstar" / "x.png")
    path = data("near/visual_search/a.jsonl", [talk(SAT, "No", image="vstar/x.png")])
    assert read_questions(path, image_root=tmp_path / "far")[0].load()
    draw(tmp_path / "near" / "vstar" / "x.png")
    assert read_questions(path)[0].load()


def test_unreadable_image(data, tmp_path):
    """Guards: a traceback of the image library's, without the name of the file or row."""
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for name, row in (("a.jsonl", talk(SAT, "No", image="broken.png")), ("o.json", ATLAS | {"img_filename": "broken.png"})):
        path = data(name, [row])
        with pytest.raises(UserError, match=r"broken\.png .*:1\): cannot be read as an image"):
            read_questions(path)[0].load()


@pytest.mark.parametrize("name, text, line", [
    ("a.jsonl", json.dumps(talk(SAT, "No")) + '\n\n{"id": 3, "conv', 3), ("a.jsonl", '{"id": 1, "conv\n{"id": \n', 1),
    ("a.jsonl", '{"id": 1}\n{"id":\n', 2), ("a.json", '[\n{"id": 1},\n{"id": }\n]', 3),
    ("a.jsonl", "\x00\x01 binary", 1)])
def test_broken_json_names_the_line(data, tmp_path, name, text, line):
    """Guards: "Expecting value: line 1 column 1" in a file of 100,000 lines."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: cannot be read"):
        read_questions(tmp_path / name)


def test_unknown_fields_are_named(data):
    """Guards: a format guessed from a row that fits none; the message says what was seen and what is known."""
    with pytest.raises(UserError, match=r"its fields are caption, picture\. Known are: .*V\*Bench \(text, label, "):
        read_questions(data("a.jsonl", [{"picture": "image.png", "caption": "a cup"}]))
    with pytest.raises(UserError, match="unknown format"):
        read_questions(data("a.json", [[1, 2]]))


def test_files_that_are_not_read(tmp_path):
    """Guards: a traceback for parquet, a missing file, or an empty one."""
    cases = (("test.parquet", "jsonl files of the ViGoRL release"), ("gone.jsonl", "No such file"), ("", "no usable row"))
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no usable row"):
        read_questions(tmp_path / "empty.jsonl")


def test_unusable_rows_are_counted_and_the_first_explained(data):
    """Guards: rows dropped in silence, so that an accuracy is over fewer questions than it seems."""
    bad = [talk(SAT, "No", image=None), talk("<image>", "No"), talk("Where?", ""), talk("Where?", "(3, 4)"),
           talk(SEARCH, "E"), talk("Where?", "(30, 20, 10, 40)"), talk("Where?", {"x": 1}), talk("Next?", "scroll [left]"),
           {"id": 1, "image": "image.png"}, talk("", "") | {"conversations": []}]
    questions = read_questions(data("a.jsonl", [talk(SAT, "No"), *bad, talk(SAT, "No")]))
    assert (len(questions), questions.skipped) == (2, len(bad))
    assert questions.first_skipped.endswith("a.jsonl:2: it has no image")
    assert questions[1].where.endswith("a.jsonl:12")
    questions = read_questions(data("a.jsonl", [{"comment": "ours"}, talk(SAT, "No")]))
    assert len(questions) == 1 and ":1: unknown format, its fields are comment" in questions.first_skipped


@pytest.mark.parametrize("row, why", [
    (talk(SAT, "No", image=None), "no image"),
    (PRO | {"bbox": [20, 30, 10, 40]}, "not the corners of a box in px"),
    (ATLAS | {"bbox": [20, 30, 40, 40]}, r"not the corners of a box in \[0, 1\]"),
    (ATLAS | {"bbox": "0 0 1 1"}, "not the corners"),
    (SCREENSPOT | {"bbox": [1, 2, 3]}, "do not hold what they should"),
    (talk("Where?", "(3, 4)"), "neither in words nor a box"),
    (talk(SEARCH, "E"), "none of its 3 options"),
    ({"problem": "Where?", "answer": "here"}, "no field 'images'")])
def test_file_without_a_usable_row_is_an_error_that_says_why(data, row, why):
    """Guards: an evaluation over no questions; px taken for shares, or corners in disorder, by guessing from the numbers."""
    with pytest.raises(UserError, match=rf"no usable row among 2\. .*:1: .*{why}"):
        read_questions(data("a.jsonl", [row, row]))


# ------------------------------------------------------------------------------------------------ laziness

def test_no_image_is_opened_at_the_start(data, monkeypatch):
    """Guards: minutes of start-up, or gigabytes, for files of 100,000 rows."""
    paths = [data("a.jsonl", [talk(SAT, "No")]), data("o.json", [ATLAS])]
    monkeypatch.setattr(Image, "open", None)
    files = [read_questions(path) for path in paths]
    assert files[0][0].answer == "No"
    monkeypatch.undo()
    opened = []
    monkeypatch.setattr(evaluate, "read_image", lambda *a: opened.append(a))
    assert files[1][0].kind == "point" and not opened           # the box needs the image's size: its header, no more


def test_rows_on_lines_are_not_kept(data, tmp_path):
    """Guards: a file of 100,000 rows held in memory. What is kept of a row is its number and its offset."""
    questions = read_questions(data("a.jsonl", [talk(SAT, "No", id=i) for i in range(20_000)]))
    assert len(questions) == 20_000 and all(type(place) is int for _, _, place in questions.index)
    assert len({id(file) for file, _, _ in questions.index}) == 1
    assert [q.id for q in (questions[0], questions[-1], questions[4_123])] == ["0", "19999", "4123"]


def test_part_of_a_file_is_spread_over_it(data):
    """Guards: "the first n" of a sorted file: one category only."""
    questions = read_questions(data("a.jsonl", [talk(SAT, "No", id=i) for i in range(10)]), n=4)
    assert [q.id for q in questions] == ["0", "2", "5", "7"]


def test_json_lines_in_a_json_file_and_the_reverse(data, tmp_path):
    """Guards: files named .json that hold lines, or .jsonl that hold a list, refused though they are plain to see."""
    data("a.jsonl", [talk(SAT, "No")] * 2).rename(tmp_path / "b.json")
    data("a.json", [talk(SAT, "No")] * 3).rename(tmp_path / "b.jsonl")
    assert len(read_questions(tmp_path / "b.json")) == 2 and len(read_questions(tmp_path / "b.jsonl")) == 3


# ------------------------------------------------------------------------------------------------ scores

def test_accuracy_and_interval():
    """Guards: an interval that leaves [0, 1], or is empty when all are right (76 of 100: 0.668 to 0.833)."""
    assert summarise([("", True)] * 76 + [("", False)] * 24)["ci95"] == pytest.approx((0.668, 0.833), abs=1e-3)
    low, high = summarise([("", 1.0)] * 10)["ci95"]
    assert 0.7 < low < 0.75 and high == pytest.approx(1)
    assert summarise([("", 0.5), ("", 1)])["accuracy"] == 0.75


def test_scores_by_category_and_by_its_parts():
    """Guards: ScreenSpot's table (platform by type) without its margins."""
    summary = summarise([("mobile | text", 1), ("mobile | icon", 0), ("web | text", 1)])
    assert {name: (group["accuracy"], group["n"]) for name, group in summary["by"].items()} == {
        "mobile": (0.5, 2), "web": (1, 1), "text": (1, 2), "icon": (0, 1),
        "mobile | text": (1, 1), "mobile | icon": (0, 1), "web | text": (1, 1)}
    assert summary["official"] == {} and summary["n"] == 3


def test_official_means():
    """Guards: BLINK pooled over questions, not averaged over sub-tasks; RoboSpatial's 228 averaged, not pooled."""
    blink = summarise([("Relative_Depth", 1)] * 3 + [("Spatial_Relation", 0), ("Counting", 0)])
    assert blink["accuracy"] == 0.6
    assert blink["official"]["BLINK, mean of sub-tasks"]["accuracy"] == pytest.approx(1 / 3)
    assert blink["official"]["BLINK, mean of the spatial three"] == {"accuracy": 0.5, "n": 4}
    cycles = summarise([(f"single | cycle {i}", i % 2) for i in range(4)] + [("cross | cycle 0", 1)])
    assert cycles["official"]["HR-Bench, mean of option cycles"]["accuracy"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    robot = summarise([("configuration", 1)] * 3 + [("compatibility", 0), ("context", 0)])
    assert robot["official"]["RoboSpatial-Home, yes or no"]["accuracy"] == 0.75 and robot["by"]["context"]["n"] == 1


def said(answer, question):
    """A trace that answers this, its image seen at half the size."""
    return Trace(None, question=question, frames=[Frame((100, 50), (200, 100))], turns=[Turn("", answer=answer)])


def test_official_rule_differs_for_robospatial_only():
    """Guards: "Yes, it is." wrong on RoboSpatial-Home, where the official score counts it, or right anywhere else; a list of
    points wrong there, where the first one counts; the polygon compared with px as seen."""
    question = Question("Is it?", [], "Yes", category="compatibility")
    assert official_rule(said(" yes, it is.", question), False) and not official_rule(said("no", question), True)
    assert not official_rule(said(None, question), False)
    assert not official_rule(said("yes, it is.", Question("Is it?", [], "Yes")), False)
    question = Question("Where?", [], ((20, 30), (40, 30), (40, 50), (20, 50)), "point", category="context")
    cases = (("[(15, 20), (90, 40)]", True), ("(30, 40)", False), ("[(90, 40), (15, 20)]", False), ("left", False))
    for answer, right in cases:
        assert official_rule(said(answer, question), not right) == right


def test_lenient_rule():
    """Guards: the public code's looser figure and our strict one not told apart when ours are set beside theirs."""
    for truth in ("right", "B"):
        question = Question("Where?", [], truth, "choice", ("left", "right"))
        for answer in ("right", "Right.", "left or right", "B", "(B)", "B. right"):
            assert lenient_rule(said(answer, question), False), answer
        for answer in ("left", "A. left", "A", "Because", "", None, "Z"):
            assert not lenient_rule(said(answer, question), True), answer
    assert lenient_rule(said("(3, 4)", Question("Where?", [], (0, 0, 9, 9), "point")), True)
