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
from pytest import approx

from evaluate import open_file, settle, usable
from model import UserError
from reward import match_action, match_answer, parse_options, scored_by
from rollout import visible
from train_sft import questions_of


def read(path, image_root=""):
    """open_file, without its memory of a path that a test writes to twice."""
    return open_file.__wrapped__(path, image_root)


def ready(questions):
    """Those that can be asked."""
    return [question for part in usable(questions) for question in part]


# ------------------------------------------------------------------------------------------ formats


POINTING = {"kind": "point", "answer": approx((20, 30, 40, 40))}
YES_OR_NO = {"kind": "choice", "choices": ("Yes, left", "No")}
TWO = {"problem": "<image><image>Which is later?", "answer": "B", "images": ["image.png"] * 2}


@pytest.mark.parametrize("row, expected", [
    (talk(SAT, "Yes, left"), YES_OR_NO | {"answer": "Yes, left", "id": "7", "shown": [(200, 100)]}),
    (talk("", "") | {"conversations": {"value": [SAT, "No"]}}, YES_OR_NO | {"answer": "No"}),
    (SFT, {"answer": "A", "choices": ("red", "blue", "dark green"), "shown": [(200, 100)]}),
    (TWO, {"text": "Which is later?", "shown": [(200, 100)] * 2}),
    (POINT_RL, POINTING | {"text": "Description: check sports news"}),
    (ACTION_RL, {"kind": "action", "answer": "click [12]"}),
    (VSTAR, {"kind": "choice", "answer": "A", "choices": ("B", "A")}),
    (SCREENSPOT, POINTING | {"text": "Description: send", "category": "mobile | text"}),
    (PRO, POINTING | {"category": "Office | icon"}),
    (ATLAS | {"img_filename": "other.png"}, {"answer": approx((100, 150, 200, 200))}),
    (ROBOSPATIAL[0], {"text": "Point to the space left of the cup.", "kind": "point",
                      "answer": [approx((20, 30)), approx((40, 30)), approx((40, 50))],
                      "category": "RoboSpatial-Home, context"}),
    (ROBOSPATIAL[1], {"kind": "string", "answer": "Yes",
                      "category": "RoboSpatial-Home, yes or no | configuration"}),
    (PROBE, {"kind": "string", "answer": "EXIT", "id": "d1", "category": "hard"}),
    (hr_bench(A=3, B=4.5, C=7), {"choices": ("3", "4.5", "7", "white"), "id": "0"})])
def test_a_row_of_each_format(data, tmp_path, row, expected):
    """Guards the meaning of each format's fields: a box is corners or sides, px or shares of its
    own image; a letter, a text, a number is an option; crops of a trace are not shown."""
    draw(tmp_path / "other.png", size=(1000, 500))
    question, = ready(read(data("rows.jsonl", [row])))
    shown = [image.size for image in question.load()]
    assert expected.items() <= (vars(question) | {"shown": shown}).items()
    assert "<image>" not in question.text


def test_options_that_are_letters_themselves(data):
    """Guards: V*'s label "A" taken for the option whose text is "A", and a text "A" for the
    label."""
    assert scored_by(VSTAR["text"], "A")["answer"] == "B"                  # the text of B
    assert scored_by(VSTAR["text"], "A", label=True)["answer"] == "A"


@pytest.mark.parametrize("text, options", [
    ("Which?\n(A) red (B) dark blue (C) green", ("red", "dark blue", "green")),
    ("Is A. the nearest?\nAnswer Choices:\nA. Yes, left\nB) No\n", ("Yes, left", "No")),
    ("Point (A) is red, (B) is blue.\nWhich?\n(A) A is closer\n(B) B is closer",
     ("A is closer", "B is closer")),
    ("Is (A) or (B) nearer?\nAnswer Choices:\nA. the cup\nB. the box", ("the cup", "the box")),
    ("(A) red (left) or (B) blue (right). Please answer with (A), (B).",
     ("red (left)", "blue (right)")),
    ("Is it (B) or (C)?", ()), ("Is it (A), (B) or (C)?", ()),
    ("A. Turing wrote what?", ()),
])
def test_options_are_parsed(text, options):
    """Guards: options on one line, after a preamble that looks like options, or imagined where
    there are none."""
    assert parse_options(text) == options


@pytest.mark.parametrize("hint", [
    "\nAnswer with (A), (B) or (C).", "\nSay (B) if unsure, (A) or (C) else.",
    "\nHint: reply with (C)", "\nE.g. \"(A)\". Please write (A) or (B) or (C)!",
    ". Give only the letter.", ". Write (A), (B) or (C)!", ". Note: one of them is right."])
