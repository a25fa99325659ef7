"""The readers of the real data sets. The fixtures have the field names of the real files; their
contents are invented and their images drawn. What is at stake: a box in the wrong frame, or a row
scored by the wrong rule, gives a plausible number that is wrong."""
import json
import os
from argparse import Namespace

import pytest
from conftest import (
    ACTION_RL,
    ATLAS,
    POINT_RL,
    PRO,
    PROBE,
    ROBOSPATIAL,
    SAT,
    SCREENSPOT,
    SEARCH,
    SFT,
    VSTAR,
    draw,
    hr_bench,
    talk,
)
from PIL import Image

from evaluate import (
    open_file,
    questions_of,
    settle,
    usable,
)
from model import UserError
from reward import (
    Unusable,
    match_action,
    match_answer,
    match_point,
    option_text,
    parse_options,
    scored_by,
)
from rollout import Frame, visible


def read(path, image_root=""):
    """open_file, without its memory of a path that a test writes to twice."""
    return open_file.__wrapped__(path, image_root)


def asked(path):
    """The first question, once what needs its image is known."""
    question, = ready(read(path)[:1])
    return question


def ready(questions):
    """Those that can be asked."""
    return [question for part in usable(questions) for question in part]


# ------------------------------------------------------------------------------------------ formats


def test_release_evaluation_row_becomes_a_choice(data):
    """Guards: the image placeholder reaches the model twice; the options are lost, so that letters
    cannot be matched."""
    question = read(data("sat2_test.jsonl", [talk(SAT, "Yes, left")]))[0]
    assert "<image>" not in question.text and question.text.startswith("Question: Which way?")
    assert (question.kind, question.answer) == ("choice", "Yes, left")
    assert question.choices == ("Yes, left", "No")
    assert question.id == "7" and question.load()[0].size == (200, 100)


def test_release_row_with_lists_in_its_turn(data):
    """Guards: the second spelling of conversations, {"from": [...], "value": [...]}, read as one
    garbled turn."""
    lists = {"from": ["human", "gpt"], "value": [SAT, "No"]}
    rows = [talk("", "") | {"conversations": turns} for turns in (lists, [lists])]
    assert [q.answer for q in read(data("rows.jsonl", rows))] == ["No", "No"]


def test_letter_and_text_name_the_same_option(data):
    """Guards: a truth given as a letter compared with an answer given as text (visual search
    against SAT)."""
    rows = [talk(SEARCH, answer) for answer in ("C", "(C)", "C.", "Dark green", "dark green.")]
    questions = read(data("vigorl_SA_MCTS.jsonl", rows))
    assert [q.answer for q in questions] == ["C", "C", "C", "dark green", "dark green"]
    for question in questions:
        for said in ("C", "(c) dark green", "Dark green."):
            assert match_answer(said, question.answer, question.choices)
        assert not match_answer("red", question.answer, question.choices)


def test_options_that_are_letters_themselves(data):
    """Guards: V*'s label "A" taken for the option whose text is "A", and a text "A" for the
    label."""
    assert read(data("test_questions.jsonl", [VSTAR]))[0].answer == "A"
    question = read(data("other.jsonl", [talk(VSTAR["text"], "A")]))[0]    # the text of B
    assert question.answer == "B" and option_text(question.answer, question.choices) == "a"


@pytest.mark.parametrize("text, options", [
    ("Which?\n(A) red (B) dark blue (C) green", ("red", "dark blue", "green")),
    ("Is A. the nearest?\nAnswer Choices:\nA. Yes, left\nB) No\n", ("Yes, left", "No")),
    ("Point (A) is red, (B) is blue.\nWhich?\n(A) A is closer\n(B) B is closer",
     ("A is closer", "B is closer")),
    ("Is (A) or (B) nearer?\nAnswer Choices:\nA. the cup\nB. the box", ("the cup", "the box")),
    ("(A) red\n(B) blue\nHint: Please answer with (A) or (B).", ("red", "blue")),
    ("(A) red (left) or (B) blue (right). Please answer with (A), (B).",
     ("red (left)", "blue (right)")),
    ("Is it (B) or (C)?", ()), ("Is it (A), (B) or (C)?", ()),
    ("A. Turing wrote what?", ()),
])
def test_options_are_parsed(text, options):
    """Guards: options on one line, after a preamble that looks like options, or imagined where
    there are none."""
    assert parse_options(text) == options


