"""The test losses that the published runs printed, by variant and epoch. They printed none for the epochs between.

They are from runs of 25 epochs on 240x240 pictures.
"""


def _losses(first: list[float], epoch: int, last: list[float]) -> dict[int, float]:
    """Those of the first epochs, and those from `epoch` on."""
    return dict(enumerate(first, 1)) | dict(enumerate(last, epoch))


TEST_LOSSES = {
    "mp_tr_ce": _losses([1.3338, 0.8280, 0.6460, 1.1128, 1.0972], 21, [0.9850, 0.8336, 0.6560, 0.6963, 0.5283]),
    "mp_tr_dice": _losses([0.2559, 0.2501, 0.2115, 0.1905, 0.1816], 21, [0.0948, 0.1257, 0.0909, 0.1136, 0.1120]),
    "strconv_tr_ce": _losses([1.3183, 0.5862, 0.5981, 0.5238, 0.5245], 21, [0.4071, 0.3076, 0.3325, 0.4501, 0.2871]),
    "strconv_ups_dice": _losses([0.1596, 0.1661, 0.1223, 0.1148, 0.1261], 20, [0.1391, 0.0642, 0.0651]),
}
