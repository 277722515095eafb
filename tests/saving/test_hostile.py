"""Models on disk that are damaged, hostile or of another format."""

import copy
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from taulearn import load_model, prune, save_model
from taulearn.nn import TimeVariableNetwork, activation_names, fractional_dnn, resnet

FILES = {"model.safetensors", "model.json"}
STORED = Path(__file__).parent / "stored"
"""Models that were saved in format 1."""
KEYWORDS = ["model", "keywords"]
ACTIVATION = [*KEYWORDS, "activation"]
PAD = {"builder": "Pad", "keywords": {"width": 3}}


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"model.json does not exist: path must be a folder that save_model wrote"
    ):
        load_model(tmp_path / "nowhere")
    save_model(resnet(2, 3, 1, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model.json does not exist"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.json does not exist"):
        load_model(tmp_path)


def edited(folder: Path, *keys: str | int, value: object) -> Path:
    """The folder, with one value in its manifest replaced."""
    manifest = json.loads((folder / "model.json").read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "model.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], 3, "must have format 1 or 2, got 3: load it with the version of taulearn that wrote it, '0"),
        (["format"], True, "must have a format"),
        (["surprise"], 1, r"the file must be .* differs in \['surprise'\]"),
        (["time_steps", "surprise"], 1, r"time_steps must be .* differs in \['surprise'\]"),
        ([*KEYWORDS, "in_features"], "3", "keywords.in_features must be an integer in .*, got '3'"),
        ([*KEYWORDS, "in_features"], 10**12, "keywords.in_features must be an integer in"),
        ([*KEYWORDS, "in_features"], 2**28, r"layers.0.linear.weight must be .float32 \(3, 268435456\)., got"),
        ([*KEYWORDS, "hidden_layers"], 2**28, r"keywords.hidden_layers must be an integer in 1 .. 4096"),
        ([*KEYWORDS, "hidden_layers"], 2, "origin must be numbers of 2 layers, got 2"),
        ([*KEYWORDS, "width"], [3, 3], "width must be one integer or 3 integers"),
        ([*KEYWORDS, "width"], [], "keywords.width must be"),
        ([*KEYWORDS, "device"], "cpu", r"keywords must be .* differs in \['device'\]"),
        ([*KEYWORDS, "skips"], {"builder": "Identity", "keywords": {}}, "skips must be 'pad' or 'learned'"),
        ([*KEYWORDS, "activation"], "os.system", "activation must be one of"),
        ([*ACTIVATION, "name"], "os.system", "activation must be one of"),
        ([*ACTIVATION, "name"], "taneh", "did you mean 'tanh'"),
        ([*ACTIVATION, "options"], {"device": "cpu"}, "option of model.activation 'prelu' must be one"),
        ([*ACTIVATION, "options"], {"num_parameters": 2**62}, "cannot have options"),
        ([*ACTIVATION, "options"], {"num_parameters": 2**40}, r"weight must be .float32 \(1099"),
        ([*ACTIVATION, "options"], {"init": "x"}, "option init .* must be a finite number"),
        ([*ACTIVATION, "options"], {"init": float("inf")}, "option init .* must be a finite number"),
        (["model", "builder"], "os.system", "model.builder must be one of"),
        (["model", "builder"], "Linear", "model.keywords must be an object with in_features, out_features, bias"),
        (["model"], {"kind": "network", "dtype": "float32", **PAD}, "model must be a network, got a Pad"),
        (["model", "kind"], "pickled", "model.kind must be one of .* got 'pickled'"),
        (["model", "dtype"], "float64", r"must be .float64 \(3, 2\)., got .float32"),
        (["scheme", "name"], "resdual", "did you mean 'residual'"),
        (["scheme", "name"], "fractional", r"options \['gamma', 'memory', 'memory_from', 'tolerance'\], got \{\}"),
        (["time_steps", "origin"], [], "origin must be a list of at least 1 item"),
        (["time_steps", "origin"], [0, 1], r"layers.2.linear.weight is unexpected"),
        (["time_steps", "origin"], [1, 2], "must contain layer 0"),
        (["time_steps", "origin"], [0, 1, 3], "origin must be numbers of 3 layers, got 3"),
        (["time_steps", "origin"], [0, 2, 2], "origin must increase"),
        (["time_steps", "origin"], [0, 2, 1], "origin must increase"),
        (["time_steps", "parents"], [[3, 3]], "parents must be pairs"),
        (["time_steps", "parents"], [[3]], "parents must be pairs"),
        (["time_steps", "parents"], [[3, "1"]], "parents.0.1 must be an integer"),
        (["time_steps", "next_number"], -1, "next_number must be an integer"),
        (["time_steps", "horizon"], -1.0, "horizon must be a positive finite number"),
        (["time_steps", "horizon"], float("nan"), "horizon must be a finite number"),
        (["time_steps", "constraint"], "dependent", r"time_steps.values must be .float32 \(2,\)., got .float32 \(3,\)"),
        (["weights_sha256"], "../../etc/passwd", "must have the sha256 '../../etc/passwd'"),
        (["weights_sha256"], 3, "weights_sha256 must be of type str"),
    ],
)
def test_a_wrong_manifest_is_refused(keys: list[str | int], value: object, message: str, tmp_path: Path) -> None:
    save_model(resnet(2, 3, 1, 3, activation=nn.PReLU()), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(edited(tmp_path, *keys, value=value))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["surprise"], 1, r"the file must be .* differs in \['surprise'\]"),
        (["model", "surprise"], 1, "must describe a network's parts"),
        (["model", "layers"], [], "must describe a network's parts"),
        (["model", "layers", 0, "kind"], "surprise", "must describe a network's parts"),
        (["model", "layers", 0, "surprise"], 1, "must describe a network's parts"),
        (["model", "layers", 0, "in_features"], "3", "layers.0.keywords.in_features must be an integer in .*, got '3'"),
        (["model", "layers", 0, "activation"], "__import__", "activation must be one of"),
        (["model", "layers", 0, "activation", "name"], "os.system", "activation must be one of"),
        (["model", "skips", "kind"], "surprise", "must describe a network's parts"),
        (["model", "skips", "maps"], 3, "must describe a network's parts"),
        (["model", "stem"], "os.system", "must describe a network's parts"),
        (["model", "head"], {"surprise": 1}, "must describe a network's parts"),
        (["model", "dtype"], "int8", "model.dtype must be one of"),
        (["time_steps", "origin"], [0, 2], r"one step per layer, got \[0, 2\] for 3"),
    ],
)
def test_a_wrong_manifest_of_format_1_is_refused(
    keys: list[str | int], value: object, message: str, tmp_path: Path
) -> None:
    shutil.copytree(STORED / "fractional_pruned", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=message) as error:
        load_model(edited(tmp_path, *keys, value=value))
    assert str(tmp_path) in str(error.value)