def test_release_categories(data):
    """Guards: BLINK's mean of sub-tasks and V*'s categories lost, since the release's rows have no
    field for them."""
    path = "vstar/relative_position/sa_1.png"
    rows = [talk(SAT, "No", id="val_Multi-view_Reasoning_12"), talk(SEARCH, "A", image=path),
            talk(SAT, "No", id="sat_12")]
    file = data("blink_validation.jsonl", rows)
    draw(file.parent / path)
    questions = read(file)
    assert [q.category for q in questions] == ["Multi-view_Reasoning", "relative_position", ""]


@pytest.mark.parametrize("fields, category", [
    ({"question_type": "obj_movement"}, "obj_movement"), ({"sub_task": "Jigsaw"}, "Jigsaw"),
    ({"category": "hard", "question_type": "action"}, "hard"), ({"data_source": "sat"}, "sat"),
    ({"category": "", "sub_task": None, "question_type": 7}, "7"), ({"category": None}, ""),
    ({"sub_task": "Counting", "id": "val_Jigsaw_3"}, "Counting")])
def test_a_type_of_question_in_the_row_is_its_category(data, fields, category):
    """Guards the figures by category, which SAT and BLINK have under names of their own."""
    rows = [talk(SAT, "No") | fields, POINT_RL | fields, SFT | fields]
    for i, row in enumerate(rows):
        assert read(data(f"{i}.jsonl", [row]))[0].category == category


@pytest.mark.parametrize("answer", ["A", "(C)", "B. blue", "a", "（Ｂ）", "green。"])
def test_a_hint_behind_options_is_none_of_them(answer):
    """Guards options lost, or made of the words of a hint that names letters, in any order."""
    for hint in ("Answer with (A), (B) or (C).", "Say (B) if unsure, (A) or (C) else.",
                 "Hint: reply with (C)", "E.g. \"(A)\". Please write (A) or (B) or (C)!"):
        found = scored_by(f"Which?\n(A) red\n(B) blue\n(C) green\n{hint}", answer)
        assert found["choices"] == ("red", "blue", "green") and found["kind"] == "choice"
    for hint in ("Give only the letter.", "Write (A), (B) or (C)!", "Note: one of them is right."):
        found = scored_by(f"Which? (A) red, (B) blue or (C) green. {hint}", answer)
        assert found["choices"] == ("red", "blue", "green") and found["kind"] == "choice"


def test_release_rl_rows_for_pointing(data):
    """Guards: OS-Atlas boxes of the release taken for text; they are whole px of the file's image,
    corners."""
    question = read(data("vigorl_osatlas_train_RL.jsonl", [POINT_RL]))[0]
    assert (question.kind, question.answer) == ("point", (20, 30, 40, 40))
    assert question.text == "Description: check sports news"


@pytest.mark.parametrize("answer, kind", [
    ("click [12]", "action"), ("type [3] [stop it (now)] [1]", "action"),
    ("scroll [down]", "action"), ("go_back", "action"), ("stop [N/A]", "action"),
    ("stop", "action"), ("Stop", "action"), ("scroll down", "action"), ("Scroll  up", "action"),
    ("Click [7]", "action"),
    ("stop it", "string"), ("Click here", "string"), ("yes", "string"), ("3", "string")])
def test_web_actions(data, answer, kind):
    """Guards: actions compared letter by letter, and those without brackets taken for words."""
    row = ACTION_RL | {"answer": answer}
    question = read(data("vigorl_ical_train_RL.jsonl", [row]))[0]
    assert (question.kind, question.answer) == (kind, answer)
    assert kind != "action" or match_action(answer, question.answer)    # the reward can read it


