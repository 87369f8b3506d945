"""A page to ask a trained network: `python -m utils.demo`; for the web: `… --export FOLDER`.

What stands before `page` computes and needs no browser; `page` lays out. Pictures for the page are
uint8 arrays (H, W, 3).
"""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from utils import InputError, data, devices, explain, files, plotting
from utils.models import load_weights
from utils.results import read_predictions, save_predictions

ZOOM = 8  # a pixel of the network's picture becomes 8×8 on the page

# As many columns as there is room for, and captions whole.
STYLE = """
<style>
.at{0} .grid-container {{grid: auto-flow / repeat(auto-fill, minmax({0}px, 1fr)) !important}}
.at{0} .grid-wrap {{height: auto !important; min-height: 0 !important; max-height: none !important}}
.at{0} .caption-label {{max-width: 100% !important; white-space: normal !important}}
</style>"""

# What a Space needs.
MODULES = "__init__ progress sample data devices files models results explain plotting demo"
LIBRARIES = "torch torchvision numpy pandas pillow matplotlib safetensors captum tqdm"
APP = """from pathlib import Path

from utils.demo import page

page(Path(__file__).with_name("weights.safetensors"), {source!r}, nearest=False).launch()
"""


@dataclass(frozen=True)
class Arguments:
    """Opens a page, on this machine only, to ask a trained network."""

    weights: Path = files.IMAGES / "s10" / "weights.safetensors"
    """weights.safetensors of a run; those of s10 come with the repository"""
    data: str = "cifar10"
    """as for utils.train: for examples, misclassified and nearest images"""
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
            export(args.export, args.weights, args.data)
        else:
            page(args.weights, args.data).launch(share=args.share)


def recorded(model, path, source):
    """`Results` of `path`; without such a file those of the data's test images, now kept there."""
    if not path.exists():
        images = data.load(source, train=False, resize=model.size)
        save_predictions(explain.predictions(model, images), path)
    return read_predictions(path)


