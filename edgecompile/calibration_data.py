"""Data to calibrate with: a folder of images, arrays on disk, or what ``calibration_data()`` of a user's file gives.

Whatever the source, :meth:`CalibrationData.feeds` gives one sample at a time, read when it is asked for, so memory does
not depend on how many there are; and a batch is taken apart where the model allows it, so what is computed does not
depend on how the data was batched.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Port
from edgecompile.oracle import random_feeds

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_RANDOM = "random"
_RANDOM_SAMPLES = 16
_PADDING = 114  # the grey that detectors of the YOLO family are trained with
_BLOCK = 1 << 20

Sample = tuple[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes a model input: ``(pixel * scale - mean) / std`` per channel.

    Attributes:
        size: (height, width) in pixels, or None for what the model declares.
        mean: per channel, in the order of ``color``, in units of scaled pixels; one value counts for every channel.
        std: likewise.
        scale: factor of the 8-bit pixels, usually 1/255.
        layout: ``"NCHW"`` or ``"NHWC"``.
        color: ``"RGB"``, ``"BGR"`` or ``"GRAY"``.
        fit: what happens to another aspect ratio: ``"stretch"``; ``"crop"``, resize the shorter side, then cut the
            centre; or ``"pad"``, resize the longer side and fill up with grey 114 at the right and at the bottom.

    Raises:
        InputError: a value is not one of these.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: str = "NCHW"
    color: str = "RGB"
    fit: str = "stretch"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("layout", ("NCHW", "NHWC")),
            ("color", ("RGB", "BGR", "GRAY")),
            ("fit", ("stretch", "crop", "pad")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r} is unknown", f"there are: {', '.join(allowed)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise InputError(
                    f"{name} has {len(getattr(self, name))} values", f"{self.color} has {self.channels} channels"
                )
        if not all(s > 0 for s in self.std) or not self.scale > 0:
            raise InputError("std and scale must be above zero", f"they are {self.std} and {self.scale}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise InputError(f"size = {self.size} is not a height and a width in pixels")

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.color == "GRAY" else 3

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Uint8 [height, width, channels] in RGB or grey to float32 [1, ...] in the model's layout and colour order."""
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        values = pixels.astype(np.float32) * np.float32(self.scale)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if self.layout == "NCHW" else values)[None]


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Samples that can be read as often as needed, always in the same order.

    Attributes:
        source: how to name them to a person.
        ports: the model's inputs.
        count: how many samples there are, or None where only reading them tells.
        random: True for random numbers, which say nothing about real activations; a report must say so.
    """

    source: str
    ports: tuple[Port, ...]
    count: int | None
    random: bool = False
    _read: Callable[[], Iterator[Sample]] = field(kw_only=True, repr=False)
    _content: Callable[[], Iterable[bytes]] | None = field(default=None, kw_only=True, repr=False)

    def samples(self) -> Iterator[Sample]:
        """Name and feeds of each sample, from the first.

        The feeds have batch 1 where the model takes it, else the model's own fixed batch.

        Raises:
            InputError: a sample cannot be read, does not fit the model, or holds a value that is not finite; or there
                are no samples, or too few for the last batch.
        """
        empty = True
        for sample in _rebatch(self.ports, (_conform(self.ports, *s) for s in self._read())):
            empty = False
            yield sample
        if empty:
            raise InputError(f"{self.source} holds no calibration data", fix=_HOW)

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """A fresh iterator over the feeds of :meth:`samples`."""
        return (feeds for _, feeds in self.samples())

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the content, read in a stream."""
        total = hashlib.sha256(repr([(p.name, p.dtype, p.shape) for p in self.ports]).encode())
        for block in self._content() if self._content else _content(self._read()):
            total.update(block)
        return total.hexdigest()


_HOW = "give images, arrays or calibration_data(): --calib FOLDER, --calib FILE.npz, --calib FILE.npy"


