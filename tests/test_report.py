"""What the pages promise: the report of a run, the rating page, and what raters said."""
import base64
import html
import io
import json
import re
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
from PIL import Image

import evaluate as evaluation
import train_rl
import train_sft as sft
from evaluate import fleiss_kappa, picture_uri, visible
from model import UserError
from rollout import TOYS, Config, Frame, Question, Trace, crop_box, format_call, parse_turn, toy

HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>\"'&" \
          "<!-- \x00\x07\u202eright to left\u2066\u2028\u2029 ]]> \ud800 {DATA}"
LONG = "a word " * 15_000                                # 100 kB


def make_trace(question, *texts, ended="answer", size=(256, 256)):
    """A Trace of turns with these texts; each zoom call is answered by a crop."""
    turns = [parse_turn(text) for text in texts]
    frame = Frame((64, 64), size)
    for turn in turns:
        if turn.call and frame.contains(turn.call):
            turn.crop = crop_box(size, frame.to_original(turn.call), 32)
    return Trace(None, question=question, frames=[frame], turns=turns, ended=ended)


def call_turn(point, thought="Card 1 at"):
    x, y = point
    return f"<think>{thought} ({x}, {y}).</think>\n{format_call(point)}"


def answer_turn(answer, thought="Dotted."):
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def drawn_traces(answers, points=((11, 56),)):
    """A trace with an answer for each of the first questions of toy-search."""
    traces = []
    for index, answer in enumerate(answers):
        question = toy("toy-search", "test", 0, index)
        right = question.answer if answer else "nothing"
        calls = [call_turn(point) for point in points]
        traces.append(make_trace(question, *calls, answer_turn(right)))
    return traces


def data_of(path):
    """The data of a page, as its script reads it."""
    found = re.findall(r'<script id="data" type="application/json">(.*?)</script>',
                       path.read_text(), re.S)
    assert len(found) == 1
    return json.loads(found[0])


def image_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


LOG = [{"step": step, "reward": step / 10, "accuracy": 0.5, "accuracy_low": 0.4,
        "accuracy_high": 0.6, "format": 1.0, "grounded": 1.0, "diversity": 0.0, "zoom_calls": 1.5,
        "overlong": 0.0, "tokens": 2000,
        "kl": float("nan") if step == 2 else 0.01, "seconds": 1.5} for step in (1, 2, 3)]


@pytest.fixture
def report(tmp_path):
    """The page of a run with two checkpoints and three questions, and its folder."""
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (tmp_path / "trees.txt").write_text("1 visits, value 1.00: first\n\n1 visits: second\n")
    traces = {"sft": drawn_traces([False, True, True]), "rl": drawn_traces([True, False, True])}
    traces["rl"][2].ended = "truncated"
    rows = [["", "accuracy"], ["sft", "0.667"], ["rl", "0.333"]]
    evaluation.write_report(tmp_path / "report.html", Config(), traces, tmp_path, rows)
    return tmp_path / "report.html"


# ------------------------------------------------------------------------------- what a page holds

def test_a_report_has_all_of_a_run(report):
    """A page without its curves, or with the traces of a question in different places."""
    data = data_of(report)
    assert [json.loads(line)["step"] for line in data["log"].splitlines()] == [1, 2, 3]
    assert data["table"][2] == ["rl", "0.333"]
    assert data["settings"]["task"] == "toy-search"
    assert data["tree"] == "1 visits, value 1.00: first"
    assert [case["checkpoints"] for case in data["cases"]] == [["sft", "rl"]] * 3
    states = [[trace["state"] for trace in case["traces"]] for case in data["cases"]]
    assert states == [["wrong", "right"], ["right", "wrong"], ["right", "truncated"]]
    case = data["cases"][0]
    assert case["truth"] == "dotted" and image_of(case["image"]).size == (256, 256)
    assert case["traces"][1]["reward"]["total"] == 1 > case["traces"][0]["reward"]["total"]


def test_the_interval_of_a_step_is_over_its_questions():
    """Traces of a question are alike; taken as independent, they made the interval too narrow."""
    rows = [{"id": name, "correct": name == "a", "total": 0.0, "format": 1.0, "grounded": 1.0,
             "diversity": 0.0, "zoom_calls": 1, "ended": "answer", "on_target": [],
             "true_thoughts": []} for name in "aaaabbbb"]
    line = train_rl.describe_rows(rows)
    assert (line["accuracy_low"], line["accuracy_high"]) == evaluation.interval([1, 0])