def test_a_hint_behind_options_is_none_of_them(hint):
    """Guards options lost, or made of the words of a hint that names letters, in any order."""
    for text in ("Which?\n(A) red\n(B) blue\n(C) green", "Which? (A) red, (B) blue or (C) green"):
        assert parse_options(text + hint) == ("red", "blue", "green")


@pytest.mark.parametrize("fields, category", [
    ({"question_type": "obj_movement", "data_source": "sat"}, "obj_movement"),
    ({"category": "hard", "question_type": "action"}, "hard"),
    ({"category": "", "sub_task": None, "question_type": 7}, "7"),
    ({"sub_task": "Counting", "id": "val_Jigsaw_3"}, "Counting"),
    ({"id": "val_Multi-view_Reasoning_12"}, "Multi-view_Reasoning"), ({"id": "sat_12"}, ""),
    ({"image": "vstar/relative_position/sa_1.png"}, "relative_position")])
def test_categories(data, fields, category):
    """Guards the figures by category, which SAT and BLINK have under names of their own, and the
    release's rows, which have no field for it, in an id or an image's path."""
    question, = read(data("a.jsonl", [talk(SAT, "No") | fields]))
    assert question.category == category


PAGE, SIGN = ACTION_RL["problem"], "What does the sign say?"


@pytest.mark.parametrize("text, truth, kind", [
    (PAGE, "type [3] [stop it (now)] [1]", "action"), (SIGN, "Click [7]", "action"),
    (PAGE, "go_back", "action"), (PAGE, "stop", "action"), (PAGE, "Scroll  up", "action"),
    (PAGE, "stop it", "string"), (PAGE, "Click here", "string"), (SIGN, "stop", "string"),
    ("Which?\n(A) go\n(B) stop", "stop", "choice")])
def test_web_actions(text, truth, kind):
    """Guards: actions compared letter by letter, and those without brackets taken for words;
    "stop", which is an action on a web page alone. The reward can read what is kept."""
    found = scored_by(text, truth)
    match = match_action if kind == "action" else match_answer
    assert found["kind"] == kind and match(truth, found["answer"])


def test_screenspot_pro_folder(data, tmp_path):
    """Guards: images that lie in ../images beside annotations not found."""
    folder = tmp_path / "pro"
    draw(folder / "images" / "word.png")
    for name in ("a", "b"):
        data(f"pro/annotations/{name}.json", [PRO | {"img_filename": "word.png", "id": name}])
    for path, names in ((folder, ["a", "b"]), (folder / "annotations", ["a", "b"]),
                        (folder / "annotations" / "a.json", ["a"])):
        assert [question.id for question in ready(read(path))] == names


@pytest.mark.parametrize("orientation, turn", [
    (3, Image.Transpose.ROTATE_180), (5, Image.Transpose.TRANSPOSE),
    (6, Image.Transpose.ROTATE_90)])
