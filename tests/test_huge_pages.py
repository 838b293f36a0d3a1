import os
import sys

import pytest

from unet_jax import huge_pages


@pytest.mark.parametrize(
    ("setting", "tunables", "restarted_with"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),  # somebody's own choice, or the second start
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),  # not Linux
    ],
)
def test_the_program_is_started_anew_where_that_brings_huge_pages(
    setting, tunables, restarted_with, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append((path, argv, os.environ["GLIBC_TUNABLES"])))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "run.py", "--seed", "1"])
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    if setting:
        huge_pages.SETTING.write_text(setting)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables or "")
    huge_pages.use_huge_pages()
    command = [sys.executable, "-u", "run.py", "--seed", "1"]
    assert started == ([(sys.executable, command, restarted_with)] if restarted_with else [])
