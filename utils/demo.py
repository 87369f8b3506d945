"""A page to ask a trained network: `python -m utils.demo`; for the web: `… --export FOLDER`.

What stands before `page` computes and needs no browser; `page` lays out. Pictures for the page are
uint8 arrays (H, W, 3).
"""

import functools
import re
import shutil
import string
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch
from PIL import Image

from utils import InputError, data, devices, explain, files, plotting
from utils.models import load_weights
from utils.results import read_predictions, save_predictions

SIDE = 256  # of the pictures on the page, in pixels: as many whole times their own as fit

# As many columns as there is room for, and captions whole.
STYLE = """
<style>
.at{0} .grid-container {{grid: auto-flow / repeat(auto-fill, minmax({0}px, 1fr)) !important}}
.at{0} .grid-wrap {{height: auto !important; min-height: 0 !important; max-height: none !important}}
.at{0} .caption-label {{max-width: 100% !important; white-space: normal !important}}
</style>"""

# What a Space needs.
MODULES = "__init__ progress sample data devices files models results explain plotting demo"
LIBRARIES = "torch numpy pandas pillow matplotlib safetensors captum tqdm"
APP = """from pathlib import Path

from utils.demo import page

page(Path(__file__).with_name("weights.safetensors")).launch()
"""


@dataclass(frozen=True)
class Arguments:
    """Opens a page, on this machine only, to ask a trained network."""

    weights: Path = files.IMAGES / "s10" / "weights.safetensors"
    """weights.safetensors of a run; those of s10 come with the repository"""
    data: str = "cifar10"
    """as for utils.train: for examples and misclassified images"""
    share: bool = False
    """give the page a public address as well, for a while"""
    export: Path | None = None
    """write a folder for Hugging Face Spaces instead"""


def main(arguments=None):
    import tyro  # here, because a Space has neither

    from utils.train import as_command

    with as_command():
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.demo")
        if args.export:
            export(args.export.expanduser(), args.weights, args.data)
        else:
            page(args.weights, args.data).launch(share=args.share)


class Network:
    """A trained network, its test images and what it makes of them, each read when it is wanted.

    `source`: the data, as `data.load` names them; None: what `export` wrote beside the weights.
    """

    def __init__(self, weights, source=None):
        self.model = load_weights(weights).to(devices.pick_device())
        self.weights, self.source = weights, source

    @functools.cached_property
    def test_data(self):
        """An `ImageData` without training images, its test images sorted by class."""
        images = data.load(self.source, train=False, resize=self.model.size)
        labels, order = images.test_labels.sort(stable=True)
        return replace(images, test_images=images.test_images[order], test_labels=labels)

    @functools.cached_property
    def results(self):
        """`Results` of the test images, sorted by class.

        Recorded ones of the networks that come with the repository, on CIFAR-10, which stays as
        it is; any other data may have changed.
        """
        recorded = self.weights.with_name("predictions.safetensors")
        ours = self.weights.resolve().is_relative_to(files.IMAGES.resolve())
        if self.source is None or (self.source == "cifar10" and ours):
            return read_predictions(recorded)
        return explain.predictions(self.model, self.test_data)

    @functools.cached_property
    def pictures(self):
        """{index in `results`: image uint8 (3, H, W)}."""
        if self.source is None:
            kept, _ = files.read_tensors(self.weights.with_name("images.safetensors"))
            return dict(zip(kept["indices"].tolist(), kept["images"], strict=True))
        return dict(enumerate(self.test_data.test_images))

    def images(self, indices):
        """Those at `indices`, int64 (N,), of the results: uint8 (N, 3, H, W)."""
        return torch.stack([self.pictures[index] for index in indices.tolist()])

    def examples(self):
        """[(picture, class)] of the first test image of each class that occurs."""
        first = first_of_each(self.results)
        names = [self.model.classes[label] for label in self.results.labels[first]]
        return list(zip(pictures(self.images(first)), names, strict=True))

    def answer(self, images, count=3, layer="", name="", opacity=0.5):
        """(picture as it is shown, {class: probability} of the `count` likeliest).

        `images`: the one that is asked about, uint8 (1, 3, H, W), or None, for which there is no
        answer. `layer`: whose Grad-CAM to lay over; "" for none. `name`: for which class; "" for
        the likeliest.
        """
        if images is None:
            return None, None
        shares, best = explain.probabilities(self.model, images)[0].topk(count)
        classes = self.model.classes
        of = torch.tensor([classes.index(name)]) if name else best[:1]
        label = {classes[i]: share for i, share in zip(best.tolist(), shares.tolist(), strict=True)}
        return *shown(self.model, images, of, layer, opacity), label

    def mistakes(self, count, true="", predicted="", layer="", opacity=0.5):
        """[(picture, caption)] of the `surest_mistakes`, each with the Grad-CAM of its error."""
        indices = surest_mistakes(self.results, count, true, predicted)
        if not len(indices):
            return []
        classes = self.results.predictions[indices]
        wrong = shown(self.model, self.images(indices), classes, layer, opacity)
        return list(zip(wrong, self.results.captions(indices), strict=True))


