"""python -m fftp.report: what stands in the page is what the run holds, nothing is fetched, nothing breaks out of its text."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch

from fftp import explain, predict, report, scores
from fftp.augment import Augment, AugmentSettings
from fftp.page import curves, media
from tests import made_run, runs
from tests.made_data import RATE
from tests.runs import run

VOID = {"meta", "img", "input", "link", "br", "hr"}
SVG = {"circle", "line", "rect", "path"}


class Page(HTMLParser):
    """A page as elements: (name, attributes, text inside). Fails where tags do not close in order."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.elements, self.said = [], [], []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), (name, attributes)
        element = {"name": name, **dict(attributes), "text": "", "inside": [e["name"] for e in self.open]}
        self.elements.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop()["name"] == name

    def handle_data(self, data):
        self.said.append(data)
        for element in self.open:
            element["text"] += data

    def of(self, name, **wanted):
        found = (e for e in self.elements if e["name"] == name)
        return [e for e in found if all(w in e.get(k.rstrip("_"), "").split() for k, w in wanted.items())]

    @property
    def words(self):
        return " ".join(" ".join(self.said).split())


def written(capsys, folder, *flags):
    ended = run(capsys, folder, *flags, command=report.main)
    assert (ended.code, ended.err) == (0, "")
    page = folder / ("report_validation.html" if "validation" in flags else "report.html")
    assert str(page) in ended.out
    return page.read_text("utf-8")


def content(uri):
    kind, _, coded = uri.partition(";base64,")
    return kind, base64.b64decode(coded)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    return folder, made_run.make(folder, augment="specmask")


def test_the_page_of_a_trained_run(tmp_path, capsys):
    """From train.run itself: figures, curves, matrix and all clips asked for, each with a sound and a picture."""
    out = tmp_path / "run"
    result = runs.train(capsys, out, "--epochs", 1)
    markup = written(capsys, out, "--clips", 5)
    page = Page(markup)
    assert page.of("title")[0]["text"] == "AST-tiny, 1 layers, on synth"
    assert page.of("dd", class_="value")[0]["text"] == f"{100 * result['metrics']['accuracy']:.1f} %"
    cells = [int(e["text"]) for e in page.of("td") if e.get("class", "").split(" ")[0] in ("right", "wrong")]
    assert sum(cells) == 20
    assert len(page.of("article")) == len(page.of("audio")) == len(page.of("img")) == 5
    assert "finished" in page.words
    assert f"commit {result['commit']}" in page.words
    changed = next(e for e in page.of("details") if e["text"].strip().startswith("Different from the defaults"))
    assert "--depth" in changed["text"]
    assert "--mask-width" not in changed["text"]
    assert "open" not in changed


def test_nothing_is_fetched_and_names_are_single(made, capsys):
    markup = written(capsys, made[0])
    page = Page(markup)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", markup).replace("http-equiv", "")
    assert all(e["src"].startswith("data:") for e in page.elements if "src" in e)
    assert all(e["href"].startswith("#") for e in page.elements if "href" in e)
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    assert {e["href"][1:] for e in page.of("a")} <= set(ids)
    assert {e["for"] for e in page.of("label") if "for" in e} <= set(ids)
    assert len(page.of("h1")) == 1
    assert all(e.get("alt") for e in page.of("img"))
    assert page.of("html")[0]["lang"] == "en"
    assert page.of("script")[0]["text"].strip()  # one script, and it is convenience: what it shows is hidden without it
    assert [e.get("hidden", "absent") for e in page.of("div", class_="tools")] == [None]


def test_another_split_has_a_page_of_its_own(made, capsys):
    folder, _ = made
    before = written(capsys, folder)
    assert written(capsys, folder, "--split", "validation") != before
    assert (folder / "report.html").read_text("utf-8") == before


def test_the_same_run_gives_the_same_bytes(made, tmp_path, capsys):
    first = written(capsys, made[0])
    other = tmp_path / "other.html"
    assert run(capsys, made[0], "--out", other, command=report.main).code == 0
    assert other.read_text("utf-8") == first
    assert len(first.encode()) < 20_000_000