def open_data(
    source: str | Path | Iterable[Any] | None,
    graph_inputs: Sequence[Port],
    preprocess: Preprocess | None = None,
    seed: int = 0,
) -> CalibrationData:
    """Data to calibrate a model with.

    Args:
        source: a folder of images (searched recursively); an ``.npz`` file with an array per input, whose first axis
            counts the samples, or as :func:`save_samples` writes it; an ``.npy`` file for a model with one input;
            an iterable of a tensor, a tuple in the order of the inputs or a dict by input name, which is copied to a
            temporary file unless it is a sequence; or ``"random"``, ``"random:COUNT"`` for random numbers.
        graph_inputs: inputs of the model, as its signature has them.
        preprocess: needed for images, and for nothing else.
        seed: of random numbers.

    Raises:
        InputError: there is no such source, or its names, types or shapes do not fit the model.
        EnvironmentMissing: images are asked for and Pillow is not installed.
    """
    ports = tuple(graph_inputs)
    if source is None:
        raise InputError("there is no calibration data", "int8 needs ranges of real activations", _HOW)
    if isinstance(source, str) and source.partition(":")[0] == _RANDOM:
        return _random(source, ports, seed)
    if not isinstance(source, (str, Path)):
        return _iterable(source, ports)
    path = Path(source)
    if preprocess is not None and path.is_file():
        raise InputError(f"[preprocess] is for images, and {path} holds arrays", fix="give arrays as the model wants")
    if path.is_dir():
        return _images(path, ports, preprocess)
    if not path.is_file():
        raise InputError(f"cannot read {path}", "no such file or folder", "check the path given with --calib")
    if path.suffix == ".npy":
        return _npy(path, ports)
    if path.suffix == ".npz":
        return _npz(path, ports)
    raise InputError(f"{path} is no calibration data", f"a file of type {path.suffix or 'unknown'}", _HOW)