def first_of_each(results):
    """Indices int64 of the first image of each class that occurs, of `results` sorted by class."""
    return torch.searchsorted(results.labels, results.labels.unique())


def pictures(images):
    """Images uint8 (N, 3, H, W) for Gradio: a list of PIL images, no two with the same content.

    Gradio names a file by its content, and writes it anew while other visitors are being sent it.
    """
    found = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    for picture in found:
        picture.info["answer"] = uuid4().hex
    return found


def shown(model, images, classes=None, layer="", opacity=0.5):
    """`pictures` of enlarged images; if `layer` is named, with its Grad-CAM for `classes` (N,)."""
    zoom = max(1, SIDE // max(images.shape[2:]))
    large = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    if layer:
        maps = explain.grad_cam(model, images, classes, layer=layer)
        large = plotting.heat(large, maps, opacity=opacity)
    return pictures(large)


def upload(payload, cache, size):
    """An uploaded picture as the network sees it, uint8 (1, 3, *size); None for none.

    Raises InputError for a file outside the folder `cache`, which Gradio would take as well.
    """
    if payload is None:
        return None
    if not Path(payload.path).resolve().is_relative_to(Path(cache).resolve()):
        raise InputError("this file was not uploaded; upload it")
    return data.read_picture(payload.path, size)[None]


def surest_mistakes(results, count, true="", predicted=""):
    """Indices int64 of at most `count` wrong predictions, the surest first.

    `true`, `predicted`: the name of a class; "" for any.
    """
    wrong = ~results.right
    for name, labels in ((true, results.labels), (predicted, results.predictions)):
        if name:
            wrong &= labels == results.classes.index(name)
    order = results.confidences.argsort(descending=True)
    return order[wrong[order]][:count]


def class_list(classes):
    """The names of the classes for a sentence in Markdown; of many the first and the last."""
    names = [re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", name) for name in classes]
    if len(names) <= 20:
        return ", ".join(names)
    return f"{len(names)} classes, from {names[0]} to {names[-1]}"


def _gradio():
    try:
        import gradio  # here, because it takes seconds
    except ImportError as error:
        raise InputError("the page needs Gradio; pip install gradio") from error
    return gradio


def page(weights, source=None):
    """The page, a `gradio.Blocks`, of a `Network`. Raises InputError without Gradio."""
    gr = _gradio()
    # Grad-CAM hooks into a network, which no other thread may use meanwhile. So there is one for
    # uploads, and one for all that needs the data; the events of each wait for one another.
    asked, network = Network(weights), Network(weights, source)
    with gr.Blocks(title="Ask the network", analytics_enabled=False) as blocks:
        gr.Markdown("# Ask the trained network")
        gr.Markdown(f"It knows {class_list(network.model.classes)}.", latex_delimiters=[])
        with gr.Tab("A picture"), gr.Row():
            _picture_tab(gr, blocks, asked, network)
        with gr.Tab("Where it errs") as tab:
            _mistakes_tab(gr, tab, network)
        with gr.Tab("How well it does"):
            _results_tab(gr, network.results)
    blocks.launch = functools.partial(blocks.launch, show_error=True)  # the page says what is wrong
    return blocks.queue(api_open=False)


IN_TURN = {"concurrency_id": "data", "concurrency_limit": 1, "show_progress": "minimal"}
LATEST = {"trigger_mode": "always_last", "show_progress": "minimal"}


def _picture_tab(gr, blocks, asked, network):
    """Asks about a picture of the visitor's or an example."""
    with gr.Column(min_width=280):
        gr.Markdown("Your picture:")
        picture = gr.Image(type="filepath", format="png", height=SIDE, show_label=False,
                           sources=["upload", "clipboard", "webcam"])
        picture.preprocess = functools.partial(
            upload, cache=picture.GRADIO_CACHE, size=asked.model.size
        )
        shelf = _gallery(gr, "Or an example:", 88)
    with gr.Column(min_width=280):
        gr.Markdown("What the network sees:")
        seen = gr.Image(format="png", height=SIDE, show_label=False, interactive=False, buttons=[])
        layer, opacity = _grad_cam(gr, asked.model)
        of = _class_menu(gr, asked.model, "for class", "the likeliest")
    with gr.Column(min_width=280):
        gr.Markdown("What it takes it for:")
        label = gr.Label(show_label=False, show_heading=False)
        most = min(10, len(asked.model.classes))
        count = gr.Slider(1, most, min(3, most), step=1, label="classes shown")

    def chosen(event: gr.SelectData):
        return network.examples()[event.index][0]

    wishes = [picture, count, layer, of, opacity]
    gr.on([each.change for each in wishes], asked.answer, wishes, [seen, label],
          api_name="answer", **LATEST)
    blocks.load(network.examples, None, shelf, api_visibility="private", **IN_TURN)
    shelf.select(chosen, None, picture, api_visibility="private", **IN_TURN)


def _mistakes_tab(gr, tab, network):
    with gr.Row():
        number = gr.Slider(1, 50, 10, step=1, label="images")
        true = _class_menu(gr, network.model, "true class", "any")
        predicted = _class_menu(gr, network.model, "predicted class", "any")
        cam = _grad_cam(gr, network.model)
    wrong = _gallery(gr, "True class → predicted class; the surest first.", 170)
    wishes = [number, true, predicted, *cam]
    gr.on([tab.select, *(each.change for each in wishes)], network.mistakes, wishes, wrong,
          api_name="mistakes", **IN_TURN | LATEST)


def _results_tab(gr, results):
    gr.Markdown(
        f"**{results.accuracy:.2f} %** of {len(results.labels):,} test images are right. "
        f"Confidence is off by {results.calibration_error:.2f} points on average (ECE)."
    )
    gr.Markdown(class_list(plotting.numbered(results.classes)))
    plotting.use_style()
    with gr.Row():
        with gr.Column(min_width=400):
            gr.Plot(plotting.calibration(results).figure, show_label=False)
            gr.Plot(plotting.per_class_accuracy(results).figure, show_label=False)
        with gr.Column(min_width=400):
            gr.Plot(plotting.confusion_matrix(results).figure, show_label=False)


def _gallery(gr, title, width):
    """With columns of at least `width` pixels."""
    gr.Markdown(f"{title}\n{STYLE.format(width)}", sanitize_html=False)
    return gr.Gallery(height="auto", format="png", show_label=False, elem_classes=f"at{width}",
                      allow_preview=False, interactive=False, buttons=[])


def _class_menu(gr, model, label, any_class):
    return gr.Dropdown([(any_class, ""), *model.classes], value="", label=label)


def _grad_cam(gr, model):
    parts = [name for name, _ in model.named_children() if name not in ("pool", "fc")]
    return (gr.Radio([("off", ""), *parts], value="", label="Grad-CAM of layer"),
            gr.Slider(0, 1, 0.5, step=0.05, label="its opacity"))


def export(folder, weights, source):
    """Writes a folder that Hugging Face Spaces runs as it is, with the test images that it shows.

    Those are the misclassified ones, and one of each class as an example. Raises InputError where
    the folder holds something already, and without Gradio.
    """
    gradio = _gradio()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder")
    here = Path(__file__).parent
    network = Network(weights, source)
    save_predictions(network.results, folder / "predictions.safetensors")
    results = read_predictions(folder / "predictions.safetensors")  # to fewer digits
    wrong = surest_mistakes(results, len(results.labels))
    indices = torch.cat([first_of_each(results), wrong]).unique()
    images = {"indices": indices, "images": network.images(indices)}
    files.save_tensors(images, folder / "images.safetensors")
    shutil.copyfile(weights, folder / "weights.safetensors")
    (folder / "utils").mkdir()
    for name in MODULES.split():
        shutil.copyfile(here / f"{name}.py", folder / f"utils/{name}.py")
    lines = (here / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if line.split(">=")[0] in LIBRARIES.split()]
    files.save_text("\n".join([*needed, f"gradio=={gradio.__version__}\n"]),
                    folder / "requirements.txt")
    files.save_text(APP, folder / "app.py")
    about = (here / "space.md").read_text(encoding="utf-8").format(
        version=gradio.__version__, classes=class_list(results.classes), count=len(results.labels),
        parameters=sum(each.numel() for each in network.model.parameters()),
        accuracy=results.accuracy,
    )
    files.save_text(about, folder / "README.md")


if __name__ == "__main__":
    main()