def test_boxes_of_photographs_that_lie_on_their_side(data, tmp_path, orientation, turn):
    """Guards EXIF: shares scaled by the size that the file's header has, while the image is loaded
    upright. In px of the image as a person sees it, the box is that of the red rectangle."""
    upright = Image.open(draw(tmp_path / "upright.png", box=(20, 30, 39, 39)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(turn).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    question, = ready(read(data("a.json", [ATLAS | {"img_filename": "photo.jpg"}])))
    image, = question.load()
    assert image.size == (200, 100) and question.answer == approx((20, 30, 40, 40))
    red, green, _ = image.getpixel((30, 35))
    assert red > 200 and green < 50


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


@pytest.mark.parametrize("truth, answer", [
    ("A. red", "A"), ("(b)", "B"), ("Blue.", "blue"), ("（Ｂ）", "B"),
    ("（Ａ） red", "A"), ("Ａ．", "A"), ("ｂｌｕｅ", "blue"), ("\\boxed{B}", "B"),
    ("B - blue", "B")])
@pytest.mark.parametrize("text", [
    "Which?\n(A) red\n(B) blue", "Which?\nA、red\nB、blue\nAnswer A or B。",
    "（Ａ）red，（Ｂ）blue。Please answer（A）or（B）。"])
def test_truths_as_the_policy_writes_them(text, truth, answer):
    """Guards a truth read as a text that no answer equals, though an answer in that form counts;
    in narrow letters and in wide ones."""
    found = scored_by(text, truth)
    assert (found["kind"], found["answer"]) == ("choice", answer)
    for said in (truth, answer, f" {answer}。"):
        assert match_answer(said, found["answer"], found["choices"])
    assert not match_answer("green", found["answer"], found["choices"])


@pytest.mark.parametrize("truth", [[20, 30, 40, 40], "20, 30, 40, 40", "（20，30，40，40）",
                                   "(20,30,40,40)."])
def test_boxes_in_any_brackets(truth):
    """Guards a box in JSON refused, and one without brackets taken for a text."""
    assert scored_by("Where?", truth) == {"kind": "point", "answer": (20, 30, 40, 40)}


def test_regions(data):
    """Guards the places that figures are measured by: kept as they are in the row, with the names
    of the whole file; a box that is none makes the row unusable."""
    good = [{"box": [20, 30, 40, 40], "name": "red"}], [{"box": [0, 0, 9, 9], "name": "sky"}], None
    bad = [{"box": [9, 9, 0, 0], "name": "sky"}], [{"box": [0, 0, 9, 9]}], [7], "sky"
    file = read(data("a.jsonl", [talk(SAT, "No", regions=regions) for regions in (*good, *bad)]))
    assert [[region["name"] for region in q.regions] for q in file] == [["red"], ["sky"], []]
    assert file[0].regions[0]["box"] == (20, 30, 40, 40) and len(file.skipped) == 4
    assert all(question.names == {"red", "sky"} for question in file)


# -------------------------------------------------------------------------- images, one row's fault

def test_a_bad_image_costs_its_row_alone(data, tmp_path, capsys):
    """Guards an evaluation that ends at a photograph cut off: the row is skipped and named, once,
    whatever is wrong with its image."""
    photo = draw(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photo[:len(photo) * 2 // 3])
    (tmp_path / "broken.png").write_bytes(b"not an image")
    names = ["image.png", "cut.jpg", "broken.png", "gone.png", "data:image/png;base64,AAAA"]
    file = read(data("a.jsonl", [talk(SAT, "No", image=name) for name in names]))
    for _ in range(2):
        assert ready(file) == file[:1]
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
    ("a.jsonl", '{"id": 1, "conv\n{"id": \n', 1), ("a.json", '[\n{"id": 1},\n{"id": }\n]', 3)])
def test_broken_json_names_the_line(tmp_path, name, text, line):
    """Guards: "Expecting value: line 1 column 1" in a file of 100,000 lines."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("name, message", [
    ("test.parquet", "jsonl files of the ViGoRL release"), ("gone.jsonl", "No such file"),
    ("", "no usable row"), ("empty.jsonl", "no usable row"), ("pipe.jsonl", "is no file")])
def test_files_that_are_not_read(tmp_path, name, message):
    """Guards: a traceback for parquet, a missing file, or an empty one; waiting for ever for what
    nobody writes to a pipe."""
    (tmp_path / "empty.jsonl").write_text("\n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_unusable_rows_are_counted_and_the_first_explained(data, capsys):
    """Guards: rows dropped in silence, so that an accuracy is over fewer questions than it seems;
    a format guessed from a row that fits none."""
    good, bad = talk(SAT, "No"), talk(SAT, "No", image=None)
    path = data("a.jsonl", [{"comment": "ours"}, good, bad, good])
    questions = open_file(str(path))
    assert "2 questions\n2 rows cannot be used, the first: " in capsys.readouterr().out
    assert [question.where[-2:] for question in questions] == [":2", ":4"]
    assert ":1: unknown format, its fields are comment" in questions.skipped[0]
    assert questions.skipped[1].endswith("a.jsonl:3: it has no image")


@pytest.mark.parametrize("row, why", [
    ({"picture": "image.png", "caption": "a cup"},
     r"its fields are caption, picture\. Known are: .*V\*Bench \(text, label, "),
    (7, "unknown format"),
    (talk(SAT, "No", image=None), "no image"),
    (talk("<image>", "No"), "no question"),
    (talk("", "") | {"conversations": []}, "do not hold what they should"),
    ({"problem": "Where?", "answer": "here"}, r"\(KeyError: 'images'\)"),
    (talk("Next?", "scroll [left]"), "do not hold what they should"),
    (PRO | {"bbox": [20, 30, 10, 40]}, "not the corners of a box in px"),
    (PRO | {"bbox": [float("nan"), 30, 40, 40]}, "not the corners of a box"),
    (ATLAS | {"bbox": [20, 30, 40, 40]}, r"not the corners of a box in \[0, 1\]"),
    (ROBOSPATIAL[0] | {"answer": "[(0.1, 0.3), (0.2, 3), (0.2, 0.5)]"}, r"no polygon in \[0, 1\]"),
    (ROBOSPATIAL[0] | {"answer": "[(0.1, 0.3, 0), (0.2, 0.3, 0), (0.2, 0.5, 0)]"}, "no polygon"),
    (talk("Where?", "(3, 4)"), "neither in words nor a box"),
    (talk("Where?", [20, 30, float("nan"), 40]), "neither in words nor a box"),
    (talk(SEARCH, "E."), "none of its 3 options"),
    (talk(SEARCH, "（Ｄ）"), "none of its 3 options"),
    (talk("Where?", float("nan")), "no answer in words"),
    (talk("Where?", {"x": 1}), "no answer in words"),
    (talk("Where?", "\u200b\u2060"), "no answer in words"),
    (hr_bench(B=None), "options, .* are not in words"),
    (hr_bench(answer="E"), "none of its 4 options"),
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
    assert visible("a\u202eb\x00\n\tc") == "a[U+202E]b[U+0000]\n\tc"
    assert visible("\x1b[31m\u3164\u2800\ufff9\U000e0041\ud800\u2028") == (
        "[U+001B][31m[U+3164][U+2800][U+FFF9][U+E0041][U+D800][U+2028]")
    assert visible("x" * 50, 10) == "x" * 10 + " ... (40 more characters)"
    plain = "❤️ naïve 红色　שלום 👩\u200d🔬 ½ a\u00a0b"
    assert visible(plain) == plain


# ------------------------------------------------------------------------- files, splits, laziness

def test_no_image_is_opened_at_the_start(data, monkeypatch):
    """Guards: minutes of start-up, or gigabytes, for files of 100,000 rows."""
    monkeypatch.setattr(Image, "open", None)
    assert len(read(data("a.json", [ATLAS]))) == 1


def task(path, **other):
    settings = {"image_root": "", "seed": 0, "family": None, "max_pixels": None}
    return Namespace(task=str(path), **settings | other)


def keys(questions):
    return [question.key for question in questions]


def test_a_split_does_not_depend_on_other_rows(data, tmp_path):
    """Guards the final table: after one row was removed, or the rows were sorted anew, questions
    that were trained on were in it. The same content is always on one side."""
    rows = [talk(SAT, "No", image=f"{i}.png") for i in range(100)]
    for i in range(100):
        (tmp_path / f"{i}.png").symlink_to(tmp_path / "image.png")
    splits = []
    for some in ([*rows, rows[0]], rows[:7] + rows[8:], rows[::-1]):
        path = data(f"{len(splits)}.jsonl", some)
        train, test = (keys(questions_of(task(path), split, 75)) for split in ("train", "test"))
        assert not set(train) & set(test) and 4 < len(test) < 18
        assert test != keys(questions_of(task(path, seed=1), "test", 75))     # in another order
        splits.append(list(dict.fromkeys(test)))
    one, fewer, turned = splits
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
    gone = data("c.jsonl", [talk(SAT, "No", image="gone.png")])
    with pytest.raises(UserError, match="none of 3 questions"):
        questions_of(task(gone, eval_task=gone), "train", 3)


def test_part_of_a_file_is_spread_over_it(data):
    """Guards: "the first n" of a sorted file: one category only."""
    file = read(data("a.jsonl", [talk(SAT, "No", id=i) for i in range(10)]))
    assert [q.id for q in file.part(4)] == ["0", "2", "5", "7"]
    assert file.part(99) == file.part() == file


@pytest.mark.parametrize("row, family, pixels", [
    (talk(SAT, "No"), "spatial", None), (talk(SEARCH, "A"), "search", 12_960_000),
    (POINT_RL, "gui", 12_960_000), (ACTION_RL, "web", 12_960_000), (PROBE, "search", 12_960_000)])
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
    are plain to see; a row torn in two at a character that Unicode calls the end of a line."""
    row = json.dumps(talk("<image>One\u2028two?", "No"), ensure_ascii=False)
    (tmp_path / "b.json").write_text(f"\ufeff{row}\r\n{row}\r\n", encoding="utf-8")
    assert [question.text for question in read(tmp_path / "b.json")] == ["One\u2028two?"] * 2
    data("a.json", [talk(SAT, "No")] * 3).rename(tmp_path / "b.jsonl")
    assert len(read(tmp_path / "b.jsonl")) == 3
