"""Oxford-IIIT Pet as TFDS prepares it: downloaded, prepared and read without TensorFlow."""

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import threading
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError
from unet_jax.folders import home

NAME = "oxford_iiit_pet"
VERSION = "4.0.0"
CLASS_NAMES = ("pet", "background", "border")  # the trimap's 1, 2, 3
FILE_FORMAT = "array_record"  # the format of TFDS that can be read by index and without TensorFlow


class Archives(NamedTuple):
    """The addresses of the two archives. `checksums`: address -> (bytes, SHA-256); None: those that TFDS has."""

    images: str
    annotations: str
    checksums: Mapping[str, tuple[int, str]] | None = None


_SITE = "https://thor.robots.ox.ac.uk/~vgg/data/pets"
OFFICIAL = Archives(f"{_SITE}/images.tar.gz", f"{_SITE}/annotations.tar.gz")


def default_data_dir() -> Path:
    """Where TFDS itself keeps its datasets."""
    given = os.environ.get("TFDS_DATA_DIR")
    return Path(given).expanduser() if given else home() / "tensorflow_datasets"


def is_prepared(data_dir: Path) -> bool:
    """Whether `data_dir` holds the dataset. InputError if it does, but in another format or with shards missing."""
    return _splits(data_dir) is not None


def is_reachable(timeout: float = 3.0, archives: Archives = OFFICIAL) -> bool:
    """Whether the hosts of the archives (or the proxy in between) accept a connection within `timeout` seconds."""
    answered = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            for address in sorted({_first_hop(archives.images), _first_hop(archives.annotations)}):
                socket.create_connection(address, timeout).close()
            answered.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # a silent name server would ignore the timeout
    thread.start()
    thread.join(timeout)
    return bool(answered)


def prepare(data_dir: Path, archives: Archives = OFFICIAL) -> None:
    """Downloads the archives (0.8 GB) and prepares the dataset in `data_dir`, unless it is there already.

    The archives stay in `data_dir/downloads`, as TFDS leaves them; another try uses them. InputError if a download
    fails, an archive or picture cannot be read, or the disk is full: then nothing half done is left.
    """
    try:
        with _locked(data_dir / NAME):
            if not is_prepared(data_dir):
                _download_and_prepare(data_dir, archives)
    except (OSError, RuntimeError) as error:  # the shards' writer turns a full disk into a RuntimeError
        raise InputError(f"cannot prepare {NAME} in {data_dir}: {_first_line(error)}") from error
    if not is_prepared(data_dir):
        raise InputError(f"{data_dir / NAME / VERSION} is in the way and holds no dataset: remove it")


def source(data_dir: Path, split: str) -> Source:
    """The split "train" (3680 pictures) or "test" (3669), in TFDS's order; InputError if it is not in `data_dir`.

    `read(i)` gives the RGB image uint8 [H, W, 3] and labels uint8 [H, W], 0 to 2 as in CLASS_NAMES. It raises an
    InputError that names the picture, if the picture or its mask cannot be decoded, the two differ in size, or the mask
    has values other than 1 to 3.
    """
    splits = _splits(data_dir)
    if splits is None:
        raise InputError(f"{NAME} {VERSION} is not in {data_dir}: give its --data-dir, or prepare it with --download")
    if split not in splits:
        raise InputError(f"{data_dir / NAME / VERSION} has no split {split!r}, only {', '.join(splits)}")
    size, shards = splits[split]
    files = [[shard.name, shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]
    records = functools.cache(lambda: _open(data_dir, split))
    lock = threading.Lock()

    def read(index: int) -> Example:
        with lock:
            pictures = records()
        try:
            record = pictures[index]
        except Exception as error:  # the reader's own errors have no common type
            where = f"picture {index} of {NAME}'s {split} in {data_dir}"
            raise InputError(f"cannot read {where}: {_first_line(error)}") from error
        return _decode(record)

    identity = {"dataset": NAME, "version": VERSION, "split": split, "files": files}
    return Source(NAME, split, CLASS_NAMES, identity, size, read)


def _splits(data_dir: Path) -> dict[str, tuple[int, list[Path]]] | None:
    """Each split's size and shards, from TFDS's description of the dataset; None if there is none."""
    folder = data_dir / NAME / VERSION
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        file_format = info.get("fileFormat", "tfrecord")
        if file_format != FILE_FORMAT:
            raise InputError(
                f"{folder} is prepared as {file_format}, which needs TensorFlow: prepare it again with"
                f" file_format={FILE_FORMAT}, or give another --data-dir with --download"
            )
        splits = {}
        for entry in info["splits"]:
            lengths = [int(length) for length in entry["shardLengths"]]
            template = entry.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            fields = {"DATASET": NAME, "SPLIT": entry["name"], "FILEFORMAT": FILE_FORMAT}
            of = [f"{i:05d}-of-{len(lengths):05d}" for i in range(len(lengths))]
            splits[entry["name"]] = sum(lengths), [folder / template.format(**fields, SHARD_X_OF_Y=x) for x in of]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'dataset_info.json'} is damaged: remove its folder, prepare again") from error
    for shard in (shard for _, shards in splits.values() for shard in shards):
        if not shard.is_file() or not shard.stat().st_size:
            raise InputError(f"{shard} is missing or empty: remove its folder and prepare it again with --download")
    return splits


def _open(data_dir: Path, split: str) -> Sequence[Mapping[str, Any]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data_dir / NAME / VERSION)
    raw = {key: tfds.decode.SkipDecoding() for key in ("image", "segmentation_mask") if key in builder.info.features}
    return builder.as_data_source(split=split, decoders=raw)