def save_samples(path: Path, samples: Iterable[Any], graph_inputs: Sequence[Port]) -> int:
    """Write samples one by one to an ``.npz`` file that :func:`open_data` reads; how many there were.

    Args:
        path: the file.
        samples: as the iterable of :func:`open_data`.
        graph_inputs: inputs of the model.

    Raises:
        InputError: a sample does not fit the model.
    """
    count = 0
    ports = tuple(graph_inputs)
    conforming = (_conform(ports, label, feeds) for label, feeds in _named(ports, samples))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for _, feeds in _rebatch(ports, conforming):
            for name, value in feeds.items():
                with archive.open(f"{count:06}/{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
            count += 1
    return count


# -- sources -----------------------------------------------------------------------------------------------------------


def _random(text: str, ports: tuple[Port, ...], seed: int) -> CalibrationData:
    number = text.partition(":")[2] or str(_RANDOM_SAMPLES)
    if not number.isdecimal() or not int(number):
        raise InputError(f"{text!r} is not a number of random samples", fix="write it like random:16")
    count = int(number)

    def read() -> Iterator[Sample]:
        for index in range(count):
            yield f"random sample {index}", random_feeds(ports, seed + index)

    identity = f"random {count} {seed} {np.__version__}".encode()
    name = f"{count} random samples (seed {seed})"
    return CalibrationData(name, ports, count, True, _read=read, _content=lambda: [identity])


def _iterable(source: Iterable[Any], ports: tuple[Port, ...]) -> CalibrationData:
    if isinstance(source, Sequence):
        return CalibrationData("calibration_data()", ports, None, _read=lambda: _named(ports, source))
    folder = tempfile.TemporaryDirectory(prefix="edgecompile.")
    path = Path(folder.name) / "samples.npz"
    if not save_samples(path, source, ports):
        raise InputError("calibration_data() gives no samples", fix="let it return or yield at least one")
    data = _npz(path, ports)

    def read(_folder: Any = folder) -> Iterator[Sample]:  # the folder lives as long as whoever can read it
        return data._read()

    return CalibrationData("calibration_data()", ports, data.count, _read=read)


def _named(ports: tuple[Port, ...], samples: Iterable[Any]) -> Iterator[Sample]:
    """The samples of an iterable as arrays by input name."""
    for index, sample in enumerate(samples):
        label = f"sample {index}"
        if isinstance(sample, Mapping):
            values = {str(name): _array(value) for name, value in sample.items()}
        else:
            given = list(sample) if isinstance(sample, (tuple, list)) else [sample]
            if len(given) != len(ports):
                raise InputError(
                    f"{label} of the calibration data has {len(given)} values",
                    f"the model has {_count(len(ports), 'input')}: {_names(p.name for p in ports)}",
                    "give the inputs alone, without labels",
                )
            values = {port.name: _array(value) for port, value in zip(ports, given, strict=True)}
        yield label, values


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _npy(path: Path, ports: tuple[Port, ...]) -> CalibrationData:
    if len(ports) != 1:
        raise InputError(f"{path} holds one array", f"the model has {_count(len(ports), 'input')}", "give an .npz file")
    port = ports[0]

    def read() -> Iterator[Sample]:
        with open(path, "rb") as file:
            rows = _rows(file, f"{path}", port)
            yield from ((f"{path}[{i}]", {port.name: row}) for i, row in enumerate(rows))

    with open(path, "rb") as file:
        count = _header(file, f"{path}", port)[0][0]
    return CalibrationData(str(path), ports, _single(ports, count), _read=read, _content=lambda: _blocks(path))


def _npz(path: Path, ports: tuple[Port, ...]) -> CalibrationData:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
            heads = [m.partition("/") for m in members]
            if members and all(head.isdecimal() and name for head, _, name in heads):
                count = len({head for head, _, _ in heads})
                return CalibrationData(str(path), ports, count, _read=functools.partial(_read_samples, path))
            if len(members) == len(ports) == 1:
                chosen = {ports[0].name: members[0]}
            else:
                chosen = {p.name: p.name for p in ports}
                if set(chosen) != set(members):
                    raise InputError(
                        f"{path} does not fit the model",
                        f"it holds {_names(members)}, and the inputs are {_names(chosen)}",
                        "save one array per input, under its name",
                    )
            counts = {}
            for port in ports:
                with archive.open(f"{chosen[port.name]}.npy") as file:
                    counts[port.name] = _header(file, f"{port.name!r} of {path}", port)[0][0]
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"cannot read {path}", str(error), "write it with numpy.savez") from None
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} of {name!r}" for name, n in counts.items())
        raise InputError(f"the arrays of {path} differ in their number of samples", listed)

    def read() -> Iterator[Sample]:
        with zipfile.ZipFile(path) as archive:
            files = [archive.open(f"{chosen[p.name]}.npy") for p in ports]
            rows = (_rows(f, f"{p.name!r} of {path}", p) for f, p in zip(files, ports, strict=True))
            for index, values in enumerate(zip(*rows, strict=True)):
                yield f"{path}[{index}]", {p.name: v for p, v in zip(ports, values, strict=True)}

    count = _single(ports, next(iter(counts.values())))
    return CalibrationData(str(path), ports, count, _read=read, _content=lambda: _blocks(path))


def _read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file that :func:`save_samples` wrote."""
    with zipfile.ZipFile(path) as archive:
        names = (n.removesuffix(".npy") for n in archive.namelist())
        for head, group in itertools.groupby((n.partition("/") for n in names), key=lambda parts: parts[0]):
            feeds = {}
            for _, _, name in group:
                with archive.open(f"{head}/{name}.npy") as file:
                    feeds[name] = np.lib.format.read_array(file, allow_pickle=False)
            yield f"sample {int(head)}", feeds


def _header(file: Any, what: str, port: Port) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in a file, which is left at the first byte of its values."""
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except ValueError as error:
        raise InputError(f"{what} is not a NumPy array", str(error)) from None
    if fortran and len(shape) > 1:
        raise InputError(f"{what} is stored in Fortran order", "it cannot be read sample by sample",
                         "save numpy.ascontiguousarray(it)")  # fmt: skip
    if dtype.hasobject:
        raise InputError(f"{what} holds Python objects", "they are not read", "save an array of numbers")
    rank = len(port.shape) if port.shape is not None else None
    if not shape or (rank is not None and len(shape) not in (rank, rank + 1)):
        raise InputError(
            f"{what} has shape {_x(shape)}", f"its first axis counts the samples, and {port.name!r} is {_wanted(port)}"
        )
    return shape, dtype


