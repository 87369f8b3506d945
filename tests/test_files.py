"""Files that are whole or not there, and files that are damaged, foreign or evil."""

import csv
import errno
import json
import pathlib
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from utils import InputError, files


def network(seed=0):
    """With parameters of one kind and statistics of another."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )


# Whole files, tables, metrics


def test_a_whole_file_takes_the_old_files_place_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "file"
    for text in ("old", "new"):
        with files.whole_file(path) as part:
            part.write_text(text)
            assert text == "old" or path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_is_kept_when_the_block_raises(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.whole_file(path) as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_checkpoint(path):
    files.save_checkpoint(path, IDENTITY, [], {"model": network()})


def write_weights(path):
    files.save_tensors(network().state_dict(), path)


@pytest.mark.parametrize("write", [write_checkpoint, write_weights])
def test_what_can_not_be_written_is_one_line_and_the_old_file_is_kept(tmp_path, small_files, write):
    path = tmp_path / "file"
    path.write_text("old")
    with small_files(100), pytest.raises(InputError, match="^[^\n]*file can't be written [^\n]*$"):
        write(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="can't be written"):
        write(tmp_path / ("x" * 300))
    write(path)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not for its owner alone


@given(st.lists(st.tuples(
    st.integers(0, 2**53), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=5).map("<{}>".format),
), min_size=1))
def test_a_table_is_written_with_all_digits_and_read_again(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    rows = [dict(zip(("epoch", "lr", "name"), row, strict=True)) for row in rows]
    files.save_table(rows, path)
    with open(path, newline="", encoding="utf-8") as file:
        assert [
            {"epoch": int(row["epoch"]), "lr": float(row["lr"]), "name": row["name"]}
            for row in csv.DictReader(file)
        ] == rows
    assert files.read_table(path).to_dict("records") == rows


def test_commits_and_versions_of_digits_alone_stay_texts(tmp_path):
    row = {"commit": "1133556", "data": "0012345678901234", "torch": "2.10", "epochs": 5}
    files.save_table([row, {**row, "commit": "12e4567"}], tmp_path / "t.csv")
    first, second = files.read_table(tmp_path / "t.csv").to_dict("records")
    assert first == row and second["commit"] == "12e4567"


def test_empty_fields_of_a_table_are_empty_texts(tmp_path):
    files.save_table([{"a": "", "b": "NA"}, {"a": None, "b": "x"}], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == b"a,b\n,NA\n,x\n"
    assert files.read_table(tmp_path / "t.csv").to_numpy().tolist() == [["", "NA"], ["", "x"]]


@pytest.mark.parametrize("content", [None, b"", b'{"seed": ', b"\xff"])
def test_without_readable_metrics_there_is_no_finished_run(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_bytes(content)
    folder = re.escape(str(tmp_path))
    with pytest.raises(InputError, match=f"^no finished run in {folder}; [^\n]*$"):
        files.read_metrics(tmp_path)


# Checkpoints


IDENTITY = {"recipe": {"epochs": 3, "sizes": [16, 32]}, "precision": "float32", "seed": 0}


def saved(path):
    files.save_checkpoint(path, IDENTITY, [{"epoch": 1}], {"model": network()})
    return path


def refused(path, words, identity=IDENTITY):
    """One line that names the file, which is left as it is, as are the parts."""
    before, model = path.read_bytes(), network(1)
    message = f"^the checkpoint {re.escape(str(path))} [^\n]*{words}[^\n]*$"
    with pytest.raises(InputError, match=message):
        files.read_checkpoint(path, identity)
    with pytest.raises(InputError, match=message):
        files.restore_checkpoint(path, identity, {"model": model}, device="cpu")
    assert path.read_bytes() == before
    assert torch.equal(model[0].weight, network(1)[0].weight)


def test_a_checkpoint_is_restored(tmp_path):
    model = network(1)
    history = files.restore_checkpoint(
        saved(tmp_path / "c.pt"), IDENTITY, {"model": model}, device="cpu"
    )
    assert history == [{"epoch": 1}]
    assert torch.equal(model[0].weight, network()[0].weight)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_damaged(tmp_path, share):
    path = saved(tmp_path / "c.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "damaged")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"), torch.OutOfMemoryError(),
], ids=["OSError", "OutOfMemoryError"])
def test_what_can_not_be_read_just_now_is_to_be_tried_again(tmp_path, monkeypatch, request, error):
    def load(*_, **__):
        raise error

    path = saved(tmp_path / "c.pt")
    monkeypatch.setattr(torch, "load", load)
    refused(path, rf"can't be read \({request.node.callspec.id}\); try again, or if it is damaged")


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02garbage", b"PK\x03\x04garbage"])
def test_garbage_is_damaged(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    refused(tmp_path / "c.pt", "damaged")


def test_a_wrong_byte_is_damage(tmp_path):
    path = saved(tmp_path / "c.pt")
    path.write_bytes(path.read_bytes().replace(b"history", b"h\xffstory"))
    refused(path, "damaged")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("identity", [IDENTITY, None], ids=["identity", "no identity"])
@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {"identity": "x"}, network().state_dict()],
    ids=["list", "tensor", "a text for the identity", "weights"],
)
def test_another_programs_file_is_none_of_ours(tmp_path, content, identity):
    torch.save(content, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "none of ours", identity)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("save, load", [
    (torch.save, lambda path: torch.load(path, weights_only=False)),
    (lambda x, path: path.write_bytes(pickle.dumps(x, 2)),
     lambda path: pickle.loads(path.read_bytes())),
], ids=["torch", "pickle"])
def test_a_checkpoint_runs_no_code(tmp_path, save, load):
    path, trace = tmp_path / "c.pt", tmp_path / "trace"
    save({"identity": Evil(trace)}, path)
    refused(path, "damaged")
    assert not trace.exists()
    load(path)
    assert trace.exists(), "the file is harmless"


@pytest.mark.parametrize("changes, words", [
    ({"recipe": {"epochs": 4, "sizes": [16, 32]}}, "its recipe differs"),
    ({"recipe": {"epochs": 3, "sizes": []}}, "its recipe differs"),
    ({"precision": "bfloat16", "seed": 1}, "its precision and seed differs"),
    ({"data": "0123"}, "its data differs"),
], ids=str)
def test_a_checkpoint_of_another_run_says_what_differs(tmp_path, changes, words):
    refused(saved(tmp_path / "c.pt"), words, {**IDENTITY, **changes})


# Weights


METADATA = {"recipe": "s10", "seed": 3, "classes": ["blue", "grün"], "std": [0.30000000000000004]}


def test_weights_are_read_as_they_were_written(tmp_path):
    files.save_tensors(network().state_dict(), tmp_path / "w", METADATA)
    tensors, metadata = files.read_tensors(tmp_path / "w")
    assert metadata == METADATA
    assert tensors.keys() == network().state_dict().keys()
    for name, tensor in network().state_dict().items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_same_weights_same_bytes(tmp_path):
    for i, metadata in enumerate([METADATA, dict(sorted(METADATA.items()))] * 3):
        files.save_tensors(network().state_dict(), tmp_path / str(i), metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert load_file(tmp_path / "0").keys() == network().state_dict().keys()


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:100], lambda content: b"",
    lambda content: b"epoch,lr\n1,0.1\n",
], ids=["cut", "cut in the header", "empty", "a table"])
def test_a_damaged_weights_file(tmp_path, damage):
    files.save_tensors(network().state_dict(), tmp_path / "w", METADATA)
    (tmp_path / "w").write_bytes(damage((tmp_path / "w").read_bytes()))
    with pytest.raises(InputError, match="w is damaged or no safetensors file; [^\n]*$"):
        files.read_tensors(tmp_path / "w")


def test_a_weights_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"^no weights file .*none; [^\n]*of a run$"):
        files.read_tensors(tmp_path / "none")


@pytest.mark.parametrize("about, metadata", [
    (None, {}), ({"other": "x"}, {}), ({"run": json.dumps(METADATA)}, METADATA),
    ({"run": "blue"}, InputError),
], ids=str)
def test_what_another_programs_weights_say(tmp_path, about, metadata):
    save_file({"x": torch.zeros(2)}, tmp_path / "w", about)
    if metadata is InputError:
        with pytest.raises(InputError, match="w is damaged"):
            files.read_tensors(tmp_path / "w")
    else:
        assert files.read_tensors(tmp_path / "w")[1] == metadata
