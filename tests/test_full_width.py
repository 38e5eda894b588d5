"""The whole of `sapf run` on Stable Diffusion 1.5 at full width, its weights random: what each
process takes of memory, and how long it takes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sapf_ray.synthesis.writer import read_synthetic
from tests.full_width import command, save_images, watched

SIDE = 64
GB = 1e9
DRIVER_GB = 2.0
TOTAL_GB = 12.0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_whole_run_at_full_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = [sys.executable, "-m", "jobs.random_models", "--models", "sd-v1-5"]
    subprocess.run([*write, "--out", str(tmp_path)], check=True, timeout=900)
    images = save_images(tmp_path / "images", n=32, side=SIDE)
    sized = {"model.resolution": SIDE, "model.dtype": "bfloat16"}
    words = command(tmp_path / "sd-v1-5", images, tmp_path / "run", **sized)
    peaks, printed = watched(words, tmp_path)
    with capsys.disabled():
        print(printed[-2000:], *peaks.lines(), sep="\n")
    made, _ = read_synthetic(tmp_path / "run" / "synthetic")
    assert made.shape == (8, SIDE, SIDE, 3)
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert peaks.of("driver") < DRIVER_GB * GB
    assert peaks.total < TOTAL_GB * GB
