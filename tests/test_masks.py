"""What masks and pictures of other tools mean, where a file alone does not say it: read right, or refused."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_folder import COLOURS, ROTATED, as_palette, config, labels, load, save

from unet_jax.commands import predict as predict_command
from unet_jax.config import IGNORE_LABEL
from unet_jax.data.folder import fill_in, sources
from unet_jax.data.pictures import read_picture
from unet_jax.errors import InputError

SQUARE = np.zeros((20, 24), np.uint8)
SQUARE[5:15, 5:15] = 1


def refusal(folder: Path, *args, **fields) -> str:
    """The line in which a folder is refused, after the folder's name."""
    with pytest.raises(InputError) as error:
        load(folder, *args, **fields)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder} ")


def stray(mask: np.ndarray) -> np.ndarray:
    mask = mask * np.uint8(255)
    mask[0, 0] = 1
    return mask


@pytest.mark.parametrize("names", [(), ("no", "yes")])
def test_0_and_255_beside_0_and_1_are_refused_and_named(tmp_path, names):
    for stem in "abc":
        save(tmp_path, stem, SQUARE * 255)
    save(tmp_path, "d", SQUARE)
    message = refusal(tmp_path, names)
    assert "masks of 0 and 255: 3 (a, b, c)" in message
    assert "by which 255 is no class (save all alike, or give --mask-255 ignored): 1 (d)" in message
    assert len(load(tmp_path, names, mask_255="ignored")[0]) == 2


def test_a_single_other_value_among_0_and_255_is_refused(tmp_path):
    for stem in "abc":
        save(tmp_path, stem, SQUARE * 255)
    save(tmp_path, "d", stray(SQUARE))
    assert "masks of 0 and 255 with a few pixels of other values (clean them): 1 (d)" in refusal(tmp_path)
    for stem in "abc":
        save(tmp_path, stem, stray(SQUARE))
    assert "with a few pixels of other values (clean them): 4 (a, b, c, ...)" in refusal(tmp_path)


def test_0_1_and_255_is_read_and_a_line_says_how_much_is_ignored(tmp_path, capsys):
    void = SQUARE.copy()
    void[0, :] = 255
    save(tmp_path, "a", void)
    save(tmp_path, "b", SQUARE)
    save(tmp_path, "c", (void == 255) * np.uint8(255))  # void, and no object
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1")
    np.testing.assert_array_equal(examples["a"].labels, void)
    assert f"{tmp_path}: {2 * 24 / (3 * 20 * 24):.2%} of the pixels of its masks are ignored (255)" in (
        capsys.readouterr().out
    )


def test_points_among_void_are_no_accident(tmp_path):
    mask = np.full((200, 200), 255, np.uint8)
    mask[0, :3], mask[1, :3] = 0, 1
    for stem in "ab":
        save(tmp_path, stem, mask)
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, mask)


def test_a_run_keeps_to_what_255_meant(tmp_path):
    void = SQUARE.copy()
    void[0, :] = 255
    for stem in "ab":
        save(tmp_path / "void", stem, void)
        save(tmp_path / "binary", stem, SQUARE * 255)
        save(tmp_path / "indices", stem, SQUARE)
    meant = {name: fill_in(config(tmp_path / name), 0) for name in ("void", "binary", "indices")}
    assert {name: data.mask_255 for name, data in meant.items()} == {
        "void": "ignored",
        "binary": "class",
        "indices": None,
    }

    def read(run: str, folder: str) -> np.ndarray:
        data = config(tmp_path / folder, meant[run].class_names, mask_255=meant[run].mask_255)
        return sources(data, 0)["test"].read(0).labels

    np.testing.assert_array_equal(read("void", "binary"), SQUARE * 255)
    np.testing.assert_array_equal(read("binary", "binary"), SQUARE)
    np.testing.assert_array_equal(read("binary", "indices"), SQUARE)
    np.testing.assert_array_equal(read("indices", "binary"), SQUARE)
    with pytest.raises(InputError, match=r"other values than 0 and 255, of which 255 is to be a class: 2 \(a, b\)"):
        read("binary", "void")


def test_palettes_that_differ_are_refused_with_the_classes_json_that_reads_them(tmp_path):
    swapped = COLOURS[[1, 0, 2]]
    save(tmp_path, "a", as_palette(SQUARE, COLOURS))
    save(tmp_path, "b", as_palette(1 - SQUARE, swapped))
    message = refusal(tmp_path)
    assert "palette indices of several colours" in message
    assert "(0: #0a141e in a and #c80000 in b, 1: #c80000 in a and #0a141e in b)" in message
    text = message[message.index('{"names"') :]
    assert json.loads(text) == {"names": ["class_0", "class_1"], "colours": COLOURS[:2].tolist(), "ignore": []}
    (tmp_path / "classes.json").write_text(text)
    for example in load(tmp_path)[1].values():
        np.testing.assert_array_equal(example.labels, SQUARE)