def test_a_page_needs_nothing_else(report):
    """A page that loads a script, a style or a picture is empty offline."""
    text = report.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert "@import" not in text and "url(" not in text


def test_points_are_numbered_where_they_are():
    """Points of the model input were drawn as if they were of the image; a zoom call counted as a
    second point beside that of its thought."""
    question = toy("toy-search", "test", 0, 0)
    trace = make_trace(question, call_turn((11, 56)), call_turn((60, 2)), call_turn((11, 56)),
                       answer_turn("dotted", "At (99, -5)."))
    case, = evaluation.describe_cases({"rl": [trace]})
    points = case["traces"][0]["points"]
    assert [point["text"] for point in points] == ["(11, 56)", "(60, 2)", "(11, 56)", "(99, -5)"]
    assert points[0]["at"] == (44, 224)
    assert [point["inside"] for point in points] == [True, True, True, False]
    on_target = [evaluation.on_target(question, point["at"]) for point in points]
    assert on_target == [True, False, True, False]
    first, second, rest = case["traces"][0]["turns"][0]["pieces"]
    assert first == ["<think>Card 1 at (11, 56)", 0] and second[1] == 0 and rest[1] is None
    texts = ["".join(text for text, _ in turn["pieces"]) for turn in case["traces"][0]["turns"]]
    assert texts == [turn.text for turn in trace.turns]


@pytest.mark.parametrize("answer", [(20, 30, 40, 80), [[20, 30], [40, 30], [40, 80]]])
def test_the_region_of_a_truth_is_shown(answer):
    """Only a text was shown of a truth that is a place."""
    question = Question("send", [Image.new("RGB", (200, 100))], answer, "point")
    trace = make_trace(question, answer_turn("(10, 32)"), size=(200, 100))
    case, = evaluation.describe_cases({"rl": [trace]})
    assert case["region"] == answer
    assert evaluation.on_target(question, case["traces"][0]["points"][0]["at"]) is True


def test_a_question_without_truth_is_neither_right_nor_wrong():
    """One's own question has no truth; its answer was called wrong."""
    question = Question("which?", [Image.new("RGB", (9, 9))], "")
    case, = evaluation.describe_cases({"rl": [make_trace(question, answer_turn("red"))]})
    assert case["traces"][0]["state"] == "open"


# ------------------------------------------------------------------------- what others have written

def hostile_page(path):
    """A report in which every text is hostile."""
    texts = HOSTILE, HOSTILE + LONG
    for name in ("log.jsonl", "trees.txt"):
        (path / name).write_text("" if name == "log.jsonl" else HOSTILE, errors="replace")
    traces = []
    for text in texts:
        question = Question(text, [Image.new("RGB", (64, 64))], text, id=text, category=text)
        traces.append(make_trace(question, f"<think>{text} (5, 5)</think>{format_call((5, 5))}",
                                 f"{text}<tool_call>{text}</tool_call>", answer_turn(text)))
    traces[0].turns[1].error = HOSTILE
    own = HOSTILE.replace("\ud800", "")                 # what a user can give
    config = Config(task=own, model=own)
    evaluation.write_report(path / "hostile.html", config, {own: traces}, path, [[own]] * 2)
    return path / "hostile.html"


def test_no_text_leaves_its_place(tmp_path):
    """A model that writes "</script>" could end the page's script and begin its own."""
    text = hostile_page(tmp_path).read_text()
    assert len(re.findall("<script", text, re.I)) == 2 == len(re.findall("</script", text, re.I))
    assert "<!--" not in text and "<img" not in text
    assert text.isascii()
    assert len(text) < 150_000                          # of 100 kB in each of ten places
    case = data_of(tmp_path / "hostile.html")["cases"][1]
    assert case["question"].startswith("</script><script>")
    assert case["question"].endswith(" more characters)")


def test_what_is_not_seen_is_written_out():
    """A right-to-left mark turns the rest of a line around; a control character is not seen."""
    assert visible("a\u202eb\x00\n\tc\u2066") == "a[U+202E]b[U+0000]\n\tc[U+2066]"
    assert visible("x" * 50, 10) == "x" * 10 + " ... (40 more characters)"
    assert visible("naïve 红色 שלום") == "naïve 红色 שלום"


def test_pictures_are_small():
    """Fifty photographs of 12 megapixels made a page that no browser opened."""
    noise = np.random.default_rng(0).integers(0, 255, (900, 1500, 3), dtype=np.uint8)
    for most in (45_000, 6_000, 100):
        uri = picture_uri(Image.fromarray(noise), most)
        assert len(uri) < max(most, 2_000) * 4 / 3 + 40
        width, height = image_of(uri).size
        assert abs(width / height - 1500 / 900) < 0.1
    drawing = toy("toy-search", "test", 0, 0).load()[0]
    assert np.array_equal(image_of(picture_uri(drawing, 45_000)), drawing)    # sharp