def test_clips_are_the_worst_ones_with_their_probabilities(made, capsys):
    folder, held = made
    page = Page(written(capsys, folder, "--clips", 7))
    shown = page.of("article")
    order = np.argsort(-held.losses)[:7]
    assert [e["data-rank"] for e in shown] == list("1234567")
    assert [e["data-true"] for e in shown] == [made_run.CLASSES[i % 3] for i in order]
    for e, i in zip(shown, order, strict=True):
        p = held.probabilities[i]
        assert e["data-taken"] == made_run.CLASSES[p.argmax()]
        assert e["data-wrong"] == str(int(p.argmax() != i % 3))
        assert f"loss {held.losses[i]:.2f}" in e["text"]
        assert f"{100 * p[i % 3]:.1f} %" in e["text"]
        assert held.names[i] in e["text"]
    assert "7 of 12 test clips" in page.words


def test_sounds_and_pictures_are_the_clips(made, capsys):
    folder, held = made
    page = Page(written(capsys, folder, "--clips", 1))
    i = int(held.worst[0])
    kind, mp3 = content(page.of("audio")[0]["src"])
    samples = held.samples[held.start[i] :][: held.length[i]] / 2**15
    assert kind == "data:audio/mpeg"
    heard, rate = soundfile.read(io.BytesIO(mp3))
    assert (len(heard), rate) == (8000, RATE)
    assert np.corrcoef(heard, samples)[0, 1] > 0.8  # noise, which MP3 keeps worst: 0.94 seen
    kind, png = content(page.of("img")[0]["src"])
    assert kind == "data:image/png"
    from matplotlib.image import imread

    colours = imread(io.BytesIO(png), format="png")[..., :3]
    classifier = predict.load(folder)
    log_mel = classifier.log_mel(samples.astype(np.float32))[0, :48].numpy().T[::-1]  # 48 frames hold sound
    assert colours.shape == (128, 48, 3)
    place = np.abs(colours[:, :, None] - media.palette() / 255).sum(-1).argmin(-1)
    assert np.corrcoef(place.ravel(), log_mel.ravel())[0, 1] > 0.98
    assert float(page.of("div", class_="seen")[0]["data-seconds"]) == 0.5