def _decode(record: Mapping[str, Any]) -> Example:
    name = record["file_name"].decode()
    if "segmentation_mask" not in record:
        raise InputError(f"{name} has no segmentation mask: prepare {NAME} {VERSION} again")
    image = np.asarray(_rgb(_picture(name, record["image"])))
    mask = np.asarray(_picture(f"the mask of {name}", record["segmentation_mask"]))
    if mask.shape != image.shape[:2]:
        raise InputError(f"the mask of {name} has shape {mask.shape}, its image {image.shape[:2]}")
    if mask.min() < 1 or mask.max() > 3:
        raise InputError(f"the mask of {name} has values other than 1, 2, 3: {np.unique(mask).tolist()[:16]}")
    return Example(name, image, mask.astype(np.uint8) - np.uint8(1))


def _picture(name: str, data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Exception as error:  # on damaged bytes Pillow raises errors of nearly any type
        raise InputError(f"{name} is damaged, it cannot be decoded ({len(data)} bytes)") from error
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns if this step is left out
    return picture.convert("RGB")


def _download_and_prepare(data_dir: Path, archives: Archives) -> None:
    import tensorflow_datasets as tfds

    if not is_reachable(archives=archives):  # TFDS would retry for minutes
        raise InputError(f"cannot connect to {urllib.parse.urlsplit(archives.images).netloc}: check network and proxy")
    config = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program
            _builder(data_dir, archives).download_and_prepare(download_config=config, file_format=FILE_FORMAT)
    finally:
        for unfinished in (data_dir / "downloads" / NAME).glob("*.tmp.*"):
            shutil.rmtree(unfinished, ignore_errors=True)


def _builder(data_dir: Path, archives: Archives) -> Any:
    """TFDS's own builder, without the parts that need TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    official: Any = tfds.builder_cls(NAME)
    checksums = archives.checksums or {}
    with tfds.core.registered.skip_registration():

        class Builder(official):
            name = NAME
            pkg_dir_path = official.pkg_dir_path
            VERSION = tfds.core.Version(VERSION)
            url_infos = official.url_infos | {url: UrlInfo(*known, None) for url, known in checksums.items()}

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                # One after the other: after an error no download continues, and the small archive fails first.
                annotations = _Files(_members(_fetch(dl_manager, archives.annotations)))
                images = _fetch(dl_manager, archives.images)
                lists = {"train": "trainval.txt", "test": "test.txt"}
                return {split: _examples(images, annotations, listed) for split, listed in lists.items()}

    return Builder(data_dir=data_dir)


def _fetch(dl_manager: Any, url: str) -> Path:
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        return Path(dl_manager.download(url))
    except NonMatchingChecksumError as error:
        raise InputError(f"what {url} sent is not the archive that TFDS knows (checksum): try again") from error
    except (DownloadError, OSError) as error:
        if getattr(error, "errno", None):  # an error of the disk, not of the network
            raise
        raise InputError(f"the download of {url} broke off, try again: {_first_line(error)}") from error


class _Files(dict[str, bytes]):
    def __missing__(self, name: str) -> bytes:
        raise InputError(f"the archive of the annotations lacks {name}")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of each file in an archive, in its order; read as a stream, since gzip has no index."""
    try:
        with tarfile.open(path, "r|*") as archive:  # named .tar.gz, gzipped or not
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member)
                if file and not name.startswith("._"):  # files that macOS adds
                    yield name, file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path} is a damaged archive, remove it and try again: {error}") from error


def _examples(images: Path, annotations: Mapping[str, bytes], listed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures of a list in the archive's order: TFDS sorts them by a hash of the key."""
    rows = (line.split() for line in annotations[listed].decode().splitlines() if line.strip())
    wanted = {name: (int(label) - 1, int(species) - 1) for name, label, species, *_ in rows}
    for file_name, data in _members(images):
        name, _, suffix = file_name.rpartition(".")
        if suffix != "jpg" or name not in wanted:
            continue
        label, species = wanted.pop(name)
        mask = annotations[f"{name}.png"]
        _picture(f"the mask {name}.png", mask)
        example = {
            "image": _rgb_jpeg(file_name, data),
            "label": label,
            "species": species,
            "file_name": file_name,
            "segmentation_mask": mask,
            "head_bbox": _head_box(f"{name}.xml", annotations.get(f"{name}.xml")),
        }
        yield file_name, example
    if wanted:
        raise InputError(f"{images} lacks {len(wanted)} pictures of {listed}, such as {min(wanted)}.jpg")


def _rgb_jpeg(name: str, data: bytes) -> bytes:
    """The same bytes if they are an RGB JPEG; some are PNG or GIF, grey, or have bytes after the end."""
    picture = _picture(name, data)
    if picture.format == "JPEG" and picture.mode == "RGB" and data.endswith(b"\xff\xd9"):
        return data
    encoded = io.BytesIO()
    _rgb(picture).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def _head_box(name: str, xml: bytes | None) -> np.ndarray:
    """ymin, xmin, ymax, xmax as fractions of height and width; zeros if there is no box (most of the test split)."""
    if xml is None:
        return np.zeros(4)
    try:
        root = ET.fromstring(xml)
        box = [float(root.findtext(f"object/bndbox/{side}", "")) for side in ("ymin", "xmin", "ymax", "xmax")]
        height, width = (float(root.findtext(f"size/{side}", "")) for side in ("height", "width"))
        return np.array(box) / [height, width, height, width]
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{name} holds no bounding box that can be read") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second process from preparing the same dataset: it waits, and then finds it prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _first_hop(url: str) -> tuple[str, int]:
    """Host and port that a download of `url` connects to."""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 1080)