def test_palettes_are_compared_among_the_indices_that_occur(tmp_path):
    other = COLOURS.copy()
    other[2] = 7
    save(tmp_path, "a", as_palette(SQUARE, COLOURS))
    save(tmp_path, "b", as_palette(SQUARE, other))
    save(tmp_path, "c", SQUARE)
    np.testing.assert_array_equal(load(tmp_path)[1]["b"].labels, SQUARE)


def test_palettes_give_the_colours_unless_they_are_greys(tmp_path):
    save(tmp_path, "a", as_palette(SQUARE, COLOURS))
    save(tmp_path, "b", as_palette(1 - SQUARE, COLOURS))
    assert fill_in(config(tmp_path), 0).class_colours == ("#0a141e", "#c80000")
    assert fill_in(config(tmp_path, class_colours=("#000000", "#ffffff")), 0).class_colours[1] == "#ffffff"
    assert fill_in(config(tmp_path, ("x", "y", "never")), 0).class_colours == ()
    for stem in "ab":
        save(tmp_path, stem, as_palette(SQUARE, np.arange(256, dtype=np.uint8).repeat(3)))
    assert fill_in(config(tmp_path), 0).class_colours == ()


def test_greys_of_a_gif_are_values(tmp_path):
    truth = np.where(labels() == 2, 255, labels()).astype(np.uint8)  # which Pillow stores as 0, 1 and 2
    for stem in "ab":
        save(tmp_path, stem, truth)
        Image.fromarray(truth).save(tmp_path / "masks" / f"{stem}.gif")
        (tmp_path / "masks" / f"{stem}.png").unlink()
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1")
    np.testing.assert_array_equal(examples["a"].labels, truth)


def test_greys_of_a_palette_are_values(tmp_path):
    truth = np.where(labels() == 2, 255, labels()).astype(np.uint8)
    quantized = Image.fromarray(truth).quantize(8)
    assert not np.array_equal(np.asarray(quantized), truth)
    save(tmp_path, "a", truth)
    save(tmp_path, "b", quantized)
    save(tmp_path, "c", as_palette(labels(2), np.arange(256, dtype=np.uint8).repeat(3)))  # the greys are the indices
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1")
    np.testing.assert_array_equal(examples["b"].labels, truth)
    np.testing.assert_array_equal(examples["c"].labels, labels(2))

    # Black and white are 0 and 255; other greys that show indices are refused, with what reads them.
    for stem in "abc":
        save(tmp_path, stem, as_palette(SQUARE, np.array([0, 255], np.uint8).repeat(3)))
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, SQUARE)
    for stem in "abc":
        save(tmp_path, stem, as_palette(labels(), np.array([0, 128, 200], np.uint8).repeat(3)))
    message = refusal(tmp_path)
    assert "count two or more classes from 0" in message
    (tmp_path / "classes.json").write_text(message[message.index('{"names"') :])
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, labels())


def test_indices_stay_in_a_palette_that_shows_them_alike(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, as_palette(labels(), np.zeros(9, np.uint8)))
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, labels())


def test_shapes_in_alpha_alone_are_refused(tmp_path):
    white = np.full((*SQUARE.shape, 4), 255, np.uint8)
    white[..., 3] = SQUARE * 255
    for stem in "ab":
        save(tmp_path, stem, white)
    assert "masks whose shapes are in the alpha channel alone (save them in grey): 2 (a, b)" in refusal(tmp_path)
    along = white * SQUARE[..., None]
    for stem in "ab":
        save(tmp_path, stem, along)
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, SQUARE)


def flipped_unseen(path: Path) -> bytes:
    """The bytes of a PNG with a bit flipped so that Pillow loads other values without an error."""
    content, values = path.read_bytes(), np.asarray(Image.open(path))
    for i in range(content.index(b"IDAT") + 4, len(content) - 16):
        flipped = bytearray(content)
        flipped[i] ^= 4
        with contextlib.suppress(Exception):
            if (np.asarray(Image.open(io.BytesIO(flipped))) != values).any():
                return bytes(flipped)
    raise AssertionError("Pillow sees every one")


