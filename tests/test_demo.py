"""The page: what it computes, what it answers over the network and in a browser, its export."""

import ast
import io
import json
import os
import re
import shutil
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import Small
from utils import data, demo, devices, explain, files, run
from utils.models import load_weights
from utils.recipes import recipe
from utils.results import Results, save_predictions

gradio = pytest.importorskip("gradio", reason="the page needs Gradio: pip install gradio")
gradio_client = pytest.importorskip("gradio_client")  # comes with it

ROOT = Path(__file__).parents[1]
CLIENTS, QUESTIONS = 8, 6
PATIENCE = 120  # seconds, for machines that do other work as well
# Certificates, which none of these needs, take seconds to read.
CLIENT = {"verbose": False, "ssl_verify": False, "httpx_kwargs": {"timeout": PATIENCE}}
NOT_SEEN = {  # what is uploaded, and what the page says
    "text.png": "text.png can't be read",
    "empty.png": "empty.png can't be read",
    "cut.jpg": "cut.jpg can't be read",
    "huge.png": "huge.png can't be read",
}

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Whose answers are compared to six digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "pick_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of an untrained network for the sample, whose answers differ."""
    torch.manual_seed(1)
    model = Small(10).eval()
    with torch.no_grad():
        seen = explain.inputs(with_statistics(model), data.load("sample").test_images)
        model.fc.weight *= 10
        model.fc.bias -= model(seen).mean(0)  # so that no class is the answer to everything
    path = tmp_path_factory.mktemp("run") / "weights.safetensors"
    about = run.weights_metadata(recipe("s10"), data.load("sample"))
    files.save_tensors(model.state_dict(), path, about)
    return path


def with_statistics(model):
    model.mean, model.std = data.load("sample").statistics
    return model


@pytest.fixture(scope="module")
def model(weights):
    return load_weights(weights)


@pytest.fixture(scope="module")
def network(weights):
    return demo.Network(weights, "sample")


