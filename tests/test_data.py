"""The readers of the real data sets. The fixtures have the field names of the real files; their
contents are invented and their images drawn. What is at stake: a box in the wrong frame, or a row
scored by the wrong rule, gives a plausible number that is wrong."""
import json

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

import evaluate
from evaluate import open_file, parse_options, read_questions
from model import UserError
from reward import match_action, match_answer, match_point, option_text
from rollout import Frame

# ------------------------------------------------------------------------------------------ formats


def test_release_evaluation_row_becomes_a_choice(data):
    """Guards: the image placeholder reaches the model twice; the options are lost, so that letters
    cannot be matched."""
    question = read_questions(data("sat2_test.jsonl", [talk(SAT, "Yes, left")]))[0]
    assert "<image>" not in question.text and question.text.startswith("Question: Which way?")
    assert (question.kind, question.answer) == ("choice", "Yes, left")
    assert question.choices == ("Yes, left", "No")
    assert question.id == "7" and question.load()[0].size == (200, 100)


def test_release_row_with_lists_in_its_turn(data):
    """Guards: the second spelling of conversations, {"from": [...], "value": [...]}, read as one
    garbled turn."""
    lists = {"from": ["human", "gpt"], "value": [SAT, "No"]}
    rows = [talk("", "") | {"conversations": turns} for turns in (lists, [lists])]
    assert [q.answer for q in read_questions(data("rows.jsonl", rows))] == ["No", "No"]


def test_letter_and_text_name_the_same_option(data):
    """Guards: a truth given as a letter compared with an answer given as text (visual search
    against SAT)."""
    rows = [talk(SEARCH, answer) for answer in ("C", "(C)", "C.", "Dark green", "dark green.")]
    questions = read_questions(data("vigorl_SA_MCTS.jsonl", rows))
    assert [q.answer for q in questions] == ["C", "C", "C", "dark green", "dark green"]
    for question in questions:
        for said in ("C", "(c) dark green", "Dark green."):
            assert match_answer(said, question.answer, question.choices)
        assert not match_answer("red", question.answer, question.choices)


def test_options_that_are_letters_themselves(data):
    """Guards: V*'s label "A" taken for the option whose text is "A", and a text "A" for the
    label."""
    assert read_questions(data("test_questions.jsonl", [VSTAR]))[0].answer == "A"
    question = read_questions(data("other.jsonl", [talk(VSTAR["text"], "A")]))[0]    # the text of B
    assert question.answer == "B" and option_text(question.answer, question.choices) == "a"