def test_images(model, results, source):
    """The images that the recorded `results` are of, uint8 (N, 3, H, W).

    Raises InputError where the data are others, by their labels and ten predictions.
    """
    images = data.load(source, train=False, resize=model.size)
    images.check_classes(model.classes)
    labels, order = images.test_labels.sort(stable=True)
    pictures, some = images.test_images[order], slice(None, None, max(1, len(order) // 10))
    if torch.equal(labels, results.labels):
        shares = explain.probabilities(model, pictures[some])
        if torch.allclose(shares, results.logits[some].softmax(1), atol=0.1):
            return pictures
    raise InputError(f"the recorded predictions are not of {images.name}; name their --data")


def first_of_each(results, images):
    """[(picture, class)] of the first image of each class that occurs."""
    labels, pictures = results.labels.tolist(), images.permute(0, 2, 3, 1).numpy()
    return [(pictures[labels.index(i)], results.classes[i]) for i in sorted(set(labels))]


def shown(model, images, classes=None, layer="", opacity=0.5):
    """A list of the images enlarged; if `layer` is named, with its Grad-CAM for `classes` (N,)."""
    pictures = images.repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
    if layer:
        maps = explain.grad_cam(model, images, classes, layer=layer)
        pictures = plotting.heat(pictures, maps, opacity=opacity)
    return list(pictures.permute(0, 2, 3, 1).numpy())


def answer(model, images, count=3, layer="", name="", opacity=0.5):
    """(an image as it is shown, {class: probability} of the `count` likeliest).

    `images`: the one that is asked about, uint8 (1, 3, H, W). `layer`: whose Grad-CAM to lay over;
    "" for none. `name`: for which class; "" for the likeliest.
    """
    shares, best = explain.probabilities(model, images)[0].topk(count)
    of = torch.tensor([model.classes.index(name)]) if name else best[:1]
    names = [model.classes[i] for i in best]
    return *shown(model, images, of, layer, opacity), dict(zip(names, shares.tolist(), strict=True))


def resembling(model, asked, images, features):
    """[(picture, class)] of the three training images of an `ImageData` most like `asked`.

    `asked`: uint8 (1, 3, H, W). `features`: the `explain.embeddings` of the training images.
    """
    (nearest,) = explain.nearest(explain.embeddings(model, asked), features)
    names = [images.classes[label] for label in images.train_labels[nearest]]
    return list(zip(shown(model, images.train_images[nearest]), names, strict=True))


def surest_mistakes(results, count, true="", predicted=""):
    """Indices int64 of at most `count` wrong predictions, the surest first.

    `true`, `predicted`: the name of a class; "" for any.
    """
    wrong = results.predictions != results.labels
    for name, labels in ((true, results.labels), (predicted, results.predictions)):
        if name:
            wrong &= labels == results.classes.index(name)
    order = results.confidences.argsort(descending=True)
    return order[wrong[order]][:count]


def captions(results, indices):
    """["cat 3 % → dog 97 %"]: true and predicted class of each."""
    pairs = torch.stack([results.labels, results.predictions], 1)[indices]
    shares = 100 * results.logits[indices].softmax(1).gather(1, pairs)
    return [
        f"{results.classes[true]} {low:.0f} % → {results.classes[predicted]} {high:.0f} %"
        for (true, predicted), (low, high) in zip(pairs.tolist(), shares.tolist(), strict=True)
    ]


def page(weights, source, *, nearest=True):
    """The page, a `gradio.Blocks`, for a weights file and the data that `data.load` calls `source`.

    Images are read when they are first shown. The examples come from the folder examples/ beside
    the weights, where there is one. `nearest`: offer the nearest training images. Raises
    InputError without Gradio.
    """
    try:
        import gradio as gr  # here, because it takes seconds
    except ImportError as error:
        raise InputError("the page needs Gradio; pip install gradio") from error

    # Grad-CAM hooks into a network, which no other thread may use meanwhile. So there is one for
    # uploads, and one for all that needs the data; the events of each wait for one another.
    model, other = load_weights(weights), load_weights(weights).to(devices.pick_device())
    results = recorded(other, weights.with_name("predictions.safetensors"), source)
    tested = functools.cache(lambda: test_images(other, results, source))

    @functools.cache
    def trained():
        images = data.load(source, resize=other.size)
        return images, explain.embeddings(other, images.train_images)

    @functools.cache
    def examples():
        kept = sorted(weights.with_name("examples").glob("*.png"))
        return [(Image.open(path), path.stem) for path in kept] or first_of_each(results, tested())

    def mistakes(count, true, predicted, layer, opacity):
        indices = surest_mistakes(results, count, true, predicted)
        if not len(indices):
            return []
        wrong = shown(other, tested()[indices], results.predictions[indices], layer, opacity)
        return list(zip(wrong, captions(results, indices), strict=True))

    def nearest_to(images):
        return [] if images is None else resembling(other, images, *trained())

    def asked(images, *wishes):
        return (None, None) if images is None else answer(model, images, *wishes)

    def chosen(event: gr.SelectData):
        return examples()[event.index][0]

    def uploaded(payload):
        """As the network sees it. Gradio would take any path by hand, and fail without a reason."""
        if payload is None:
            return None
        if not gr.utils.is_in_or_equal(payload.path, picture.GRADIO_CACHE):
            raise InputError("this file was not uploaded; upload it")
        return data.read_picture(payload.path, model.size)[None]

    def gallery(title, width):
        """With columns of at least `width` pixels."""
        gr.Markdown(f"{title}\n{STYLE.format(width)}", sanitize_html=False)
        return gr.Gallery(height="auto", format="png", show_label=False, elem_classes=f"at{width}",
                          allow_preview=False, interactive=False, buttons=[])

    def class_menu(label, any_class):
        return gr.Dropdown([(any_class, ""), *model.classes], value="", label=label)

    def cam_controls():
        parts = [name for name, _ in model.named_children() if name not in ("pool", "fc")]
        return (gr.Radio([("off", ""), *parts], value="", label="Grad-CAM of layer"),
                gr.Slider(0, 1, 0.5, step=0.05, label="its opacity"))

    with gr.Blocks(title="Ask the network", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Ask the trained network\nIt knows {', '.join(model.classes)}.")
        with gr.Tab("A picture"), gr.Row():
            with gr.Column(min_width=280):
                gr.Markdown("Your picture:")
                picture = gr.Image(type="filepath", format="png", height=256, show_label=False,
                                   sources=["upload", "clipboard", "webcam"])
                picture.preprocess = uploaded
                shelf = gallery("Or an example:", 88)
            with gr.Column(min_width=280):
                gr.Markdown("What the network sees:")
                seen = gr.Image(format="png", height=256, show_label=False, interactive=False,
                                buttons=[])
                layer, opacity = cam_controls()
                of = class_menu("for class", "the likeliest")
            with gr.Column(min_width=280):
                gr.Markdown("What it takes it for:")
                label = gr.Label(show_label=False, show_heading=False)
                count = gr.Slider(1, min(10, len(model.classes)), 3, step=1, label="classes shown")
                if nearest:
                    find = gr.Button("Find the three nearest training images")
                    alike = gallery("The first time this takes minutes.", 80)
        with gr.Tab("Where it errs") as errors:
            with gr.Row():
                number = gr.Slider(1, 50, 10, step=1, label="images")
                pair = class_menu("true class", "any"), class_menu("predicted class", "any")
                cam = cam_controls()
            wrong = gallery("True class → predicted class; the surest first.", 170)
        with gr.Tab("How well it does"):
            gr.Markdown(
                f"**{results.accuracy:.2f} %** of {len(results.labels):,} test images are right. "
                f"Confidence is off by {results.calibration_error:.2f} points on average (ECE)."
            )
            plotting.use_style()
            with gr.Row():
                with gr.Column(min_width=400):
                    gr.Plot(plotting.per_class_accuracy(results).figure, show_label=False)
                    gr.Plot(plotting.calibration(results).figure, show_label=False)
                with gr.Column(min_width=400):
                    gr.Plot(plotting.confusion_matrix(results).figure, show_label=False)

        in_turn = {"concurrency_id": "data", "concurrency_limit": 1, "show_progress": "minimal"}
        latest = {"trigger_mode": "always_last", "show_progress": "minimal"}
        wishes = [picture, count, layer, of, opacity]
        gr.on([each.change for each in wishes], asked, wishes, [seen, label], api_name="answer",
              **latest)
        if nearest:
            find.click(nearest_to, picture, alike, api_name="nearest", **in_turn)
        wishes = [number, *pair, *cam]
        gr.on([errors.select, *(each.change for each in wishes)], mistakes, wishes, wrong,
              api_name="mistakes", **in_turn | latest)
        blocks.load(examples, None, shelf, api_visibility="private", **in_turn)
        shelf.select(chosen, None, picture, api_visibility="private", **in_turn)
    blocks.launch = functools.partial(blocks.launch, show_error=True)  # the page says what is wrong
    return blocks.queue(api_open=False)


def export(folder, weights, source):
    """Writes a folder that Hugging Face Spaces runs as it is, with examples from the data `source`.

    Misclassified images it downloads with CIFAR-10 when they are first asked for, if the data are
    not the sample. Raises InputError where the folder holds something already.
    """
    import gradio

    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder")
    here, model = Path(__file__).parent, load_weights(weights)
    results = recorded(model, weights.with_name("predictions.safetensors"), source)
    pictures = test_images(model, results, source)
    for part in ("utils", "examples"):
        (folder / part).mkdir(parents=True)
    for name in MODULES.split():
        shutil.copyfile(here / f"{name}.py", folder / f"utils/{name}.py")
    for name in ("weights.safetensors", "predictions.safetensors"):
        shutil.copyfile(weights.with_name(name), folder / name)
    for picture, name in first_of_each(results, pictures):
        Image.fromarray(picture).save(folder / f"examples/{name}.png")
    lines = (here / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if line.split(">=")[0] in LIBRARIES.split()]
    files.save_text("\n".join([*needed, f"gradio=={gradio.__version__}\n"]),
                    folder / "requirements.txt")
    source = source if source == "sample" else "cifar10"  # a folder does not go along
    files.save_text(APP.format(source=source), folder / "app.py")
    about = (here / "space.md").read_text(encoding="utf-8").format(
        version=gradio.__version__, classes=", ".join(model.classes), count=len(results.labels),
        parameters=sum(each.numel() for each in model.parameters()), accuracy=results.accuracy,
    )
    files.save_text(about, folder / "README.md")


if __name__ == "__main__":
    main()
