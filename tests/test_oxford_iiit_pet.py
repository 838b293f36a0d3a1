"""Downloads small archives in the official layout from a server on loopback, prepares them and reads them back."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_jax.data import oxford_iiit_pet as pets
from unet_jax.errors import InputError

TRAIN, TEST = ("Abyssinian_1", "beagle_2", "Bengal_3", "pug_4", "Sphynx_5", "boxer_6"), ("Birman_1", "samoyed_2")
HEIGHT, WIDTH = 10, 12
XML = (
    "<annotation><size><width>12</width><height>10</height><depth>3</depth></size><object><name>cat</name>"
    "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>6</xmax><ymax>5</ymax></bndbox></object></annotation>"
)
PLAIN_TFDS = """
import sys, tensorflow_datasets as tfds
raw = {key: tfds.decode.SkipDecoding() for key in ("image", "segmentation_mask")}
for split in ("train", "test"):
    pictures = tfds.data_source("oxford_iiit_pet", split=split, data_dir=sys.argv[1], download=False, decoders=raw)
    for p in pictures:
        print(split, p["file_name"].decode(), p["label"], p["species"], *(f"{x:.2f}" for x in p["head_bbox"]))
assert "tensorflow" not in sys.modules
"""


def encoded(array: np.ndarray, file_format: str = "JPEG", mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(seed: int, channels: int = 3) -> np.ndarray:
    """A colour of its own, and a slope that JPEG keeps."""
    colour = np.random.default_rng(seed).integers(0, 200, channels)
    return (colour + 4 * np.arange(WIDTH)[None, :, None] + np.zeros((HEIGHT, 1, 1))).astype(np.uint8)


def trimap(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 4, (HEIGHT, WIDTH), dtype=np.uint8)


def official_layout() -> dict[str, bytes]:
    """Path -> bytes of both archives: each kind of picture that the real one holds under a .jpg name."""
    rgb = [encoded(pixels(i)) for i in range(8)]
    kinds = [
        rgb[0],
        encoded(pixels(1, channels=4), "PNG"),
        encoded(pixels(2)[..., 0], "GIF"),
        encoded(pixels(3)[..., 0]),
        rgb[4] + b"left over",
        encoded(pixels(5), "PNG", mode="P", transparency=bytes(256)),
        rgb[6],
        encoded(pixels(7), mode="CMYK"),
    ]
    files = {"images/Abyssinian_1.mat": b"no picture", "images/._Abyssinian_1.jpg": b"no picture either"}
    for i, name in enumerate(TRAIN + TEST):
        files[f"images/{name}.jpg"] = kinds[i]
        files[f"annotations/trimaps/{name}.png"] = encoded(trimap(i), "PNG")
        files[f"annotations/trimaps/._{name}.png"] = b"a Mac's own file"
    for name in TRAIN[:-1]:
        files[f"annotations/xmls/{name}.xml"] = XML.encode()
    for listed, names in (("trainval", TRAIN), ("test", TEST)):
        rows = "".join(f"{name} {3 + i} {1 + i % 2} 1\n" for i, name in enumerate(names))
        files[f"annotations/{listed}.txt"] = rows.encode()
    return files


def tar(files: dict[str, bytes], path: Path, gzipped: bool) -> tuple[int, str]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = gzip.compress(buffer.getvalue()) if gzipped else buffer.getvalue()
    path.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends the files of a folder, `/cut/...` only by half."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        data = Path(self.translate_path(self.path.removeprefix("/cut"))).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
        httpd.shutdown()


@pytest.fixture
def serve(server: tuple[str, Path], request: pytest.FixtureRequest) -> Callable[..., pets.Archives]:
    """Puts archives of the given files on the server and gives their addresses and checksums."""
    url, folder = server

    def archives(files: dict[str, bytes], gzipped: bool = True) -> pets.Archives:
        paths, checksums = [], {}
        for part in ("images", "annotations"):
            path = folder / f"{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}-{part}.tar.gz"
            members = {name: data for name, data in files.items() if name.startswith(part)}
            paths.append(f"{url}/{path.name}")
            checksums[paths[-1]] = tar(members, path, gzipped)
        return pets.Archives(paths[0], paths[1], checksums)

    return archives


@pytest.fixture(scope="module")
def prepared(server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    url, folder = server
    data_dir = tmp_path_factory.mktemp("prepared")
    urls = {part: f"{url}/{part}.tar.gz" for part in ("images", "annotations")}
    files = official_layout()
    sums = {
        urls[part]: tar({k: v for k, v in files.items() if k.startswith(part)}, folder / f"{part}.tar.gz", gzipped)
        for part, gzipped in (("images", True), ("annotations", False))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        pets.prepare(data_dir, pets.Archives(**urls, checksums=sums))
    return data_dir


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / pets.NAME, tmp_path / pets.NAME)
    return tmp_path


def leftovers(data_dir: Path) -> list[str]:
    return [str(path) for path in data_dir.rglob("*") if ".tmp." in path.name or "incomplete" in path.name]


def read_all(data_dir: Path) -> dict[str, pets.Example]:
    sources = [pets.source(data_dir, split) for split in ("train", "test")]
    return {example.name: example for s in sources for example in map(s.read, range(s.size))}


def test_importing_and_looking_import_no_tfds(prepared: Path) -> None:
    code = (
        "import sys, pathlib; from unet_jax.data import oxford_iiit_pet as pets\n"
        "assert pets.source(pathlib.Path(sys.argv[1]), 'train').size == 6 and pets.default_data_dir()\n"
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(prepared)], check=True)


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", "/some/where")
    assert pets.default_data_dir() == Path("/some/where")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert pets.default_data_dir() == Path.home() / "tensorflow_datasets"


def test_splits_pixels_and_labels(prepared: Path) -> None:
    assert pets.is_prepared(prepared)
    train, test = (pets.source(prepared, split) for split in ("train", "test"))
    assert (train.size, test.size, train.class_names) == (6, 2, ("pet", "background", "border"))
    pictures = read_all(prepared)
    assert {name.removesuffix(".jpg") for name in pictures} == {*TRAIN, *TEST}
    for i, name in enumerate(TRAIN + TEST):
        example = pictures[f"{name}.jpg"]
        assert example.image.dtype == example.labels.dtype == np.uint8
        assert example.image.shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(example.labels, trimap(i) - 1)


def test_only_bad_pictures_are_encoded_again(prepared: Path) -> None:
    files, pictures = official_layout(), read_all(prepared)
    for name in (TRAIN[0], TEST[0]):
        original = np.asarray(Image.open(io.BytesIO(files[f"images/{name}.jpg"])))
        np.testing.assert_array_equal(pictures[f"{name}.jpg"].image, original)
    for i, grey in ((1, False), (2, True), (3, True), (4, False), (5, False)):
        expected = pixels(i, channels=4 if i == 1 else 3)
        expected = expected[..., :1] if grey else expected[..., :3]
        assert np.abs(pictures[f"{TRAIN[i]}.jpg"].image - expected.astype(float)).mean() < 8, TRAIN[i]


def test_plain_tfds_reads_it_in_a_fresh_process(prepared: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_TFDS, str(prepared)], check=True, capture_output=True, text=True, timeout=60
    )
    lines = run.stdout.splitlines()
    box = "0.20 0.25 0.50 0.50"
    expected = [f"train {name}.jpg {2 + i} {i % 2} {box}" for i, name in enumerate(TRAIN[:-1])]
    expected.append(f"train {TRAIN[-1]}.jpg 7 1 0.00 0.00 0.00 0.00")
    expected += [f"test {name}.jpg {2 + i} {i % 2} 0.00 0.00 0.00 0.00" for i, name in enumerate(TEST)]
    assert sorted(lines) == sorted(expected)
    ours = [pets.source(prepared, split) for split in ("train", "test")]
    assert [line.split()[1] for line in lines] == [s.read(i).name for s in ours for i in range(s.size)]


def test_reading_from_many_threads(prepared: Path) -> None:
    train = pets.source(prepared, "train")
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda i: train.read(i % train.size).name, range(96)))
    assert names == [train.read(i).name for i in range(train.size)] * 16


def test_identity_is_of_the_files_not_of_the_folder(copied: Path, prepared: Path, tmp_path: Path) -> None:
    before = pets.source(copied, "train").identity
    assert json.loads(json.dumps(before)) == before
    assert before != pets.source(copied, "test").identity
    (copied / pets.NAME).rename(tmp_path / "away")
    (tmp_path / "moved").mkdir()
    (tmp_path / "away").rename(tmp_path / "moved" / pets.NAME)
    assert pets.source(tmp_path / "moved", "train").identity == before
    shard = next((tmp_path / "moved" / pets.NAME / pets.VERSION).glob("*-train*"))
    os.utime(shard, ns=(0, 0))
    assert pets.source(tmp_path / "moved", "train").identity != before


def test_two_at_once_download_once(serve: Callable[..., pets.Archives], tmp_path: Path) -> None:
    archives = serve(official_layout(), gzipped=False)
    Handler.asked.clear()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: pets.prepare(tmp_path, archives), range(2)))
    assert len(Handler.asked) == 2
    assert len(read_all(tmp_path)) == 8
    assert not leftovers(tmp_path)


def replaced(path: str, data: bytes | None) -> dict[str, bytes]:
    return {name: old for name, old in official_layout().items() if name != path} | ({path: data} if data else {})


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("images/pug_4.jpg", encoded(pixels(0))[:-40], r"pug_4\.jpg is damaged"),
        ("images/pug_4.jpg", b"nothing like a picture", r"pug_4\.jpg is damaged"),
        ("images/pug_4.jpg", None, r"lacks 1 pictures of trainval\.txt, such as pug_4\.jpg"),
        ("annotations/trimaps/pug_4.png", encoded(trimap(0), "PNG")[:-30], r"pug_4\.png is damaged"),
        ("annotations/trimaps/pug_4.png", None, r"lacks pug_4\.png"),
        ("annotations/xmls/pug_4.xml", b"<annotation>", r"pug_4\.xml holds no bounding box"),
        ("annotations/test.txt", None, r"lacks test\.txt"),
    ],
    ids=("cut", "none", "missing", "mask-cut", "mask-missing", "box", "list"),
)
def test_a_bad_file_in_the_archive_is_named(
    serve: Callable[..., pets.Archives], tmp_path: Path, path: str, data: bytes | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pets.prepare(tmp_path, serve(replaced(path, data)))
    assert "\n" not in str(caught.value)
    assert not pets.is_prepared(tmp_path)
    assert not leftovers(tmp_path)


def test_a_failed_download_leaves_nothing_and_the_next_works(
    serve: Callable[..., pets.Archives], server: tuple[str, Path], tmp_path: Path
) -> None:
    good = serve(official_layout())
    assert good.checksums
    cut = good.images.replace(server[0], f"{server[0]}/cut")
    gone = good.images.replace("images", "elsewhere")
    size, _ = good.checksums[good.images]
    known = {**good.checksums, cut: good.checksums[good.images], gone: good.checksums[good.images]}
    for bad, message in (
        (good._replace(images=cut, checksums=known), "broke off, try again"),
        (good._replace(images=gone, checksums=known), "HTTP code: 404"),
        (good._replace(checksums=known | {good.images: (size, "0" * 64)}), "checksum"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            pets.prepare(tmp_path, bad)
        assert "\n" not in str(caught.value)
        assert not pets.is_prepared(tmp_path)
        assert not leftovers(tmp_path)
    pets.prepare(tmp_path, good)
    assert len(read_all(tmp_path)) == 8


def test_a_damaged_archive_is_named(
    serve: Callable[..., pets.Archives], server: tuple[str, Path], tmp_path: Path
) -> None:
    good = serve(official_layout())
    path = server[1] / Path(good.images).name
    data = path.read_bytes()[:-100]
    path.write_bytes(data)
    known = {**(good.checksums or {}), good.images: (len(data), hashlib.sha256(data).hexdigest())}
    with pytest.raises(InputError, match="damaged archive"):
        pets.prepare(tmp_path, good._replace(checksums=known))
    assert not pets.is_prepared(tmp_path)


def test_a_full_disk_is_one_line_and_the_next_try_works(serve: Callable[..., pets.Archives], tmp_path: Path) -> None:
    archives = serve(official_layout())
    assert archives.checksums
    download = archives.checksums[archives.annotations][0]
    for room in (download // 2, 50_000):  # the one ends the download, the other the shards: each is some 64 KiB
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(InputError) as caught:
                pets.prepare(tmp_path, archives)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert not pets.is_prepared(tmp_path)
        assert not leftovers(tmp_path)
    pets.prepare(tmp_path, archives)
    assert len(read_all(tmp_path)) == 8


def test_what_is_in_the_way(serve: Callable[..., pets.Archives], tmp_path: Path) -> None:
    (tmp_path / pets.NAME / pets.VERSION).mkdir(parents=True)
    with pytest.raises(InputError, match="remove it"):
        pets.prepare(tmp_path, serve(official_layout()))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot prepare"):
        pets.prepare(tmp_path / "file", serve(official_layout()))


def free_port() -> int:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_nobody_there(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    archives = pets.Archives(f"{url}/images.tar.gz", f"{url}/annotations.tar.gz")
    assert not pets.is_reachable(archives=archives)
    with pytest.raises(InputError, match=r"cannot connect to 127\.0\.0\.1"):
        pets.prepare(tmp_path, archives)
    assert not pets.is_prepared(tmp_path)


def test_a_proxy_is_what_must_answer(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server[0])
    assert pets.is_reachable()
    monkeypatch.setenv("https_proxy", server[0].removeprefix("http://"))
    assert pets.is_reachable()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    assert not pets.is_reachable()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    local = pets.Archives(f"{server[0]}/a", f"{server[0]}/b")
    assert not pets.is_reachable(archives=local)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert pets.is_reachable(archives=local)


def test_masks_that_cannot_be_used(serve: Callable[..., pets.Archives], tmp_path: Path) -> None:
    files = official_layout()
    files["annotations/trimaps/pug_4.png"] = encoded(trimap(3) - 1, "PNG")
    files["annotations/trimaps/boxer_6.png"] = encoded(trimap(5)[1:], "PNG")
    files["annotations/trimaps/beagle_2.png"] = encoded(np.stack([trimap(1)] * 3, axis=-1), "PNG")
    pets.prepare(tmp_path, serve(files))
    train, messages = pets.source(tmp_path, "train"), []
    for i in range(train.size):
        try:
            train.read(i)
        except InputError as error:
            messages.append(str(error))
    assert sorted(messages) == [
        "the mask of beagle_2.jpg has shape (10, 12, 3), its image (10, 12)",
        "the mask of boxer_6.jpg has shape (9, 12), its image (10, 12)",
        "the mask of pug_4.jpg has values other than 1, 2, 3: [0, 1, 2]",
    ]


def test_a_damaged_shard_is_an_input_error(copied: Path) -> None:
    shard = next((copied / pets.NAME / pets.VERSION).glob("*-train*"))
    data = bytearray(shard.read_bytes())
    data[200:3000] = bytes(2800)
    shard.write_bytes(data)
    train = pets.source(copied, "train")
    with pytest.raises(InputError) as caught:
        list(map(train.read, range(train.size)))
    assert "\n" not in str(caught.value)


def rewrite_info(data_dir: Path, **changes: object) -> None:
    path = data_dir / pets.NAME / pets.VERSION / "dataset_info.json"
    info = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))


@pytest.mark.parametrize("file_format", ["tfrecord", None, "riegeli"])
def test_other_formats_are_refused(copied: Path, file_format: str | None) -> None:
    rewrite_info(copied, fileFormat=file_format)
    for call in (pets.is_prepared, pets.prepare, lambda folder: pets.source(folder, "train")):
        with pytest.raises(InputError, match=rf"{file_format or 'tfrecord'}.*file_format=array_record.*--download"):
            call(copied)


def test_missing_parts_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'validation', only"):
        pets.source(copied, "validation")
    shard = next((copied / pets.NAME / pets.VERSION).glob("*-test*"))
    shard.write_bytes(b"")
    with pytest.raises(InputError, match="missing or empty"):
        pets.is_prepared(copied)
    shard.unlink()
    with pytest.raises(InputError, match="missing or empty"):
        pets.source(copied, "train")
    (shard.parent / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        pets.is_prepared(copied)
    assert not pets.is_prepared(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--download"):
        pets.source(tmp_path / "nowhere", "train")


def test_a_dataset_without_masks_is_refused(copied: Path) -> None:
    path = copied / pets.NAME / pets.VERSION / "features.json"
    features = json.loads(path.read_text())
    del features["featuresDict"]["features"]["segmentation_mask"]
    path.write_text(json.dumps(features))
    with pytest.raises(InputError, match=r"\.jpg has no segmentation mask"):
        pets.source(copied, "train").read(0)