def test_fifty_traces_are_less_than_5_mb(tmp_path):
    """The bound is for a question of each trace's own, and for many crops."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    noise = Image.fromarray(noise)
    turns = [call_turn((x, 30)) for x in (5, 15, 25, 35, 45, 55)]
    traces = [make_trace(Question("which?", [noise], "red"), *turns, answer_turn("red"),
                         size=noise.size) for _ in range(4)]
    evaluation.write_report(tmp_path / "page.html", Config(), {"rl": traces}, tmp_path)
    data = data_of(tmp_path / "page.html")
    assert len(json.dumps(data["cases"])) < 5e6 * 4 / 50


# ------------------------------------------------------------------------------------------ ratings

def test_fleiss_kappa_of_the_textbook():
    """Fleiss 1971: 10 subjects, 14 raters, 5 categories; kappa is 0.210."""
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[2, 0], [0, 2]]) == 1 == fleiss_kappa([[2, 0], [2, 0]])
    assert fleiss_kappa([[1, 1], [1, 1]]) == -1


def write_ratings(path, verdicts, key="a"):
    rows = [{"id": str(i), "truth": truth, "on": on, "helps": helps}
            for i, (on, helps, truth) in enumerate(verdicts)]
    path.write_text(json.dumps({"key": key, "ratings": rows}))
    return str(path)


def test_what_raters_said(tmp_path, capsys):
    """"Cannot tell" is no "no"; a step that a rater left out is no disagreement; a step whose truth
    is not known agrees with nothing."""
    anna = write_ratings(tmp_path / "anna.json", [
        ("yes", 5, True), ("no", 1, True), ("cannot tell", 3, False), ("yes", 4, None)])
    ben = write_ratings(tmp_path / "ben.json", [
        ("yes", 5, True), ("no", 1, True), ("cannot tell", 3, False), (None, None, None)])
    evaluation.print_ratings([anna, ben])
    assert capsys.readouterr().out.splitlines() == [
        anna,
        "  points on the thing named: 2 of 3, 0.667",
        "  cannot tell: 1",
        "  helpfulness, 1 to 5: 3.25",
        "  agrees with the truth: 1 of 2",
        ben,
        "  points on the thing named: 1 of 2, 0.500",
        "  cannot tell: 1",
        "  helpfulness, 1 to 5: 3.00",
        "  agrees with the truth: 1 of 2",
        "Fleiss' kappa of 'on', 3 steps: 1.000",
        "Fleiss' kappa of 'helps', 3 steps: 1.000"]


@pytest.mark.parametrize("text", ["", "[]", '{"key": "a"}', '{"key": "a", "ratings": [{}]}',
                                  '{"key": "a", "ratings": [{"on": "maybe", "helps": 1}]}'])
def test_ratings_that_cannot_be_read(tmp_path, text):
    """A file that was edited, or is something else, is a line and no traceback."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="a.json"):
        evaluation.print_ratings([str(path)])


def test_ratings_of_different_pages(tmp_path):
    """Steps of different pages have the same names; their raters were compared."""
    paths = [write_ratings(tmp_path / f"{key}.json", [("yes", 1, True)], key) for key in "ab"]
    with pytest.raises(UserError, match="not of one page"):
        evaluation.print_ratings(paths)


# -------------------------------------------------------------------------------------- the scripts

@pytest.mark.parametrize("task", TOYS)
def test_drawings_are_questions(tmp_path, capsys, task):
    """The pictures that --draw writes could not be asked about without typing them in."""
    evaluation.main({"draw": task, "n": 4, "out": str(tmp_path / "drawn")})
    file = evaluation.read_questions(tmp_path / "drawn" / "questions.jsonl")
    printed = capsys.readouterr().out
    for index, question in enumerate(file.questions):
        drawn = toy(task, "test", 0, index)
        assert f"test-0-{index}.png: {drawn.text} ({drawn.answer})" in printed
        assert (question.text, question.answer) == (drawn.text, drawn.answer)
        assert question.kind == drawn.kind
        for read, made in zip(question.load(), drawn.load(), strict=True):
            assert np.array_equal(read, made)
    with pytest.raises(UserError, match="--out"):
        evaluation.main({"draw": "toy-search"})