@pytest.fixture(scope="module")
def address(weights):
    blocks = demo.page(weights, "sample")
    _, address, shared = blocks.launch(prevent_thread_lock=True, quiet=True)
    assert address.startswith("http://127.0.0.1:") and shared is None
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def asked(address):
    return gradio_client.Client(address, **CLIENT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten test images as files, photographs of other sizes and modes, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(data.load("sample").test_images[:10]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    large = Image.open(folder / "4.png").resize((640, 480))
    large.save(folder / "large.jpg")
    large.convert("L").save(folder / "grey.png")
    large.convert("RGBA").rotate(30).save(folder / "rgba.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:3000])
    (folder / "huge.png").write_bytes(claimed_size(20_000, 20_000))
    return folder


def claimed_size(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def upload(path):
    return gradio_client.handle_file(path)


def shares_of(label):
    """{class: probability} of what the page's label component was sent."""
    return {each["label"]: each["confidence"] for each in label["confidences"]}


def seen(path):
    """A picture as the network sees it, uint8 (1, 3, 32, 32)."""
    return data.read_picture(path, (32, 32))[None]


def expected_shares(model, path, count):
    shares = zip(model.classes, explain.probabilities(model, seen(path))[0].tolist(), strict=True)
    return dict(sorted(shares, key=lambda item: -item[1])[:count])


# What is computed


def pixels(picture):
    """Of a PIL image, as a tensor (H, W, 3)."""
    return torch.from_numpy(np.array(picture))


def test_the_answer_is_that_of_the_network(network, pictures):
    images = seen(pictures / "large.jpg")
    picture, shares = network.answer(images, count=4)
    assert shares == pytest.approx(expected_shares(network.model, pictures / "large.jpg", 4))
    assert torch.equal(pixels(picture)[3::8, 5::8], images[0].permute(1, 2, 0))
    assert picture.size == (256, 256)


def test_grad_cam_is_that_of_the_class_and_layer(network, pictures):
    """Without opacity it is not seen."""
    model, images = network.model, seen(pictures / "4.png")
    plain = pixels(network.answer(images, layer="prep", opacity=0)[0])
    assert torch.equal(plain, pixels(network.answer(images)[0]))
    for name, of in (("star", 5), ("", int(explain.probabilities(model, images).argmax()))):
        maps = explain.grad_cam(model, images, torch.tensor([of]), layer="prep")
        large = plain.permute(2, 0, 1)[None]
        expected = demo.plotting.heat(large, maps, opacity=0.7)[0].permute(1, 2, 0)
        found, _ = network.answer(images, layer="prep", name=name, opacity=0.7)
        assert torch.equal(pixels(found), expected)


@given(st.lists(st.tuples(st.integers(0, 2), st.tuples(*[st.integers(-9, 9)] * 3)), max_size=20),
       st.integers(1, 9), st.sampled_from(["", *"abc"]), st.sampled_from(["", *"abc"]))
def test_the_surest_mistakes_come_first(rows, count, true, predicted):
    labels = torch.tensor([label for label, _ in rows], dtype=torch.int64)
    logits = torch.tensor([row for _, row in rows], dtype=torch.float32).view(-1, 3)
    results = Results(logits, labels, ("a", "b", "c"))
    found = demo.surest_mistakes(results, count, true, predicted).tolist()
    fits = [
        i for i, (label, row) in enumerate(rows)
        if row.index(max(row)) != label and true in ("", "abc"[label])
        and predicted in ("", "abc"[row.index(max(row))])
    ]
    sureness = results.confidences.tolist()
    assert len(set(found)) == len(found) and set(found) <= set(fits)
    assert [sureness[i] for i in found] == sorted((sureness[i] for i in fits), reverse=True)[:count]


def test_the_results_are_of_the_data_as_they_are_now(weights, tmp_path, monkeypatch):
    """Nothing is kept beside the weights, where nothing can be written perhaps."""
    before = sorted(weights.parent.iterdir())
    images = data.load("sample")
    for count in (400, 399):
        now = replace(images, test_images=images.test_images[:count],
                      test_labels=images.test_labels[:count])
        monkeypatch.setattr(data, "load", lambda *_, now=now, **__: now)
        network = demo.Network(weights, "a folder")
        plain, _ = explain.plain_and_flipped(network.model, now)
        assert len(network.results.labels) == count
        assert network.results.accuracy == plain.accuracy
        order = now.test_labels.argsort(stable=True)
        assert torch.equal(network.images(torch.arange(count)), now.test_images[order])
    assert sorted(weights.parent.iterdir()) == before


def test_recorded_results_are_those_of_cifar10_and_of_no_other_data(
    network, weights, tmp_path, monkeypatch
):
    path, made = tmp_path / "s10" / "weights.safetensors", network.results
    wrong = replace(made, logits=made.logits.flip(0))
    save_predictions(wrong, path.with_name("predictions.safetensors"))
    path.write_bytes(weights.read_bytes())
    monkeypatch.setattr(data, "load", lambda *_, **__: network.test_data)

    def results(source):
        return demo.Network(path, source).results

    assert torch.equal(results("cifar10").logits, made.logits)  # of no recorded run of ours
    monkeypatch.setattr(files, "IMAGES", tmp_path)
    assert torch.equal(results("a folder").logits, made.logits)
    assert torch.equal(results("cifar10").logits, wrong.logits.half().float())


def with_classes(path, names):
    """Writes the weights of a network of these classes. Returns pictures of as many for it."""
    torch.manual_seed(0)
    images = data.load("sample")
    few = images.test_labels < len(names)
    several = replace(images, classes=names, test_images=images.test_images[few],
                      test_labels=images.test_labels[few])
    about = run.weights_metadata(recipe("s10"), several)
    files.save_tensors(Small(len(names)).state_dict(), path, about)
    return several


@pytest.mark.parametrize("count", [2, 100])
def test_a_page_of_any_number_of_classes_answers(count, tmp_path, monkeypatch, pictures):
    names = tuple(f"class *{i}*" for i in range(count))
    images = with_classes(tmp_path / "weights.safetensors", names)
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    blocks = demo.page(tmp_path / "weights.safetensors", "a folder")
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(address, **CLIENT)
        (endpoint,) = [each for each in client.view_api(return_format="dict")["named_endpoints"]
                       ["/answer"]["parameters"] if each["label"] == "classes shown"]
        _, label = client.predict(
            upload(pictures / "0.png"), endpoint["parameter_default"], "", "", 0.5,
            api_name="/answer",
        )
        assert len(shares_of(label)) == min(count, 3)
        assert len(client.predict(5, "", "", "", 0.5, api_name="/mistakes")) == 5
    finally:
        blocks.close()


def test_names_are_no_markdown():
    assert demo.class_list(("a*b*", "$c$")) == r"a\*b\*, \$c\$"
    assert demo.class_list([f"c{i}" for i in range(21)]) == "21 classes, from c0 to c20"


def test_without_gradio_it_says_what_to_install(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for more in ([], ["--export", "space"]):
        with pytest.raises(SystemExit, match="^error: [^\n]*pip install gradio$"):
            demo.main(["--weights", str(weights), "--data", "sample", *more])


@pytest.mark.parametrize("share", [False, True])
def test_the_command_serves_the_page_of_its_weights_and_data(weights, monkeypatch, share):
    calls = []

    class Page:
        def __init__(self, *arguments):
            calls.append(arguments)

        def launch(self, **settings):
            calls.append(settings)

    monkeypatch.setattr(demo, "page", Page)
    command = ["--weights", str(weights), "--data", "sample"]
    demo.main([*command, "--share"] if share else command)
    assert calls == [(weights, "sample"), {"share": share}]


# What is answered


def test_answers_over_the_network_are_those_of_the_network(asked, network, model, pictures):
    for name in ("0.png", "large.jpg", "grey.png", "rgba.png"):
        shown, label = asked.predict(upload(pictures / name), 10, "", "", 0.5, api_name="/answer")
        found, expected = shares_of(label), expected_shares(model, pictures / name, 10)
        assert list(found) == list(expected) and found == pytest.approx(expected)
        with Image.open(shown) as picture:
            expected, _ = network.answer(seen(pictures / name))
            assert picture.tobytes() == expected.tobytes()


def test_many_clients_at_once_are_answered_rightly(address, model, pictures):
    """About the same two pictures, as when many click the same example."""
    expected = [expected_shares(model, pictures / f"{i}.png", 10) for i in range(2)]
    layers = ["prep", ""]

    def ask(number):
        client, answers = gradio_client.Client(address, **CLIENT), []
        for i in range(number, number + QUESTIONS):
            wishes = 10, layers[i % 2], "", 0.5
            _, label = client.predict(upload(pictures / f"{i % 2}.png"), *wishes,
                                      api_name="/answer")
            answers.append(shares_of(label) == pytest.approx(expected[i % 2]))
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = sum(pool.map(ask, range(CLIENTS)), [])
    assert answers == [True] * (CLIENTS * QUESTIONS)


def test_no_two_answers_share_a_file(network, tmp_path):
    """Gradio would write it anew while another client is being sent it."""
    image = data.load("sample").test_images[:1]
    found = [network.answer(image)[0], network.answer(image)[0], *network.mistakes(3),
             *network.mistakes(3), *network.examples(), *network.examples()]
    pictures = [each[0] if isinstance(each, tuple) else each for each in found]
    paths = {gradio.processing_utils.save_pil_to_cache(picture, str(tmp_path), format="png")
             for picture in pictures}
    assert len(paths) == len(found) == 28


@pytest.mark.parametrize("name", NOT_SEEN)
def test_what_can_not_be_seen_is_refused_in_words_and_the_page_lives_on(asked, pictures, name):
    with pytest.raises(gradio_client.exceptions.AppError, match=NOT_SEEN[name]):
        asked.predict(upload(pictures / name), 3, "", "", 0.5, api_name="/answer")
    assert asked.predict(upload(pictures / "0.png"), 3, "", "", 0.5, api_name="/answer")


@pytest.mark.parametrize("count, words", [(0, "less than minimum value 1"), (11, "maximum")])
def test_numbers_of_classes_by_hand_are_refused(asked, pictures, count, words):
    with pytest.raises(gradio_client.exceptions.AppError, match=words):
        asked.predict(upload(pictures / "0.png"), count, "", "", 0.5, api_name="/answer")


def test_mistakes_over_the_network(asked, network):
    expected = network.mistakes(7, "star", "", "prep", 0.5)
    shown = asked.predict(7, "star", "", "prep", 0.5, api_name="/mistakes")
    assert [each["caption"] for each in shown] == [caption for _, caption in expected]
    for each, (picture, _) in zip(shown, expected, strict=True):
        with Image.open(each["image"]) as found:
            assert found.tobytes() == picture.tobytes()
    assert asked.predict(7, "star", "star", "prep", 0.5, api_name="/mistakes") == []


@pytest.mark.parametrize("route", ["gradio_api/file=", "static/", "assets/"])
def test_no_other_file_is_handed_out(address, weights, pictures, route):
    for path in ("/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", weights,
                 ROOT / "README.md", "README.md", pictures / "0.png"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + route + urllib.parse.quote(str(path), safe="/%"))
        assert refused.value.code in (403, 404), path


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "file"])
def test_no_other_file_is_classified(address, pictures, meta):
    """By hand, since the client uploads what it is given."""
    cache = Path(gradio.utils.get_upload_folder())
    cache.mkdir(parents=True, exist_ok=True)  # else ".." leads nowhere
    for path in (pictures / "0.png", ROOT / "images/custom_resnet.png", "/etc/passwd",
                 Path(cache, os.path.relpath(pictures / "0.png", cache))):
        wishes = [{"path": str(path), **meta}, 3, "", "", 0.5]
        request = urllib.request.Request(
            f"{address}gradio_api/call/answer", headers={"Content-Type": "application/json"},
            data=json.dumps({"data": wishes}).encode(),
        )
        event = json.load(urllib.request.urlopen(request))["event_id"]
        answer = urllib.request.urlopen(f"{address}gradio_api/call/answer/{event}").read()
        assert answer.startswith(b"event: error"), path


# What a browser shows


@pytest.fixture
def browser(address):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium to lead a browser")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs a browser: chromium, and chromium-driver to lead it")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = selenium.Chrome(options, selenium.ChromeService(paths[1]))
    driver.get(address)
    yield driver
    driver.quit()


def until(fits, seconds=PATIENCE):
    """Waits for what a page has to show; it is redrawn at any time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if fits():
            return
        time.sleep(0.1)
    raise AssertionError("the page does not show it")


def test_a_browser_shows_answers_mistakes_and_results(browser, network, model, pictures):
    def all_of(selector, property):
        script = f"return [...document.querySelectorAll({selector!r})].map(it => it.{property})"
        return browser.execute_script(script)

    def click(selector):
        until(lambda: all_of(selector, "isConnected"))
        browser.execute_script(f"document.querySelector({selector!r}).click()")

    def type_number(name, number):
        field = browser.find_element("css selector", f"[aria-label='number input for {name}']")
        field.send_keys("\ue009a\ue000", f"{number}", "\ue007")  # Ctrl+A, …, Enter

    def shows_shares(path, count):
        expected = expected_shares(model, path, count)
        names, shares = all_of("meter", "ariaLabel"), all_of("meter", "value")
        return names == list(expected) and shares == pytest.approx(list(expected.values()))

    def shows_picture(picture):
        for address_of in all_of("img[src*='/image.png']", "src"):
            with Image.open(io.BytesIO(urllib.request.urlopen(address_of).read())) as found:
                if found.size == (256, 256) and found.tobytes() == picture.tobytes():
                    return True
        return False

    for name in ("large.jpg", "grey.png", "rgba.png"):
        until(lambda: all_of("input[type=file]", "isConnected"))
        browser.find_element("css selector", "input[type=file]").send_keys(str(pictures / name))
        until(lambda name=name: shows_shares(pictures / name, 3))
        click("[aria-label='Remove Image']")
        until(lambda: not all_of("meter", "value"))

    until(lambda: len(all_of(".thumbnail-item", "isConnected")) == 10)
    click("[aria-label^='Thumbnail 5 ']")
    until(lambda: shows_shares(pictures / "4.png", 3))
    type_number("classes shown", 5)
    until(lambda: shows_shares(pictures / "4.png", 5))
    click("[data-testid='prep-radio-label'] input")
    until(lambda: shows_picture(network.answer(seen(pictures / "4.png"), layer="prep")[0]))
    type_number("its opacity", 0.9)
    until(lambda: shows_picture(
        network.answer(seen(pictures / "4.png"), layer="prep", opacity=0.9)[0]
    ))

    click("[aria-label='Remove Image']")
    until(lambda: all_of("input[type=file]", "isConnected"))
    browser.find_element("css selector", "input[type=file]").send_keys(str(pictures / "text.png"))
    until(lambda: any(NOT_SEEN["text.png"] in text for text in
                      all_of("[data-testid=toast-text]", "textContent")))

    results = network.results
    expected = results.captions(demo.surest_mistakes(results, 10))
    until(lambda: len(all_of("[role=tab]", "isConnected")) >= 3)
    browser.find_element("xpath", "//button[@role='tab'][.='Where it errs']").click()
    until(lambda: [text.strip() for text in all_of(".caption-label", "textContent")][-10:]
          == expected)
    browser.find_element("xpath", "//button[@role='tab'][.='How well it does']").click()
    plots = "[data-testid=matplotlib] img"
    until(lambda: [height > 100 for height in all_of(plots, "offsetHeight")] == [True] * 3)
    assert f"{results.accuracy:.2f} %" in browser.find_element("tag name", "body").text


# What is written for Hugging Face


@pytest.fixture(scope="module")
def space(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "space"
    demo.main(["--weights", str(weights), "--data", "sample", "--export", str(folder)])
    return folder


def imported(path):
    """The first names of what a file imports at its top."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_space_has_what_it_imports_and_no_training(space):
    names = {path.stem for path in (space / "utils").glob("*.py")}
    found = {name for path in space.rglob("*.py") for name in imported(path)}
    ours = {name.split(".")[1] for name in found if name.startswith("utils.")}
    assert names == ours - {"InputError"} | {"__init__", "demo"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in space.rglob("*.py"))
    training = r"\.backward\(|optim\.|optimizer\.|scheduler|albumentations|lightning_|train_epoch"
    assert not re.findall(training, code)


def test_the_space_requires_what_it_imports(space):
    libraries = {name.split(".")[0] for path in space.rglob("*.py") for name in imported(path)}
    libraries -= {"utils", *sys.stdlib_module_names}
    lines = (space / "requirements.txt").read_text(encoding="utf-8").split()
    required = {re.split("[=>]=", line)[0] for line in lines}
    assert required == {{"PIL": "pillow"}.get(name, name) for name in libraries} | {"gradio"}
    course = (ROOT / "utils/requirements.txt").read_text(encoding="utf-8").split()
    assert {line for line in lines if not line.startswith("gradio==")} <= set(course)


def test_the_space_says_what_it_is(space):
    card = pytest.importorskip("huggingface_hub").RepoCard((space / "README.md").read_text("utf-8"))
    about = card.data.to_dict()
    assert (about["sdk"], about["sdk_version"]) == ("gradio", gradio.__version__)
    assert (space / about["app_file"]).is_file()
    assert "tells apart disc, ring, " in card.text and "Of 400 test images" in card.text


def test_the_space_shows_what_the_page_does_without_the_data(space, network, monkeypatch):
    examples, surest = network.examples(), network.mistakes(1)
    monkeypatch.setattr(data, "load", None)
    alone = demo.Network(space / "weights.safetensors")
    for (picture, name), (expected, expected_name) in zip(
        alone.examples(), examples, strict=True
    ):
        assert name == expected_name and picture.tobytes() == expected.tobytes()
    count = int((~alone.results.right).sum())
    wrong = alone.mistakes(count)
    assert len(wrong) == count and wrong[0][0].tobytes() == surest[0][0].tobytes()
    assert demo.page(space / "weights.safetensors")


def test_a_folder_that_holds_something_is_not_written_to(space, weights):
    def contents():
        return {path: path.read_bytes() for path in space.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(SystemExit, match="^error: .* is not empty; name a new folder$"):
        demo.main(["--weights", str(weights), "--data", "sample", "--export", str(space)])
    assert contents() == before