def test_a_png_with_a_flipped_bit_is_refused(tmp_path):
    blocks = np.kron(np.random.default_rng(0).integers(0, 3, (20, 20)), np.ones((4, 4))).astype(np.uint8)
    save(tmp_path, "a", blocks, np.stack([blocks * 100] * 3, -1))
    for part in ("masks", "images"):
        file = tmp_path / part / "a.png"
        good = file.read_bytes()
        file.write_bytes(flipped_unseen(file))
        assert f"files that cannot be used: 1 ({part}/a.png: broken PNG file" in refusal(tmp_path, fraction=0)
        file.write_bytes(good)


def test_masks_in_a_tiff_that_is_compressed_as_jpeg_are_refused(tmp_path):
    save(tmp_path, "a", SQUARE)
    mask = tmp_path / "masks" / "a.png"
    Image.open(mask).save(mask.with_suffix(".tif"), compression="jpeg")
    mask.unlink()
    assert "a.tif: is a TIFF compressed as JPEG, whose values are not" in refusal(tmp_path, fraction=0)
    Image.fromarray(SQUARE).save(mask.with_suffix(".tif"), compression="tiff_lzw")
    np.testing.assert_array_equal(load(tmp_path, fraction=0)[1]["a"].labels, SQUARE)


def test_negative_values_are_no_classes(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, SQUARE)
        Image.fromarray(SQUARE.astype(np.int32) * 2 - 1).save(tmp_path / "masks" / f"{stem}.tif")
        (tmp_path / "masks" / f"{stem}.png").unlink()
    assert "none of the 2 classes: 2 (a: -1, b: -1)" in refusal(tmp_path, ("no", "yes"))


@pytest.mark.parametrize("value", [0, 1, 255])
@pytest.mark.parametrize("names", [(), ("no", "yes")])
def test_one_class_alone_is_refused_whichever_it_is(tmp_path, value, names):
    for stem in "ab":
        save(tmp_path, stem, np.full((20, 24), value, np.uint8))
    message = refusal(tmp_path, names)
    assert ("one class alone in all of its masks: 1" if names else "do not count two or more classes") in message


def test_mask_and_picture_are_each_turned_by_their_own_exif(tmp_path):
    stored = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    exif = Image.Exif()
    exif[274] = ROTATED
    for stem in "ab":
        save(tmp_path, stem, SQUARE, stored, exif=exif)
        Image.fromarray(labels(2)).save(tmp_path / "masks" / f"{stem}.png", exif=exif)
    example = load(tmp_path)[1]["a"]
    np.testing.assert_array_equal(example.image, np.rot90(stored, -1))
    np.testing.assert_array_equal(example.labels, np.rot90(labels(2), -1))