@pytest.mark.parametrize("truth", ["stop", "scroll down", "Scroll up"])
@pytest.mark.parametrize("text, kind", [
    ("What does the sign say?", "string"), ("Stop or go?\nAnswer in a word.", "string"),
    ("Which word?\n(A) stop (B) scroll down (C) scroll up", "choice")])
def test_words_on_a_sign_are_no_actions(text, kind, truth):
    """Guards "stop", which is an action on a web page alone."""
    found = scored_by(text, truth)
    assert found["kind"] == kind and match_answer(truth, found["answer"], found.get("choices", ()))


def test_sft_file(data):
    """Guards: crops of a trace handed to the model as further images of the question."""
    question = read(data("MCTS_72b_reasoning_chains_train.json", [SFT]))[0]
    assert [path.name for path in question.images] == ["image.png"]
    assert question.answer == "A" and question.text.startswith("What colour")


def test_two_images(data):
    """Guards: only the first of a question's images shown."""
    row = {"problem": "<image><image>Which is later?", "answer": "the second",
           "images": ["image.png", "image.png"]}
    assert len(read(data("rl.jsonl", [row]))[0].load()) == 2


def test_screenspot_boxes_are_x_y_width_height(data):
    """Guards: ScreenSpot's and ScreenSpot-Pro's boxes mixed up; both files have the same field,
    with other meanings."""
    question = read(data("screenspot_mobile_v2.json", [SCREENSPOT]))[0]
    assert (question.kind, question.answer) == ("point", (20, 30, 40, 40))
    assert (question.text, question.category) == ("Description: send", "mobile | text")


def test_screenspot_pro_folder(data, tmp_path):
    """Guards: corners read as width and height; images that lie in ../images beside annotations not
    found."""
    folder = tmp_path / "pro"
    draw(folder / "images" / "word.png")
    for name in ("a", "b"):
        row = PRO | {"img_filename": "word.png", "id": name}
        data(f"pro/annotations/{name}.json", [row])
    for path, names in ((folder, ["a", "b"]), (folder / "annotations", ["a", "b"]),
                        (folder / "annotations" / "a.json", ["a"])):
        questions = read(path)
        assert [q.id for q in questions] == names
        assert questions[0].answer == (20, 30, 40, 40)
        assert questions[0].category == "Office | icon"
        questions[0].load()


def test_os_atlas_boxes_are_shares_of_the_original_image(data, tmp_path):
    """Guards: shares taken for px; or scaled by another image's size."""
    draw(tmp_path / "other.png", size=(1000, 500))
    questions = ready(read(data("a.json", [ATLAS, ATLAS | {"img_filename": "other.png"}])))
    assert questions[0].answer == pytest.approx((20, 30, 40, 40))
    assert questions[1].answer == pytest.approx((100, 150, 200, 200))


def test_boxes_hit_what_is_drawn(data):
    """Guards: any mistake of frame: the middle of each format's box is on the rectangle in the
    file's own image."""
    for name, row in (("s.json", SCREENSPOT), ("p.json", PRO), ("o.json", ATLAS)):
        question = asked(data(name, [row]))
        x1, y1, x2, y2 = question.answer
        image = question.load()[0]
        assert image.getpixel((int((x1 + x2) / 2), int((y1 + y2) / 2))) == (255, 0, 0)
        frame = Frame((100, 50), image.size)
        assert match_point("(15, 17)", question.answer, frame)    # in the model input