def _rows(file: Any, what: str, port: Port) -> Iterator[np.ndarray]:
    """One sample of an array after the other, with a batch axis.

    They are read, not mapped: mapped pages would count as memory of the process.
    """
    shape, dtype = _header(file, what, port)
    row = shape[1:] if port.shape is not None and len(shape) == len(port.shape) + 1 else (1, *shape[1:])
    size = int(np.prod(row)) * dtype.itemsize
    for index in range(shape[0]):
        data = file.read(size)
        if len(data) != size:
            raise InputError(f"{what} ends within sample {index}", "the file is cut short")
        yield np.frombuffer(data, dtype).reshape(row)


def _images(folder: Path, ports: tuple[Port, ...], preprocess: Preprocess | None) -> CalibrationData:
    if preprocess is None:
        raise InputError(
            f"images of {folder} need [preprocess]", "wrong scaling spoils every range",
            "write in edgecompile.toml: [preprocess], size = [224, 224], mean = [...], std = [...], layout = \"NCHW\"",
        )  # fmt: skip
    if len(ports) != 1 or ports[0].shape is None or len(ports[0].shape) != 4:
        listed = ", ".join(f"{p.name!r} {_wanted(p)}" for p in ports)
        raise InputError(f"images of {folder} do not fit the model", f"its inputs are {listed}", "give an .npz file")
    port, shape = ports[0], ports[0].shape
    axis = preprocess.layout.index("H")
    size = preprocess.size
    if size is None:
        height, width = shape[axis], shape[axis + 1]
        if not isinstance(height, int) or not isinstance(width, int):
            raise InputError(f"the size of {port.name!r} is not fixed", fix="write size = [224, 224] in [preprocess]")
        size = (height, width)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith("."))
    if not paths:
        raise InputError(f"{folder} holds no images", f"none of {', '.join(IMAGES)}", _HOW)
    _pillow()

    def read() -> Iterator[Sample]:
        for path in paths:
            yield str(path), {port.name: preprocess.apply(_pixels(path, size, preprocess))}

    def content() -> Iterator[bytes]:
        yield repr((preprocess, size)).encode()
        for path in paths:
            yield f"\n{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode()
            yield from _blocks(path)

    return CalibrationData(str(folder), ports, _single(ports, len(paths)), _read=read, _content=content)


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise EnvironmentMissing(
            "images cannot be read", "the package Pillow is not installed", "pip install Pillow, or give an .npz file"
        ) from None
    return Image, ImageOps