def test_16_bits_are_scaled_by_what_all_pictures_use(tmp_path, capsys):
    values = np.linspace(0, 4000, 20 * 24).astype(np.uint16).reshape(20, 24)
    for stem, picture in {"a": values, "b": values // 4, "c": values // 2}.items():
        save(tmp_path, stem, SQUARE, picture)
    data = fill_in(config(tmp_path), 0)
    assert data.white == 4095
    assert "its 16-bit pictures use values up to 4000: 4095 is taken as white (--white)" in capsys.readouterr().out
    examples = load(tmp_path)[1]
    np.testing.assert_array_equal(examples["a"].image[..., 0], values * 255.0 // 4095)
    np.testing.assert_array_equal(examples["b"].image[..., 2], values // 4 * 255.0 // 4095)
    np.testing.assert_array_equal(read_picture(tmp_path / "images" / "a.png", data.white), examples["a"].image)
    np.testing.assert_array_equal(load(tmp_path, white=65535)[1]["a"].image[..., 0], values // 257)


@pytest.mark.parametrize(("brightest", "white"), [(200, 255), (1000, 1023), (16383, 16383), (16384, 65535)])
def test_white_is_of_the_usual_depths(tmp_path, brightest, white):
    for stem in "ab":
        save(tmp_path, stem, SQUARE, SQUARE.astype(np.uint16) * brightest)
    assert fill_in(config(tmp_path), 0).white == white


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write: uint16 [H, W, 3], or 4 with alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 4 * values.shape[2] - 10, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_that_use_a_part_of_the_range_are_refused(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, SQUARE)
        (tmp_path / "images" / f"{stem}.png").write_bytes(deep_png(SQUARE[..., None].repeat(3, 2) * np.uint16(4095)))
    assert "pictures of 16-bit colours that use a part of the range (save them with 8 bits): 2 (a, b)" in (
        refusal(tmp_path)
    )
    (tmp_path / "images" / "b.png").write_bytes(deep_png(SQUARE[..., None].repeat(3, 2) * np.uint16(65535)))
    np.testing.assert_array_equal(load(tmp_path)[1]["b"].image[..., 0], SQUARE * 255)


def test_transparent_parts_are_told(tmp_path, capsys):
    for stem, alpha in (("a", 255), ("b", 90)):
        save(tmp_path, stem, SQUARE)
        picture = Image.new("RGBA", SQUARE.shape[::-1], (10, 20, 30, alpha))
        picture.save(tmp_path / "images" / f"{stem}.png")
    assert load(tmp_path)[1]["a"].image[0, 0].tolist() == [10, 20, 30]
    assert "1 of its pictures (b) have transparent parts, which are laid on white" in capsys.readouterr().out


def test_transparent_parts_do_not_count_as_bright(tmp_path):
    partial = np.full((*SQUARE.shape, 4), 4095, np.uint16)
    partial[..., 3] = 65535
    partial[:4] = (65535, 65535, 65535, 0)
    for stem in "ab":
        save(tmp_path, stem, SQUARE)
        (tmp_path / "images" / f"{stem}.png").write_bytes(deep_png(partial))
    assert "16-bit colours that use a part of the range (save them with 8 bits): 2 (a, b)" in refusal(tmp_path)
    partial[10:] = 65535
    (tmp_path / "images" / "b.png").write_bytes(deep_png(partial))
    assert sorted(load(tmp_path)[1]) == ["a", "b"]


@pytest.mark.parametrize("brightest", [255, 4095, 16383, 16384])
def test_a_picture_of_16_bit_colours_that_is_predicted_alone_must_use_the_range(tmp_path, brightest):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(np.full((8, 8, 3), brightest, np.uint16)))
    predictor = SimpleNamespace(config=SimpleNamespace(data=config(tmp_path)))
    readings = (
        lambda: read_picture(path),
        lambda: predict_command.read(path, "a", predict_command.Options(tmp_path, (), tmp_path, "native"), predictor)[
            1
        ],
    )
    for read in readings:
        if brightest < 16384:
            with pytest.raises(InputError, match=r"a.png: has 16-bit colours that use a part of the range: save it"):
                read()
        else:
            assert (read() == 64).all()


def test_trimaps_are_told_what_to_write(tmp_path):
    trimap = labels(3) + np.uint8(1)
    for stem in "ab":
        save(tmp_path, stem, trimap)
    for names in ((), ("pet", "ground", "edge")):
        message = refusal(tmp_path, names)
        assert "labels start at 0" in message
        text = message[message.index('{"names"') :]
        (tmp_path / "classes.json").write_text(text)
        found, examples = load(tmp_path, names)
        assert found == (names or ("class_0", "class_1", "class_2"))
        np.testing.assert_array_equal(examples["a"].labels, labels(3))
        (tmp_path / "classes.json").unlink()


def test_a_grey_value_can_be_ignored(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, labels(4))
    message = refusal(tmp_path, ("x", "y", "z"))
    text = message[message.index('{"names"') :]
    assert json.loads(text) == {"names": ["x", "y", "z"], "colours": [0, 1, 2], "ignore": [3]}
    (tmp_path / "classes.json").write_text(text, "utf-8-sig")  # a byte order mark, as Windows puts
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].labels, np.where(labels(4) == 3, IGNORE_LABEL, labels(4)))
    save(tmp_path, "b", labels(5))
    message = refusal(tmp_path)
    assert "none of the 3 classes: 1 (b: 4)" in message
    assert json.loads(message[message.index('{"names"') :])["ignore"] == [3, 4]


def test_colour_masks_are_told_the_classes_json_filled_in(tmp_path):
    truth = np.where(SQUARE == 1, 2, labels(40) == 0)
    for stem in "ab":
        save(tmp_path, stem, COLOURS[truth])
    message = refusal(tmp_path)
    assert "masks in colours, which need a classes.json that lists them: 2 (a, b)" in message
    text = message[message.index('{"names"') :]
    assert json.loads(text)["colours"] == COLOURS[[0, 2, 1]].tolist()  # those of most pixels first
    (tmp_path / "classes.json").write_text(text)
    assert load(tmp_path)[0] == ("class_0", "class_1", "class_2")


def test_shades_are_told_from_classes(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, np.arange(480, dtype=np.uint8).reshape(20, 24)[..., None].repeat(3, 2) ^ COLOURS[0])
    assert "so many values are shades: save masks without smoothing, and never as JPEG" in refusal(tmp_path)
