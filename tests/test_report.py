"""What the page of a run promises: it has all of the run, needs nothing else, and no text leaves
its place."""
import base64
import html
import io
import re

from conftest import noise
from PIL import Image

from evaluate import write_report
from rollout import Frame, Question, Trace, crop_box, format_call, parse_turn
from train_rl import curves

HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>\"'&" \
          "<!-- \x00\x07\u202eright to left\u2066\u2028\u2029 ]]> {title} </pre></details>"
LOG = [{"step": step, "reward": step / 10, "accuracy": 0.5, "zoom_calls": 1.5, "overlong": 0.0,
        "ci95": [0.4, 0.6], "kl": float("nan") if step == 2 else 0.01, "on_target": None}
       for step in (1, 2, 3)]


def make_trace(answer, truth="dotted", ended="answer", text="Which one?", image=None):
    """A Trace of a zoom call, answered by a crop, and an answer."""
    question = Question(text, [image or noise(256, 256)], truth)
    texts = [f"<think>Card 1 at (11, 56).</think>\n{format_call((11, 56))}",
             f"<think>Dotted.</think>\n<answer> {answer} </answer>"]
    turns = [parse_turn(text) for text in texts]
    frame = Frame((64, 64), (256, 256))
    turns[0].crop = crop_box((256, 256), frame.to_original((11, 56)), 32)
    return Trace(None, question=question, frames=[frame], turns=turns, ended=ended)


def page_of(tmp_path, traces, title="search, zoom", tree="1 visits, value 1.00: first", log=LOG):
    path = tmp_path / "report.html"
    settings = {"lr": 1e-6, "task": title, "teacher": "", "seed": 3}
    table = [["", "accuracy"], ["rl", "0.990"]]
    write_report(path, title, settings, curves(log), table, tree, traces)
    return path.read_text(encoding="utf-8")


def test_a_report_has_all_of_a_run(tmp_path):
    """Guards the page: table, curves with their last value, settings, tree, and the traces of all
    stages side by side with picture, text, reward and fault. A question without a truth is neither
    right nor wrong; a figure that is no number has no point in its curve, or no curve."""
    own = make_trace("dotted", truth="")
    traces = {"sft": [make_trace("plain"), make_trace("dotted"), own],
              "rl": [make_trace("dotted"), make_trace("plain", ended="truncated"), own]}
    page = page_of(tmp_path, traces)
    assert "<td>0.990</td>" in page and "value 1.00: first" in page
    assert "<td>seed</td><td>3</td>" in page and "<td>teacher</td>" not in page
    assert "<b>reward</b>, at last 0.3" in page and page.count("<svg") == 5
    assert "nan" not in page.partition("<section>")[0].lower()
    assert page.count("<section>") == 6 and page.count("data:image/webp") == 6
    assert page.count("<h4>sft: wrong</h4>") == 1 and page.count("<h4>rl: right</h4>") == 1
    assert "right (1)" in page and "truncated (1)" in page and "wrong (" not in page
    assert "<h4>rl: open</h4>" in page and "open (1)" in page
    assert "the tokens ran out before the end" in page
    assert "(11, 56)" in page and "[image: (12, 192, 76, 256)]" in page


def test_a_page_needs_nothing_else(tmp_path):
    """Guards the page's use offline: no script, and nothing is loaded."""
    page = page_of(tmp_path, {"rl": [make_trace("dotted")]})
    assert not re.search(r"<script|https?://|@import|url\(", page)
    assert "width=device-width" in page and "color-scheme: light dark" in page


def test_no_text_leaves_its_place(tmp_path):
    """Guards against what a model or a file writes: it is shown, and is never markup."""
    trace = make_trace(HOSTILE, truth=HOSTILE, text=HOSTILE)
    page = page_of(tmp_path, {HOSTILE: [trace]}, title=HOSTILE, tree=HOSTILE)
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("</details>") == page.count("<details")
    assert "[U+202E]" in page and "\u202e" not in page and "\x00" not in page
    assert html.escape("</script><script>document.title = 'broken'") in page


def test_pictures_are_small(tmp_path):
    """Guards the size of a page: a large image costs it no more than a small one; with its crops
    below it, the picture is as high as wide."""
    trace = make_trace("dotted", image=noise(2000, 1500))
    trace.frames = [Frame((64, 64), (2000, 1500))]
    page = page_of(tmp_path, {"rl": [trace]})
    data = re.search(r"base64,([^\"]+)", page)[1]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (640, 640) and len(page) < 600_000