@pytest.mark.parametrize("orientation", range(1, 10))
def test_boxes_of_photographs_that_lie_on_their_side(data, tmp_path, orientation):
    """Guards EXIF: shares scaled by the size that the file's header has, while the image is loaded
    upright. In px of the image as a person sees it, the box is that of the red rectangle."""
    turns = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
             2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM}
    upright = Image.open(draw(tmp_path / "upright.png", box=(20, 30, 39, 39)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    assert Image.open(tmp_path / "photo.jpg").size == stored.size
    for row in (ATLAS, PRO):
        question = asked(data("a.json", [row | {"img_filename": "photo.jpg"}]))
        x1, y1, x2, y2 = question.answer
        image = question.load()[0]
        assert image.size == (200, 100) and question.answer == pytest.approx((20, 30, 40, 40))
        red, green, _ = image.getpixel((int((x1 + x2) / 2), int((y1 + y2) / 2)))
        assert red > 200 and green < 50


def test_robospatial(data):
    """Guards: the polygon left in [0, 1] while points are said in px; the question still asking for
    points in [0, 1]."""
    point, yes = ready(read(data("annotations.json", ROBOSPATIAL)))
    assert point.kind == "point" and point.text == "Point to the space left of the cup."
    corners = [pytest.approx(corner) for corner in point.answer]
    assert corners == [(20, 30), (40, 30), (40, 50)]
    assert (yes.kind, yes.answer) == ("string", "Yes")
    assert point.category == "RoboSpatial-Home, context"
    assert yes.category == "RoboSpatial-Home, yes or no | configuration"


def test_hr_bench(data):
    """Guards: a cell of megabytes refused by csv; cycles mixed up; a quoted cell of two lines read
    as two rows; base64 that ends in the middle."""
    rows = [hr_bench(400, index=i, cycle_category=i) for i in range(2)]
    assert len(rows[0]["image"]) > 131072                      # csv's own limit
    questions = read(data("hr_bench_4k.tsv", [*rows, hr_bench() | {"image": "iVBORw0KGgo"}]))
    question = questions[1]
    assert question.text == 'Which "one"?\nLook.\n(A) red\n(B) blue\n(C) green\n(D) white'
    assert (question.kind, question.answer) == ("choice", "C")
    assert question.category == "single | cycle 1" and question.id == "1"
    assert match_answer("green", question.answer, question.choices)
    assert ready(questions) == questions[:2] and question.loaded[0].size == (400, 400)


def test_options_that_are_numbers(data):
    """Guards against options of JSON's numbers, which no answer could be compared with."""
    question, = read(data("a.jsonl", [hr_bench(A=3, B=4.5, C=7)]))
    assert question.choices == ("3", "4.5", "7", "white")


def test_visual_probe(data):
    """Guards: VisualProbe's `solution` not found where others have `answer`."""
    question = read(data("val.json", [PROBE]))[0]
    assert (question.kind, question.answer) == ("string", "EXIT")
    assert (question.id, question.category) == ("d1", "hard")


@pytest.mark.parametrize("truth, answer", [
    ("A. red", "A"), ("(B) blue", "B"), ("a", "A"), ("(b)", "B"), ("Blue.", "blue"),
    ("（B）", "B"), ("Ｂ", "B"), ("B。", "B"), ("（Ａ） red", "A"), ("ｂ）", "B"), ("Ａ．", "A"),
    ("ｂｌｕｅ", "blue"), ("red。", "red"), ("\\boxed{B}", "B"), ("B - blue", "B"),
    ("C", None), ("E.", None), ("（Ｄ）", None), ("c。", None)])
@pytest.mark.parametrize("text", [
    "Which?\n(A) red\n(B) blue", "Which?\n（A）red （B）blue", "Which?\nＡ．red\nＢ．blue",
    "Which?\nA、red\nB、blue\nAnswer A or B。",
    "（Ａ）red，（Ｂ）blue。Please answer（A）or（B）。"])
def test_truths_as_the_policy_writes_them(text, truth, answer):
    """Guards a truth read as a text that no answer equals, though an answer in that form counts;
    in narrow letters and in wide ones."""
    if answer is None:
        with pytest.raises(Unusable, match="none of its 2 options"):
            scored_by(text, truth)
    else:
        found = scored_by(text, truth)
        assert (found["kind"], found["answer"]) == ("choice", answer)
        for said in (truth, answer, f" {answer}。"):
            assert match_answer(said, found["answer"], found["choices"])
        assert not match_answer("green", found["answer"], found["choices"])


@pytest.mark.parametrize("truth", [[20, 30, 40, 40], "20, 30, 40, 40", "[20, 30, 40, 40]",
                                   "（20，30，40，40）", "２０, ３０, ４０, ４０",
                                   "(20,30,40,40)."])
def test_boxes_in_any_brackets(data, truth):
    """Guards a box in JSON refused, and one without brackets taken for a text."""
    question = read(data("a.jsonl", [POINT_RL | {"answer": truth}]))[0]
    assert (question.kind, question.answer) == ("point", (20, 30, 40, 40))


def test_regions(data):
    """Guards the places that figures are measured by: kept as they are in the row, with the names
    of the whole file; a box that is none makes the row unusable."""
    one, two = [{"box": [20, 30, 40, 40], "name": "red"}], [{"box": [0, 0, 9, 9], "name": "sky"}]
    bad = [{"box": [9, 9, 0, 0], "name": "sky"}], [{"box": [0, 0, 9, 9]}], [7], "sky"
    rows = [talk(SAT, "No", regions=regions) for regions in (one, two, None, *bad)]
    file = read(data("a.jsonl", [*rows, talk(SAT, "No")]))
    assert len(file) == 4 and len(file.skipped) == 4
    assert [[region["name"] for region in q.regions] for q in file] == [["red"], ["sky"], [], []]
    assert list(file[0].regions[0]["box"]) == [20, 30, 40, 40]
    assert all(question.names == {"red", "sky"} for question in file)


# -------------------------------------------------------------------------- images, one row's fault

def test_a_bad_image_costs_its_row_alone(data, tmp_path, capsys):
    """Guards an evaluation that ends at a photograph cut off: the row is skipped and named, once,
    whatever is wrong with its image."""
    photo = draw(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photo[:len(photo) * 2 // 3])
    (tmp_path / "broken.png").write_bytes(b"not an image")
    names = ["image.png", "cut.jpg", "broken.png", "gone.png", "data:image/png;base64,AAAA",
             "image.png"]
    file = read(data("a.jsonl", [talk(SAT, "No", image=name) for name in names]))
    for _ in range(2):
        good = ready(file)
        assert [question.where[-2:] for question in good] == [":1", ":6"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("skipped: ") for line in lines)
    assert "gone.png" in lines[2] and "a.jsonl:4" in lines[2] and "--image-root" in lines[2]


def test_boxes_outside_of_the_image_are_no_truths(data, capsys):
    """Guards a truth that nobody can reach: the image is 200x100 px."""
    rows = [PRO | {"bbox": box} for box in ([0, 0, 9, 9], [200, 0, 300, 50], [0, 100, 9, 130],
                                            [150, 50, 900, 900])]
    assert [q.answer[0] for q in ready(read(data("a.json", rows)))] == [0, 150]
    assert capsys.readouterr().err.count("lies outside of its image") == 2


def test_image_root(data, tmp_path):
    """Guards: relative paths of the release not joined to the folder that was given, or to one
    above the file."""
    draw(tmp_path / "far" / "vstar" / "x.png")
    path = data("near/visual_search/a.jsonl", [talk(SAT, "No", image="vstar/x.png")])
    assert read(path, image_root=tmp_path / "far")[0].load()
    draw(tmp_path / "near" / "vstar" / "x.png")
    assert read(path)[0].load()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "images/../../secret.png"])
def test_images_outside_of_their_root_are_refused(data, tmp_path, name):
    """Guards: a downloaded file of questions shows any picture of the disk to the model and on the
    report; unless the user gives a folder above."""
    draw(tmp_path / "secret.png")
    path = data("sub/a.jsonl", [talk(SAT, "No", image="x.png"), talk(SAT, "No", image=name)])
    draw(tmp_path / "sub" / "x.png")
    file = read(path)
    assert len(file) == 1 and "outside of" in file.skipped[0] and "a.jsonl:2" in file.skipped[0]
    assert len(read(path, image_root=tmp_path / "sub")) == 1
    assert len(read(path, image_root="/")) == 2


# --------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, text, line", [
    ("a.jsonl", json.dumps(talk(SAT, "No")) + '\n\n{"id": 3, "conv', 3),
    ("a.jsonl", '{"id": 1, "conv\n{"id": \n', 1),
    ("a.jsonl", '{"id": 1}\n{"id":\n', 2), ("a.json", '[\n{"id": 1},\n{"id": }\n]', 3),
    ("a.jsonl", "\x00\x01 binary", 1)])