def _pixels(path: Path, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """An image file as uint8 [height, width, channels], upright, in RGB or grey."""
    image_module, operations = _pillow()
    height, width = size
    try:
        with image_module.open(path) as file:
            image = operations.exif_transpose(file).convert("L" if preprocess.color == "GRAY" else "RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path}", str(error), "repair or remove it") from None
    if preprocess.fit == "crop":
        image = operations.fit(image, (width, height), image_module.Resampling.BILINEAR)
    elif preprocess.fit == "pad":
        ratio = min(width / image.width, height / image.height)
        fitted = image.resize(
            (max(1, round(image.width * ratio)), max(1, round(image.height * ratio))), image_module.Resampling.BILINEAR
        )
        grey = _PADDING if preprocess.color == "GRAY" else (_PADDING,) * 3
        image = image_module.new(image.mode, (width, height), grey)
        image.paste(fitted, (0, 0))
    else:
        image = image.resize((width, height), image_module.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, preprocess.channels)


# -- one sample --------------------------------------------------------------------------------------------------------


def _conform(ports: tuple[Port, ...], label: str, feeds: Mapping[str, np.ndarray]) -> Sample:
    """A sample as the model wants it, but for the number of its leading axis."""
    if set(feeds) != {p.name for p in ports}:
        raise InputError(
            f"{label} does not fit the model",
            f"it has {_names(feeds)}, and the inputs are {_names(p.name for p in ports)}",
        )
    found = {}
    for port in ports:
        value, dtype = feeds[port.name], np.dtype(onnx.helper.tensor_dtype_to_np_dtype(port.dtype))
        if value.dtype != dtype:
            if value.dtype.kind != dtype.kind:
                raise InputError(
                    f"{port.name!r} of {label} is {value.dtype}", f"the model wants {dtype}",
                    "prepare the data as the model is fed when it is used",
                )  # fmt: skip
            value = value.astype(dtype)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{port.name!r} of {label} holds a value that is not finite", fix="leave that sample out")
        shape = port.shape
        if shape is not None:
            if value.ndim == len(shape) - 1 and len(shape) > 1:
                value = value[None]
            fixed = [d if isinstance(d, int) and (i or len(shape) < 2) else None for i, d in enumerate(shape)]
            if value.ndim != len(shape) or any(
                d is not None and d != n for d, n in zip(fixed, value.shape, strict=True)
            ):
                raise InputError(
                    f"{port.name!r} of {label} has shape {_x(feeds[port.name].shape)}",
                    f"the model wants {_wanted(port)}",
                )
        found[port.name] = value
    return label, found


def _unit(ports: Iterable[Port]) -> int | None:
    """The batch that the model is run with: 1 where it can be; None where the inputs disagree."""
    leads = {
        p.shape[0] if isinstance(p.shape[0], int) else 1 for p in ports if p.shape is not None and len(p.shape) > 1
    }
    return leads.pop() if len(leads) == 1 else None


def _single(ports: Sequence[Port], rows: int) -> int | None:
    """The number of samples in ``rows`` of batch 1, where it is known without reading them."""
    unit = _unit(ports)
    nested = any(p.shape is None for p in ports)
    return rows if unit == 1 and not nested else None


def _rebatch(ports: tuple[Port, ...], samples: Iterable[Sample]) -> Iterator[Sample]:
    """The same data in batches of what the model takes."""
    unit = _unit(ports)
    batched = [p.name for p in ports if p.shape is not None and len(p.shape) > 1]
    pending: list[Sample] = []
    for label, feeds in samples:
        sizes = {feeds[name].shape[0] for name in batched}
        if unit is None or len(sizes) != 1 or sizes == {unit}:
            if pending:
                break
            yield label, feeds
            continue
        size = sizes.pop()
        for row in range(size):
            one = {n: v[row : row + 1] if n in batched else v for n, v in feeds.items()}
            pending.append((label if size == 1 else f"{label}, item {row}", one))
            if len(pending) == unit:
                yield _joined(pending, batched)
                pending.clear()
    if pending:
        raise InputError(
            f"{len(pending)} samples are left over at {pending[-1][0]}",
            f"the model takes batches of {unit} and no other",
            f"give a multiple of {unit} samples",
        )


def _joined(samples: Sequence[Sample], batched: Sequence[str]) -> Sample:
    if len(samples) == 1:
        return samples[0]
    first = samples[0][1]
    joined = {n: np.concatenate([s[n] for _, s in samples]) if n in batched else v for n, v in first.items()}
    return f"{samples[0][0]} to {samples[-1][0]}", joined


# -- content and words -------------------------------------------------------------------------------------------------


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _content(samples: Iterable[Sample]) -> Iterator[bytes]:
    for _, feeds in samples:
        for name, value in feeds.items():
            yield f"\n{name} {value.dtype} {value.shape}\n".encode()
            yield value.tobytes()


def _wanted(port: Port) -> str:
    return _x(d if isinstance(d, int) else "?" for d in port.shape) if port.shape is not None else "of unknown shape"


def _x(shape: Iterable[Any]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