def test_evaluate_writes_both_pages(tiny_folder, tmp_path, monkeypatch):
    """Traces on the page were not those that the figures are about."""
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny_folder, "turn_tokens": 8, "response_tokens": 40, "n": 3}
    evaluation.main({**given, "report": "report.html", "json": "figures.json"})
    data = data_of(tmp_path / "report.html")
    lines = (tmp_path / "figures.jsonl").read_text().splitlines()[1:]
    records = map(json.loads, lines)
    answers = [visible(samples[0]["answer"] or "none", 300) for samples in records
               if samples[0]["tool"]]
    assert [case["traces"][0]["answer"] for case in data["cases"]] == answers
    assert data["table"][1][0] == "toy-search"
    monkeypatch.setattr(evaluation, "rollout", lambda policy, asked, *_, **__: (
        [make_trace(question, call_turn((11, 56)), answer_turn("x"))] for question in asked))
    evaluation.main({**given, "rate": "rate.html"})
    assert len(data_of(tmp_path / "rate.html")["steps"]) == 3


def test_nothing_to_rate(tmp_path):
    """A page without steps is empty; the reason is said."""
    question = toy("toy-search", "test", 0, 0)
    with pytest.raises(UserError, match="no trace has a point"):
        evaluation.write_rating_page(tmp_path / "page.html", Config(),
                                     [make_trace(question, answer_turn("dotted"))])


def test_a_tree_as_text():
    """A tree whose steps repeat the whole path cannot be read."""
    question = toy("toy-search", "test", 0, 0)
    paths = [make_trace(question, *texts, ended="") for texts in (
        [], [call_turn((11, 56))], [call_turn((11, 56)), answer_turn("dotted")])]
    root = sft.Node(paths[0])
    root.children.append(sft.Node(paths[1], root))
    root.children[0].children.append(sft.Node(paths[2], root.children[0]))
    root.children[0].children[0].back_up(1.0)
    root.children[0].back_up(0.0)
    assert sft.describe_tree(root).splitlines() == [
        "2 visits, value 0.50: One cyan card bears a pattern. Which?",
        "  2 visits, value 0.50: Card 1 at (11, 56). zoom [11, 56]",
        "    1 visits, value 1.00: Dotted. dotted"]


# ------------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="session")
def chromium():
    """The browser's path; some systems have one that only says how to install it."""
    names = "chromium", "chromium-browser", "google-chrome"
    for path in filter(None, map(shutil.which, names)):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip(f"no browser to open the pages in, neither of {', '.join(names)}")


@pytest.fixture
def browse(chromium, tmp_path):
    """browse(page, script) -> `seen`, of a script at the end of a copy of the page. What a page
    keeps in the browser is kept until the test ends."""
    return partial(open_copy, chromium, tmp_path / "profile")