def test_no_code_is_imported_by_name(tmp_path: Path) -> None:
    save_model(resnet(2, 3, 1, 2), tmp_path)
    assert "antigravity" not in sys.modules
    for name in ("antigravity.geohash", "antigravity", "__import__('antigravity')"):
        for keys in (["scheme", "name"], ["model", "builder"], [*KEYWORDS, "activation"], ["model", "kind"]):
            with pytest.raises(ValueError, match="antigravity"):
                load_model(edited(copied(tmp_path), *keys, value=name))
    assert "antigravity" not in sys.modules


def copied(folder: Path) -> Path:
    target = Path(tempfile.mkdtemp(dir=folder))
    for name in FILES:
        shutil.copy(folder / name, target)
    return target


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1e400}',
        b'{"format": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_damaged_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    save_model(resnet(2, 3, 1, 2), tmp_path)
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.json must"):
        load_model(tmp_path)


def test_an_endless_manifest_is_not_read(tmp_path: Path) -> None:
    save_model(resnet(2, 3, 1, 2), tmp_path)
    with (tmp_path / "model.json").open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="must have at most 16777216 bytes, got 1000000000000"):
        load_model(tmp_path)


def drawn_from() -> TimeVariableNetwork:
    """A network that nearly every key of a manifest has a part in."""
    return fractional_dnn(3, [4, 4, 2, 2], 1, 4, skips="learned", activation=nn.PReLU(), constraint="dependent")