def test_masks_are_what_training_would_draw_and_rollout_is_the_models(made, capsys):
    folder, held = made
    page = Page(written(capsys, folder, "--clips", 2))
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    wanted = AugmentSettings(augment="specmask")
    assert settings["mask_area"] == wanted.mask_area
    drawn = Augment(wanted, settings["seed"], 50, 128).rectangles(0, torch.tensor([0, 1])).reshape(-1, 4).tolist()
    expected = [(t0, 128 - f1, min(t1, 48) - t0, f1 - f0) for t0, t1, f0, f1 in drawn if t0 < min(t1, 48) and f0 < f1]
    assert expected
    assert [tuple(int(e[k]) for k in ("x", "y", "width", "height")) for e in page.of("rect")] == expected
    assert re.fullmatch("--fill:#[0-9a-f]{6}", page.of("svg", class_="masks")[0]["style"])
    classifier = predict.load(folder)
    i = int(held.worst[0])
    log_mel = classifier.log_mel(held.samples[held.start[i] :][: held.length[i]].astype(np.float32) / 2**15)
    rollout = explain.attention_rollout(classifier.model, log_mel)[0, :48].mean(1).numpy()
    path = next(e["d"] for e in page.of("path") if "rollout" in str(e["inside"]) or e["d"].startswith("M0 40"))
    heights = np.array([float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)H", path)])
    np.testing.assert_allclose((40 - heights) / 38 * max(1.6, rollout.max()), rollout, atol=0.01)
    assert rollout.max() > 1.05  # sharpened: it is not flat


def test_nothing_breaks_out_of_its_text(tmp_path, capsys):
    """Markup, quotes, placeholders and what is no Unicode in labels, names, settings, folders."""
    classes = ('<script>alert("1")</script>', "a & b ' \" </title>", "größe 音 $clips {x} <!--clips-->")
    names = tuple(f'{classes[i % 3]}/"{i}\udcff.wav' for i in range(12))
    folder = tmp_path / "<b>run & 'x'"
    made_run.make(folder, classes=classes, names=names, data_root='<u>"root"')
    page = Page(written(capsys, folder))
    assert len(page.of("script")) == 1
    assert not page.of("b") + page.of("u")
    assert [e["inside"] for e in page.of("title") if "svg" not in e["inside"]] == [["html", "head"]]
    assert {e["data-true"] for e in page.of("article")} == set(classes)
    assert len(page.of("table", class_="matrix")) == 1
    heads = [e["text"] for e in page.of("th") if e["text"] in classes]
    assert set(heads) == set(classes)
    assert {e["title"] for e in page.of("span") if "title" in e} == {name.replace("\udcff", "?") for name in names}
    assert '<u>"root"' in page.words
    assert "<b>run & 'x'" in page.words


def test_several_labels_a_clip(tmp_path, capsys):
    folder = tmp_path / "run"
    held = made_run.make(folder, multi_label=True, classes=("a", "b", "c", "d", "e"), n=4)
    page = Page(written(capsys, folder))
    assert np.isfinite(held.per_class).sum() == 4 or held.targets.sum(0).min() > 0
    bars = [
        float(e["style"].removeprefix("--s:").rstrip("%"))
        for e in page.of("span")
        if e.get("style", "").startswith("--s")
    ]
    finite = held.per_class[np.isfinite(held.per_class)]
    assert bars == [round(100 * v, 1) for v in sorted(finite, reverse=True)]
    for k in np.flatnonzero(~np.isfinite(held.per_class)):
        assert f"Without clips, and so without a figure: {'abcde'[k]}" in page.words
    assert page.of("dd", class_="value")[0]["text"] == f"{100 * held.figures['map']:.1f} %"
    a, b = held.spread["map"]
    assert f"95 % interval {100 * a:.1f} to {100 * b:.1f} %" in page.words
    assert page.of("article")[0]["data-true"].split(", ") == [
        "abcde"[k] for k in np.flatnonzero(held.targets[held.worst[0]])
    ]


def test_many_classes_are_listed_by_pairs(tmp_path, capsys):
    held = made_run.make(tmp_path / "run", classes=tuple(f"class {i}" for i in range(61)), n=122)
    page = Page(written(capsys, tmp_path / "run", "--clips", 0))
    assert not page.of("table", class_="matrix")
    wrong = held.per_class - np.diag(np.diag(held.per_class))
    assert f"{wrong.max()}" in page.of("div", class_="pairs")[0]["text"]
    assert "--clips 0" in page.words


def test_aum_has_no_attention_and_says_so(tmp_path, capsys):
    made_run.make(tmp_path / "run", model="aum", n=3)
    page = Page(written(capsys, tmp_path / "run"))
    assert "AuM has no attention" in page.words
    assert not page.of("svg", class_="rollout")
    assert len(page.of("img")) == 3


def test_an_unfinished_run_says_so(tmp_path, capsys):
    folder = tmp_path / "a run"
    made_run.make(folder, epochs=4)
    (folder / "result.json").unlink()
    scores.file_of(folder, "test").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    page = Page(written(capsys, folder))
    assert "unfinished: 2 of 4 epochs" in page.words
    assert f"python -m train.run --resume --out '{folder}'" in page.words
    assert "75.0 % of validation clips, best so far: epoch 2" in page.words
    assert f"python -m train.evaluate '{folder}' --split test --scores" in page.words
    (folder / "metrics.jsonl").unlink()
    assert "No epoch has been finished yet" in Page(written(capsys, folder)).words


def test_without_recordings_or_weights_the_rest_is_there(tmp_path, capsys):
    folder = tmp_path / "run"
    made_run.make(folder, kept=False, data_root=str(tmp_path / "gone"))
    page = Page(written(capsys, folder))
    assert len(page.of("article")) == 12
    assert not page.of("audio")
    assert (
        f"Its recording is not where the run found it, {tmp_path / 'gone'}: say where it is by --data-root"
        in page.words
    )
    assert "(12 of 12 clips)" in page.words
    (folder / "best" / "config.json").unlink()
    assert "There is no checkpoint in this folder" in Page(written(capsys, folder)).words


def test_recordings_come_from_the_pack_or_from_files(tmp_path, capsys):
    held = made_run.make(tmp_path / "run", kept=False, names=tuple(f"c/{i}.wav" for i in range(12)))
    noise = np.random.default_rng(1).integers(-9000, 9000, 12 * 8000, dtype=np.int16)
    noise.tofile(tmp_path / "samples.int16")
    packed = {**vars(held), "pack": str(tmp_path / "samples.int16")}
    scores.write(tmp_path / "run", scores.Scores(**packed))
    from_pack = Page(written(capsys, tmp_path / "run"))
    assert len(from_pack.of("audio")) == 12
    (tmp_path / "files" / "c").mkdir(parents=True)
    for i in range(11):
        soundfile.write(tmp_path / "files" / "c" / f"{i}.wav", noise[8000 * i :][:8000], RATE)
    (tmp_path / "files" / "c" / "11.wav").write_bytes(b"")
    from_files = Page(written(capsys, tmp_path / "run", "--data-root", tmp_path / "files"))
    heard = {e["aria-label"]: e["src"] for e in from_pack.of("audio")}
    again = {e["aria-label"]: e["src"] for e in from_files.of("audio")}
    assert len(again) == 11
    assert again.items() <= heard.items()
    assert "11.wav is empty" in from_files.words


def test_500_clips_of_ten_seconds_stay_under_20_mb(tmp_path, capsys, monkeypatch):
    """Six clips in the room of six of 500: noise, which compresses worst. Every one keeps its sound and its picture."""
    made_run.make(tmp_path / "run", n=6, seconds=10)
    share = (report.LIMIT - 200_000) // 500
    around = len(written(capsys, tmp_path / "run", "--clips", 0).encode())
    monkeypatch.setattr(report, "LIMIT", around + 10_000 + 6 * share)
    markup = written(capsys, tmp_path / "run", "--clips", 6)
    assert len(markup.encode()) < report.LIMIT
    page = Page(markup)
    assert len(page.of("audio")) == len(page.of("img")) == 6
    assert around < 200_000
    monkeypatch.setattr(report, "LIMIT", around + 10_000 + 6 * 12_000)
    markup = written(capsys, tmp_path / "run", "--clips", 6)
    assert len(markup.encode()) < report.LIMIT
    page = Page(markup)
    assert not page.of("audio")
    assert "does not fit into a page of 20 MB" in page.words


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[]"),
        ("result.json", '{"metrics": {"accuracy": "high"}}'),
        ("settings.json", "{}"),
        ("settings.json", '{"settings": 3}'),
        ("metrics.jsonl", '{"epoch": 1}\n'),
        ("metrics.jsonl", "3\n"),
        ("scores_test.npz", "PK"),
        ("best/config.json", "{"),
        ("best/model.safetensors", "short"),
    ],
)
def test_damage_is_one_sentence(file, content, tmp_path, capsys):
    made_run.make(tmp_path / "run", n=3)
    (tmp_path / "run" / file).write_text(content)
    sentence = run(capsys, tmp_path / "run", command=report.main).sentence
    assert file.split("/")[-1] in sentence
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("name", "value"), [("augment", "spec"), ("seed", "one"), ("epochs", None)])
def test_a_setting_that_is_none_is_damage(name, value, tmp_path, capsys):
    made_run.make(tmp_path / "run", n=3)
    path = tmp_path / "run" / "settings.json"
    about = json.loads(path.read_text())
    about["settings"][name] = value
    path.write_text(json.dumps(about))
    assert "settings.json is damaged" in run(capsys, tmp_path / "run", command=report.main).sentence