def open_copy(chromium, profile, page, script):
    script = f"""<script>
        const all = what => [...document.querySelectorAll(what)];
        const press = (key, more = {{}}) =>
          document.dispatchEvent(new KeyboardEvent("keydown", {{key, ...more}}));
        const named = text => all("button").find(part => part.textContent.startsWith(text));
        const texts = what => all(what).map(part => part.textContent);
        const seen = {{}};
        onerror = message => seen.error = message;
        {script}
        setTimeout(() => {{                              // pictures are there a moment later
          seen.pictures = all("img").map(image => image.naturalWidth > 0 && image.alt > "");
          const left = document.createElement("pre");
          left.id = "seen";
          left.textContent = JSON.stringify(seen);
          document.body.append(left);
        }}, 500);
        </script>"""
    copy = page.with_name("copy-" + page.name)
    copy.write_text(page.read_text() + script)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--virtual-time-budget=2000", f"--user-data-dir={profile}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_report_in_a_browser(report, browse):
    """Filters that showed the same, keys that did nothing, points that lit nothing: a page can be
    well-formed and dead."""
    seen = browse(report, """
        seen.filters = texts("button[aria-pressed]");
        seen.charts = all("figure svg").map(part => part.getAttribute("aria-label"));
        seen.lines = all("figure path:not(.axis)").length;
        seen.heads = texts("h3");
        seen.shown = texts("article > p")[1];
        press("ArrowRight");
        seen.second = texts("h3");
        press("ArrowRight", {altKey: true});
        press("ArrowRight");
        press("ArrowRight");
        seen.last = texts("nav span");
        press("ArrowLeft");
        seen.back = texts("nav span");
        named("wrong").click();
        seen.wrong = texts("h3");
        seen.pressed = texts("[aria-pressed=true]");
        named("truncated").click();
        seen.truncated = texts("h3");
        const lit = () => all(".lit").map(part => part.className);
        all("article")[1].querySelector(".step").focus();
        seen.focused = lit();
        all("article")[1].querySelector(".step").blur();
        seen.blurred = lit();
        all("article")[0].querySelector(".point").dispatchEvent(new Event("mouseenter"));
        seen.hovered = lit();
        seen.labels = all(".point").map(part => part.getAttribute("aria-label"));
        seen.table = texts("table:first-of-type td");
        seen.settings = texts("details tr");
        """)
    assert seen["filters"] == ["all (3)", "right (1)", "wrong (1)", "truncated (1)"]
    assert len(seen["charts"]) == 7
    assert seen["charts"][1].startswith("accuracy with its 95 % interval. accuracy 0.5 at first")
    assert seen["lines"] == 4 + 6 + 1                    # a line a value, and the interval
    assert seen["charts"][5].endswith("kl 0.01 at first, 0.01 at last")    # without the NaN
    assert seen["heads"] == ["sft: \u2717 wrong", "rl: \u2713 right"]
    assert seen["second"] == ["sft: \u2713 right", "rl: \u2717 wrong"]
    assert seen["last"] == ["3 of 3"] and seen["back"] == ["2 of 3"]
    assert seen["wrong"] == ["sft: \u2713 right", "rl: \u2717 wrong"]
    assert seen["pressed"] == ["wrong (1)"]
    assert seen["truncated"] == ["sft: \u2713 right", "rl: \u2026 truncated"]
    assert seen["shown"] == ("answer: dotted (answer)reward 1: correct 1, format 1, "
                             "grounded 1, diversity 0, zoom calls 1")
    assert sorted(seen["focused"]) == ["point lit", "step lit", "step lit"]
    assert seen["blurred"] == []
    assert sorted(seen["hovered"]) == ["point lit", "step lit", "step lit"]
    assert seen["pictures"] == [True] * 4
    assert seen["labels"] == ["point 1 at (11, 56)"] * 2
    assert "0.333" in seen["table"] and "error" not in seen
    assert {"seed0", "diversity0", "dry_runfalse"} <= set(seen["settings"])    # 0 is a setting too
    assert "model" not in seen["settings"]


def test_a_hostile_page_in_a_browser(browse, tmp_path):
    """What a browser makes of hostile texts, not what we think that it makes."""
    seen = browse(hostile_page(tmp_path), """
        seen.title = document.title;
        seen.scripts = all("script").length;
        seen.strange = all("img:not([src^='data:image/'])").length;
        seen.question = texts("h2")[0];
        """)
    assert seen["title"] != "broken" and seen["pictures"] == [True] * 2
    assert seen["scripts"] == 3 and seen["strange"] == 0 and "error" not in seen
    assert seen["question"].startswith("</script><script>document.title")


def test_rating_in_a_browser(browse, tmp_path, capsys):
    """A rater's work was gone after a reload; a page that tells the answer is no test."""
    page = tmp_path / "rate.html"
    traces = drawn_traces([True, False, True], points=((11, 56), (30, 30)))
    evaluation.write_rating_page(page, Config(), traces)
    seen = browse(page, """
        seen.place = texts("nav span");
        seen.points = all(".point.lit").length + " of " + all(".point").length;
        seen.steps = all(".step.lit").length > 0;
        press("y");
        press("4");
        seen.pressed = texts("[aria-pressed=true]");
        seen.done = texts("main > p.soft");
        press("ArrowRight");
        seen.fresh = texts("[aria-pressed=true]");
        named("cannot tell").click();
        named("2").click();
        seen.tells = texts("h3").length;
        """)
    assert seen["place"] == ["1 of 6"] and seen["points"] == "1 of 1" and seen["steps"]
    assert seen["pressed"] == ["yes (y)", "4"] and seen["fresh"] == []
    assert seen["done"][-1] == "1 of 6 steps are rated" and seen["tells"] == 0
    again = browse(page, """
        seen.done = texts("main > p.soft");
        seen.exported = exported();
        """)
    assert again["done"][-1] == "2 of 6 steps are rated" and "error" not in again
    (tmp_path / "me.json").write_text(again["exported"])
    capsys.readouterr()
    evaluation.print_ratings([str(tmp_path / "me.json")])
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "  points on the thing named: 1 of 1, 1.000",
        "  cannot tell: 1",
        "  helpfulness, 1 to 5: 3.00"]