@pytest.mark.parametrize("text, options", [
    ("Which?\n(A) red (B) dark blue (C) green", ("red", "dark blue", "green")),
    ("Is A. the nearest?\nAnswer Choices:\nA. Yes, left\nB) No\n", ("Yes, left", "No")),
    ("Point (A) is red, (B) is blue.\nWhich?\n(A) A is closer\n(B) B is closer",
     ("A is closer", "B is closer")),
    ("Is (A) or (B) nearer?\nAnswer Choices:\nA. the cup\nB. the box", ("the cup", "the box")),
    ("Is it (B) or (C)?", ()),
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
    questions = read_questions(file)
    assert [q.category for q in questions] == ["Multi-view_Reasoning", "relative_position", ""]


def test_release_rl_rows_for_pointing(data):
    """Guards: OS-Atlas boxes of the release taken for text; they are whole px of the file's image,
    corners."""
    question = read_questions(data("vigorl_osatlas_train_RL.jsonl", [POINT_RL]))[0]
    assert (question.kind, question.answer) == ("point", (20, 30, 40, 40))
    assert question.text == "Description: check sports news"


@pytest.mark.parametrize("answer, kind", [
    ("click [12]", "action"), ("type [3] [stop it (now)] [1]", "action"),
    ("scroll [down]", "action"), ("go_back", "action"), ("stop [N/A]", "action"),
    ("stop", "string"), ("Click here", "string"), ("yes", "string"), ("3", "string")])
def test_web_actions(data, answer, kind):
    """Guards: actions compared letter by letter; and words on a sign ("stop") taken for actions."""
    row = ACTION_RL | {"answer": answer}
    question = read_questions(data("vigorl_ical_train_RL.jsonl", [row]))[0]
    assert (question.kind, question.answer) == (kind, answer)
    assert kind != "action" or match_action(answer, question.answer)    # the reward can read it


def test_sft_file(data):
    """Guards: crops of a trace handed to the model as further images of the question."""
    question = read_questions(data("MCTS_72b_reasoning_chains_train.json", [SFT]))[0]
    assert [path.name for path in question.images] == ["image.png"]
    assert question.answer == "A" and question.text.startswith("What colour")


def test_two_images(data):
    """Guards: only the first of a question's images shown."""
    row = {"problem": "<image><image>Which is later?", "answer": "the second",
           "images": ["image.png", "image.png"]}
    assert len(read_questions(data("rl.jsonl", [row]))[0].load()) == 2


def test_screenspot_boxes_are_x_y_width_height(data):
    """Guards: ScreenSpot's and ScreenSpot-Pro's boxes mixed up; both files have the same field,
    with other meanings."""
    question = read_questions(data("screenspot_mobile_v2.json", [SCREENSPOT]))[0]
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
        questions = read_questions(path)
        assert [q.id for q in questions] == names
        assert questions[0].answer == (20, 30, 40, 40)
        assert questions[0].category == "Office | icon"
        questions[0].load()


def test_rows_of_a_folder_have_names_of_their_own(data):
    """Guards --traces: ScreenSpot's rows have no id, and row 1 of each of its files was "1": a
    trace met another's question."""
    for name in ("web", "mobile"):
        path = data(f"v2/{name}.json", [SCREENSPOT] * 2)
    assert [q.id for q in read_questions(path)] == ["1", "2"]
    names = [q.id for q in read_questions(path.parent)]
    assert names == ["mobile-1", "mobile-2", "web-1", "web-2"]


def test_os_atlas_boxes_are_shares_of_the_original_image(data, tmp_path):
    """Guards: shares taken for px; or scaled by another image's size."""
    draw(tmp_path / "other.png", size=(1000, 500))
    questions = read_questions(data("a.json", [ATLAS, ATLAS | {"img_filename": "other.png"}]))
    assert questions[0].answer == pytest.approx((20, 30, 40, 40))
    assert questions[1].answer == pytest.approx((100, 150, 200, 200))


def test_boxes_hit_what_is_drawn(data):
    """Guards: any mistake of frame: the middle of each format's box is on the rectangle in the
    file's own image."""
    for name, row in (("s.json", SCREENSPOT), ("p.json", PRO), ("o.json", ATLAS)):
        question = read_questions(data(name, [row]))[0]
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
        question = read_questions(data("a.json", [row | {"img_filename": "photo.jpg"}]))[0]
        x1, y1, x2, y2 = question.answer
        image = question.load()[0]
        assert image.size == (200, 100) and question.answer == pytest.approx((20, 30, 40, 40))
        red, green, _ = image.getpixel((int((x1 + x2) / 2), int((y1 + y2) / 2)))
        assert red > 200 and green < 50


def test_robospatial(data):
    """Guards: the polygon left in [0, 1] while points are said in px; the question still asking for
    points in [0, 1]."""
    point, yes = read_questions(data("annotations.json", ROBOSPATIAL))
    assert point.kind == "point" and point.text == "Point to the space left of the cup."
    corners = [pytest.approx(corner) for corner in point.answer]
    assert corners == [(20, 30), (40, 30), (40, 50)]
    assert (yes.kind, yes.answer, yes.category) == ("string", "Yes", "configuration")


def test_hr_bench(data, monkeypatch):
    """Guards: a cell of megabytes refused by csv; images decoded before they are asked for; cycles
    mixed up; a quoted cell of two lines read as two rows."""
    rows = [hr_bench(400, index=i, cycle_category=i) for i in range(2)]
    assert len(rows[0]["image"]) > 131072                      # csv's own limit
    path = data("hr_bench_4k.tsv", rows)
    monkeypatch.setattr(evaluate, "read_image", None)
    question = read_questions(path)[1]
    monkeypatch.undo()
    assert question.text == 'Which "one"?\nLook.\n(A) red\n(B) blue\n(C) green\n(D) white'
    assert (question.kind, question.answer) == ("choice", "C")
    assert question.category == "single | cycle 1" and question.id == "1"
    assert match_answer("green", question.answer, question.choices)
    assert question.load()[0].size == (400, 400)


def test_an_embedded_image_that_is_none(data):
    """Guards: base64 that ends in the middle, told without its row."""
    path = data("a.tsv", [hr_bench(), hr_bench() | {"image": "iVBORw0KGgo"}])
    with pytest.raises(UserError, match=r"a\.tsv:2\): cannot be read as an image"):
        read_questions(path)[1].load()


def test_visual_probe(data):
    """Guards: VisualProbe's `solution` not found where others have `answer`."""
    question = read_questions(data("val.json", [PROBE]))[0]
    assert (question.kind, question.answer) == ("string", "EXIT")
    assert (question.id, question.category) == ("d1", "hard")


# --------------------------------------------------------------------------------------- bad input

def test_missing_image_names_the_row_and_the_flag(data, tmp_path):
    """Guards: a wrong --image-root found out only when training has begun."""
    gone = talk(SAT, "No", image="gone.png")
    with pytest.raises(UserError, match=r"a\.jsonl:1: no such image, .*gone\.png; .*--image-root"):
        read_questions(data("a.jsonl", [gone]))
    with pytest.raises(UserError, match="--image-root"):
        read_questions(data("a.jsonl", [talk(SAT, "No")]), image_root=tmp_path / "elsewhere")
    second = read_questions(data("a.jsonl", [talk(SAT, "No"), gone]))[1]
    with pytest.raises(UserError, match=r"gone\.png \(.*a\.jsonl:2\)"):
        second.load()


def test_image_root(data, tmp_path):
    """Guards: relative paths of the release not joined to the folder that was given, or to one
    above the file."""
    draw(tmp_path / "far" / "vstar" / "x.png")
    path = data("near/visual_search/a.jsonl", [talk(SAT, "No", image="vstar/x.png")])
    assert read_questions(path, image_root=tmp_path / "far")[0].load()
    draw(tmp_path / "near" / "vstar" / "x.png")
    assert read_questions(path)[0].load()


def test_unreadable_image(data, tmp_path):
    """Guards: a traceback of the image library's, without the name of the file or row."""
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows = {"a.jsonl": talk(SAT, "No", image="broken.png"),
            "o.json": ATLAS | {"img_filename": "broken.png"}}
    for name, row in rows.items():
        path = data(name, [row])
        with pytest.raises(UserError, match=r"broken\.png .*:1\): cannot be read as an image"):
            read_questions(path)[0].load()


@pytest.mark.parametrize("name, text, line", [
    ("a.jsonl", json.dumps(talk(SAT, "No")) + '\n\n{"id": 3, "conv', 3),
    ("a.jsonl", '{"id": 1, "conv\n{"id": \n', 1),
    ("a.jsonl", '{"id": 1}\n{"id":\n', 2), ("a.json", '[\n{"id": 1},\n{"id": }\n]', 3),
    ("a.jsonl", "\x00\x01 binary", 1)])
def test_broken_json_names_the_line(tmp_path, name, text, line):
    """Guards: "Expecting value: line 1 column 1" in a file of 100,000 lines."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: cannot be read"):
        read_questions(tmp_path / name)


def test_unknown_fields_are_named(data):
    """Guards: a format guessed from a row that fits none; the message says what was seen and what
    is known."""
    known = r"its fields are caption, picture\. Known are: .*V\*Bench \(text, label, "
    with pytest.raises(UserError, match=known):
        read_questions(data("a.jsonl", [{"picture": "image.png", "caption": "a cup"}]))
    with pytest.raises(UserError, match="unknown format"):
        read_questions(data("a.json", [[1, 2]]))


def test_files_that_are_not_read(tmp_path):
    """Guards: a traceback for parquet, a missing file, or an empty one."""
    cases = {"test.parquet": "jsonl files of the ViGoRL release", "gone.jsonl": "No such file",
             "": "no usable row"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no usable row"):
        read_questions(tmp_path / "empty.jsonl")


def test_unusable_rows_are_counted_and_the_first_explained(data, capsys):
    """Guards: rows dropped in silence, so that an accuracy is over fewer questions than it
    seems."""
    good = talk(SAT, "No")
    bad = [talk(SAT, "No", image=None), talk("<image>", "No"), talk("Where?", ""),
           talk("Where?", "(3, 4)"), talk(SEARCH, "E"), talk("Where?", "(30, 20, 10, 40)"),
           talk("Where?", {"x": 1}), talk("Next?", "scroll [left]"),
           {"id": 1, "image": "image.png"}, talk("", "") | {"conversations": []}]
    path = data("a.jsonl", [good, *bad, good])
    questions = read_questions(path)
    assert (len(questions), len(questions.skipped)) == (2, len(bad))
    assert questions.skipped[0].endswith("a.jsonl:2: it has no image")
    assert questions[1].where.endswith("a.jsonl:12")
    open_file(str(path))
    assert "2 questions\n10 rows cannot be used, the first: " in capsys.readouterr().out
    questions = read_questions(data("a.jsonl", [{"comment": "ours"}, good]))
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
    ({"problem": "Where?", "answer": "here"}, "no field 'images'")])
def test_file_without_a_usable_row_is_an_error_that_says_why(data, row, why):
    """Guards: an evaluation over no questions; px taken for shares, or corners in disorder, by
    guessing from the numbers."""
    with pytest.raises(UserError, match=rf"no usable row among 2\. .*:1: .*{why}"):
        read_questions(data("a.jsonl", [row, row]))


# ----------------------------------------------------------------------------------------- laziness

def test_no_image_is_opened_at_the_start(data, monkeypatch):
    """Guards: minutes of start-up, or gigabytes, for files of 100,000 rows; an image that is kept
    in memory because its size was needed."""
    paths = [data("a.jsonl", [talk(SAT, "No")]), data("o.json", [ATLAS])]
    monkeypatch.setattr(Image, "open", None)
    files = [read_questions(path) for path in paths]
    assert files[0][0].answer == "No"
    monkeypatch.undo()
    question = files[1][0]
    assert question.kind == "point" and question.loaded is None


def test_a_question_is_a_copy(data):
    """Guards a question that is asked twice at a time: what one rollout loads and releases must not
    be the other's."""
    file = read_questions(data("a.jsonl", [talk(SAT, "No")]))
    one, two = file[0], file[0]
    one.load()
    assert one is not two and two.loaded is None


def test_part_of_a_file_is_spread_over_it(data):
    """Guards: "the first n" of a sorted file: one category only; and a file that is read twice."""
    path = str(data("a.jsonl", [talk(SAT, "No", id=i) for i in range(10)]))
    part = open_file(path, "", 4)
    assert [q.id for q in part] == ["0", "2", "5", "7"]
    assert part.questions[1] is open_file(path, "").questions[2]
    assert len(open_file(path, "", 99)) == 10


def test_json_lines_in_a_json_file_and_the_reverse(data, tmp_path):
    """Guards: files named .json that hold lines, or .jsonl that hold a list, refused though they
    are plain to see."""
    data("a.jsonl", [talk(SAT, "No")] * 2).rename(tmp_path / "b.json")
    data("a.json", [talk(SAT, "No")] * 3).rename(tmp_path / "b.jsonl")
    assert len(read_questions(tmp_path / "b.json")) == 2
    assert len(read_questions(tmp_path / "b.jsonl")) == 3


def test_a_line_separator_inside_of_a_string(data, tmp_path):
    """Guards: a row torn in two at a character that Unicode calls the end of a line."""
    text = json.dumps(talk("<image>One\u2028two?", "No"), ensure_ascii=False)
    data("a.jsonl", [])
    (tmp_path / "a.jsonl").write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    assert read_questions(tmp_path / "a.jsonl")[0].text == "One\u2028two?"