@pytest.fixture(scope="module", params=["builder", "parts", "format 1"])
def pair(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A saved, pruned fractional network."""
    with tempfile.TemporaryDirectory() as folder:
        network = drawn_from()
        prune(network, keep=[0, 2, 3])
        if request.param == "parts":
            network.recipe = None
        save_model(network, folder)
        assert ("width" in (Path(folder) / "model.json").read_text()) == (request.param != "parts")
        yield STORED / "fractional_pruned" if request.param == "format 1" else Path(folder)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths to all values in a JSON document."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))
    elif isinstance(value, list):
        for key, each in enumerate(value):
            yield from places(each, (*path, key))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, 3, 4, -1, 10**12, 2**28, 2**31, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            "network",
            "host",
            "pad",
            "identity",
            "composed",
            "free",
            "simplex",
            "float64",
            "bfloat16",
            "residual",
            "dense",
            "resnet",
            "resnet_v2",
            "Sequential",
            "TimeVariableNetwork",
            {"builder": "Identity", "keywords": {}},
        ]
    ),
    st.sampled_from(activation_names()),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_hostile_manifests_raise_nothing_else(pair: Path, data: st.DataObject) -> None:
    root = {"": json.loads((pair / "model.json").read_text())}
    for _ in range(data.draw(st.integers(1, 3))):
        *keys, last = ("", *data.draw(st.sampled_from(sorted(places(root.get("")), key=repr))))
        place: Any = root
        for key in keys:
            place = place[key]
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "rename", "repeat"]))
        if action == "replace":
            place[last] = data.draw(VALUES)
        elif action == "repeat":
            place[last] = [place[last], copy.deepcopy(place[last])]
        elif len(keys) > 0:
            value = place.pop(last)
            if action == "rename" and isinstance(place, dict):
                place[data.draw(st.text(max_size=5))] = value
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(pair / "model.safetensors", folder)
        (Path(folder) / "model.json").write_text(json.dumps(root[""]))
        refused_or_usable(Path(folder))


def refused_or_usable(folder: Path) -> None:
    """Loading gives a network with all its tensors, or an error of the promised kinds that names the files."""
    host = drawn_from()
    for load in (lambda: load_model(folder), lambda: load_model(folder, host=host)):
        try:
            network = load()
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        else:
            assert not any(tensor.is_meta for tensor in network.state_dict().values())
            continue
        assert str(folder) in message


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(pair: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray((pair / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, min(len(content), 1500) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for each in FILES:
            shutil.copy(pair / each, folder)
        (folder / name).write_bytes(content)
        # A hostile author would mend the digest.
        if name == "model.safetensors":
            edited(folder, "weights_sha256", value=hashlib.sha256(content).hexdigest())
        refused_or_usable(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.weight"), "head.weight is missing"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "more is unexpected"),
        (lambda tensors: tensors.update({"head.weight": torch.ones(1, 3).half()}), "head.weight must be .float32"),
        (
            lambda tensors: tensors.update({"head.weight": torch.ones(3, 1)}),
            r"float32 \(1, 3\)., got .float32 \(3, 1\)",
        ),
    ],
)
def test_other_tensors_than_described_are_listed(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    save_model(resnet(2, 3, 1, 2), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=message):
        load_model(edited(tmp_path, "weights_sha256", value=digest))
