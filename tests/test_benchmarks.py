"""The benchmark on a GPU, in miniature on a CPU: it runs, it refuses wrong numbers, a failure stays on its page."""

import subprocess
import sys
from pathlib import Path

import gpu_kernels
import pytest
from gpu_page import Machine, Page

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ("Kernels: chunked", "Mixer layers", "Training", "Decoding", "Decoding: a Transformer", "A million tokens")


@pytest.mark.soak
def test_all_of_it_runs_in_miniature(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "gpu.py", "--device", "cpu", "--quick", "--out", str(page)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)
    text = page.read_text()
    assert [f"## {part}\n" in text for part in PARTS] == [True] * len(PARTS)
    for name in ("plain", "adaptive", "Transformer (Llama)", "propagator (ours)", "softmax attention"):
        assert f"| {name}" in text
    assert "Failed" not in text
    assert "left out: out of time" not in text


@pytest.mark.parametrize("wrong", [False, True])
def test_no_speed_is_measured_of_a_kernel_with_wrong_numbers(wrong, monkeypatch):
    fast = gpu_kernels.fast

    def off(shift, backend):
        run = fast(shift, backend)
        return lambda *inputs: run(*inputs) * (1.001 if inputs[0].shape[1] == 33 else 1)

    monkeypatch.setattr(gpu_kernels, "fast", off if wrong else fast)
    found = []
    if wrong:
        with pytest.raises(gpu_kernels.WrongNumbersError, match=r"real, N = 33, torch.float64: 1.0e-03 where 1e-10"):
            found.extend(gpu_kernels.kernels(Machine("cpu", True, False), "chunked", 1e9))
    found.extend([] if wrong else gpu_kernels.kernels(Machine("cpu", True, False), "chunked", 1e9))
    assert any("GB/s" in part for part in found) != wrong


def test_a_part_that_fails_is_written_down_and_the_page_goes_on(tmp_path):
    page, machine = Page(tmp_path / "page.md"), Machine("cpu", True, False)

    def half():
        yield "a number\n"
        raise MemoryError("no technique")

    page.section("First", machine, 1.0, half())
    page.section("Second", machine, 1.0, iter(["another\n"]))
    text = (tmp_path / "page.md").read_text()
    assert page.failed
    assert (
        text.index("a number")
        < text.index("MemoryError: no technique")
        < text.index("## Second")
        < text.index("another")
    )