def test_broken_json_names_the_line(tmp_path, name, text, line):
    """Guards: "Expecting value: line 1 column 1" in a file of 100,000 lines."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: cannot be read"):
        read(tmp_path / name)


def test_unknown_fields_are_named(data):
    """Guards: a format guessed from a row that fits none; the message says what was seen and what
    is known."""
    known = r"its fields are caption, picture\. Known are: .*V\*Bench \(text, label, "
    with pytest.raises(UserError, match=known):
        read(data("a.jsonl", [{"picture": "image.png", "caption": "a cup"}]))
    with pytest.raises(UserError, match="unknown format"):
        read(data("a.json", [[1, 2]]))


def test_files_that_are_not_read(tmp_path):
    """Guards: a traceback for parquet, a missing file, or an empty one."""
    cases = {"test.parquet": "jsonl files of the ViGoRL release", "gone.jsonl": "No such file",
             "": "no usable row"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no usable row"):
        read(tmp_path / "empty.jsonl")


def test_unusable_rows_are_counted_and_the_first_explained(data, capsys):
    """Guards: rows dropped in silence, so that an accuracy is over fewer questions than it
    seems."""
    good = talk(SAT, "No")
    bad = [talk(SAT, "No", image=None), talk("<image>", "No"), talk("Where?", ""),
           talk("Where?", "(3, 4)"), talk(SEARCH, "E"), talk("Where?", "(30, 20, 10, 40)"),
           talk("Where?", {"x": 1}), talk("Next?", "scroll [left]"),
           {"id": 1, "image": "image.png"}, talk("", "") | {"conversations": []}]
    path = data("a.jsonl", [good, *bad, good])
    questions = read(path)
    assert (len(questions), len(questions.skipped)) == (2, len(bad))
    assert questions.skipped[0].endswith("a.jsonl:2: it has no image")
    assert questions[1].where.endswith("a.jsonl:12")
    open_file(str(path))
    assert "2 questions\n10 rows cannot be used, the first: " in capsys.readouterr().out
    questions = read(data("a.jsonl", [{"comment": "ours"}, good]))
    assert len(questions) == 1
    assert ":1: unknown format, its fields are comment" in questions.skipped[0]


@pytest.mark.parametrize("row, why", [
    (talk(SAT, "No", image=None), "no image"),
    (PRO | {"bbox": [20, 30, 10, 40]}, "not the corners of a box in px"),
    (ATLAS | {"bbox": [20, 30, 40, 40]}, r"not the corners of a box in \[0, 1\]"),
    (ATLAS | {"bbox": "0 0 1 1"}, "do not hold what they should"),
    (SCREENSPOT | {"bbox": [1, 2, 3]}, "do not hold what they should"),
    (ROBOSPATIAL[0] | {"answer": "[(0.1, 0.3), (0.2, 3), (0.2, 0.5)]"}, r"no polygon in \[0, 1\]"),
    (talk("Where?", "(3, 4)"), "neither in words nor a box"),
    (talk(SEARCH, "E"), "none of its 3 options"),
    ({"problem": "Where?", "answer": "here"}, r"\(KeyError: 'images'\)"),
    (PRO | {"bbox": [float("nan"), 30, 40, 40]}, "not the corners of a box"),
    (PRO | {"bbox": [0, 0, float("inf"), 40]}, "not the corners of a box"),
    (ATLAS | {"bbox": [float("nan")] * 4}, "not the corners of a box"),
    (talk("Where?", float("nan")), "no answer in words"),
    (talk("Where?", float("inf")), "no answer in words"),
    (talk("Where?", float("-inf")), "no answer in words"),
    (talk("Where?", "\u200b\u2060"), "no answer in words"),
    (talk("Where?", " \n\u3000"), "no answer in words"),
    (talk("Where?", True), "no answer in words"),
    (talk("Where?", [20, 30, float("nan"), 40]), "neither in words nor a box"),
    (ROBOSPATIAL[0] | {"answer": "[(0.1, 0.3, 0), (0.2, 0.3, 0), (0.2, 0.5, 0)]"}, "no polygon"),
    (ROBOSPATIAL[0] | {"answer": "[(0.1, nan), (0.2, 0.3), (0.2, 0.5), (0, 0)]"}, "no polygon"),
    (hr_bench(B=None), "options, .* are not in words"),
    (hr_bench(D=["white"]), "options, .* are not in words"),
    (PRO | {"regions": [{"box": [1, 2, 3, 4], "name": " "}]}, "one of its regions has no name")])
def test_file_without_a_usable_row_is_an_error_that_says_why(data, row, why):
    """Guards: an evaluation over no questions; px taken for shares, or corners in disorder, by
    guessing from the numbers."""
    with pytest.raises(UserError, match=rf"no usable row among 2\. .*:1: .*{why}"):
        read(data("a.jsonl", [row, row]))


def test_half_characters_and_bytes_that_are_no_text(tmp_path):
    """Guards an evaluation that ends after its last answer, when it writes what no encoding has."""
    row = json.dumps(talk("<image>Which \ud83d?", "red \ude00")).encode()
    (tmp_path / "a.jsonl").write_bytes(row + b"\n" + row.replace(b"Which", b"W\xff\xfe"))
    for question in read(tmp_path / "a.jsonl"):
        assert f"{question.text} {question.answer}".encode()


def test_what_is_not_seen_is_written_out():
    """Guards terminal and page: escape sequences, marks that turn a line around, letters that are
    not seen; what a person writes stays as it is."""
    assert visible("a\u202eb\x00\n\tc\u2066") == "a[U+202E]b[U+0000]\n\tc[U+2066]"
    assert visible("\x1b[31m\u3164\u115f\u180e\ufff9\U000e0041\ud800\u2028") == (
        "[U+001B][31m[U+3164][U+115F][U+180E][U+FFF9][U+E0041][U+D800][U+2028]")
    assert visible("x" * 50, 10) == "x" * 10 + " ... (40 more characters)"
    assert visible("a\u034fb\u2800\ufe01c\U000e0101") == "a[U+034F]b[U+2800][U+FE01]c[U+E0101]"
    plain = "❤️ naïve 红色　שלום 👩\u200d🔬 ½ a\u00a0b"
    assert visible(plain) == plain


# ------------------------------------------------------------------------- files, splits, laziness

def test_no_image_is_opened_at_the_start(data, monkeypatch):
    """Guards: minutes of start-up, or gigabytes, for files of 100,000 rows."""
    monkeypatch.setattr(Image, "open", None)
    for path in (data("a.jsonl", [talk(SAT, "No")]), data("o.json", [ATLAS])):
        assert len(read(path)) == 1


def task(path, **other):
    settings = {"image_root": "", "seed": 0, "family": None, "max_pixels": None}
    return Namespace(task=str(path), **settings | other)


def keys(questions):
    return [question.key for question in questions]


def test_a_split_does_not_depend_on_other_rows(data, tmp_path):
    """Guards the final table: after one row was removed, or the rows were sorted anew, questions
    that were trained on were in it. The same content is always on one side."""
    rows = [talk(SAT, "No", image=f"{i}.png") for i in range(200)]
    for i in range(200):
        (tmp_path / f"{i}.png").symlink_to(tmp_path / "image.png")
    paths = [data("a.jsonl", [*rows, rows[0]]), data("b.jsonl", rows[:7] + rows[8:]),
             data("c.jsonl", rows[::-1])]
    splits = []
    for path in paths:
        train, test = (keys(questions_of(task(path), split, 150)) for split in ("train", "test"))
        assert not set(train) & set(test) and 8 < len(test) < 35
        assert test != keys(questions_of(task(path, seed=1), "test", 150))    # in another order
        splits.append((train, test))
    one, fewer, turned = [list(dict.fromkeys(test)) for _, test in splits]
    assert turned == one and [key for key in one if key in fewer] == fewer


def test_training_goes_around(data):
    """Guards resuming in the middle: the questions of a step depend on its number alone."""
    path = data("a.jsonl", [talk(f"<image>Which {i}?", "No") for i in range(40)])
    rest = set(keys(read(path))) - set(keys(questions_of(task(path), "test", 99)))
    all_of_them = keys(questions_of(task(path), "train", 100))
    n = len(rest)
    assert set(all_of_them) == rest and all_of_them[:n] == all_of_them[n:2 * n]
    assert keys(questions_of(task(path), "train", 7, 60)) == all_of_them[60:67]
    other = task(path, eval_task=str(data("b.jsonl", [talk(SAT, "No")])))
    assert len(set(keys(questions_of(other, "train", 40)))) == 40
    assert keys(questions_of(other, "test", 9)) == keys(read(other.eval_task))
    with pytest.raises(UserError, match="too few questions"):
        questions_of(task(other.eval_task), "test", 9)
    with pytest.raises(UserError, match="none of 3 questions"):
        gone = data("c.jsonl", [talk(SAT, "No", image="gone.png")])
        questions_of(task(gone, eval_task=gone), "train", 3)


def test_part_of_a_file_is_spread_over_it(data):
    """Guards: "the first n" of a sorted file: one category only."""
    file = read(data("a.jsonl", [talk(SAT, "No", id=i) for i in range(10)]))
    assert [q.id for q in file.part(4)] == ["0", "2", "5", "7"]
    assert file.part(99) == file.part() == file


@pytest.mark.parametrize("row, family, pixels", [
    (talk(SAT, "No"), "spatial", None), (talk(SEARCH, "A"), "search", 12_960_000),
    (POINT_RL, "gui", 12_960_000), (ACTION_RL, "web", 12_960_000), (PROBE, "search", 12_960_000),
    (ATLAS, "gui", 12_960_000), (ROBOSPATIAL[0], "spatial", None)])
def test_the_family_of_a_task(data, row, family, pixels):
    """Guards images of the wrong size: the paper's bounds differ by task, and in evaluation."""
    args = task(data("a.json", [row]))
    settle(args, training=False)
    assert args.family == family and (args.max_image_side or args.max_pixels) == (pixels or 1260)
    args = task(args.task, max_pixels=999)
    settle(args, training=True)
    assert args.max_pixels == 999 and args.max_image_side is None


def test_json_lines_in_a_json_file_and_the_reverse(data, tmp_path):
    """Guards: files named .json that hold lines, or .jsonl that hold a list, refused though they
    are plain to see."""
    data("a.jsonl", [talk(SAT, "No")] * 2).rename(tmp_path / "b.json")
    data("a.json", [talk(SAT, "No")] * 3).rename(tmp_path / "b.jsonl")
    assert len(read(tmp_path / "b.json")) == 2
    assert len(read(tmp_path / "b.jsonl")) == 3


def test_a_line_separator_inside_of_a_string(data, tmp_path):
    """Guards: a row torn in two at a character that Unicode calls the end of a line."""
    text = json.dumps(talk("<image>One\u2028two?", "No"), ensure_ascii=False)
    data("a.jsonl", [])
    (tmp_path / "a.jsonl").write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl")[0].text == "One\u2028two?"


def test_a_pipe_is_no_data_file(tmp_path):
    """Guards against waiting for ever for what nobody writes."""
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="a.jsonl: is no file"):
        read(tmp_path / "a.jsonl")