def test_requests_that_cannot_be_met(made, tmp_path, capsys):
    folder, held = made
    for flags, named in (
        ((tmp_path / "absent",), "holds no run"),
        ((tmp_path,), "holds no run"),
        ((), "--help"),
        ((folder, "--clip", 3), "--clips"),
        ((folder, "--clips", -1), "0 or more"),
        ((folder, "--out", tmp_path / "no" / "page.html"), "cannot be written"),
    ):
        assert named in run(capsys, *flags, command=report.main).sentence
    other = tmp_path / "run"
    made_run.make(other, classes=("a", "b"), n=4)
    scores.write(other, held)
    assert "of another run" in run(capsys, other, command=report.main).sentence


def test_validation_needs_its_own_scores(made, capsys):
    page = Page(written(capsys, made[0], "--split", "validation"))
    assert "--split validation --scores" in page.words
    assert page.of("dd", class_="value")[0]["text"] == "70.0 %"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.37, 0.41), (-3.0, 250.0), (5.0, 5.0), (1e-9, 3e-9)])
def test_ticks_are_few_round_and_around(low, high):
    got = curves.ticks(low, high, 5)
    assert 1 + (high > low) <= len(got) <= 7
    assert got[0] <= low + 1e-12
    assert got[-1] >= high - 1e-12
    assert curves.ticks(1, 40, 8, whole=True) == [10, 20, 30, 40]


def test_a_curve_of_nothing_is_an_empty_chart():
    drawn = Page(curves.chart("Loss", "", [curves.Line("a", "one", [(1, float("nan"))])], 3))
    assert drawn.of("svg")[0]["aria-label"] == "Loss: nothing yet"
    assert not drawn.of("path")


def test_scores_are_read_as_they_were_written(made):
    folder, held = made
    again = scores.read(folder, "test")
    for name, value in vars(held).items():
        assert np.array_equal(getattr(again, name), value), name
    before = scores.file_of(folder, "test").read_bytes()
    scores.write(folder, again)
    assert scores.file_of(folder, "test").read_bytes() == before
