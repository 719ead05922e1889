"""Large batches are computed as exactly as before, and torch's settings are those of before afterwards."""

import contextlib

import pytest
import torch

from resnet_bk.training import cpu


@pytest.fixture
def products(monkeypatch):
    """Let oneDNN count as faster or slower."""

    def choose(faster):
        monkeypatch.setattr(cpu, "_onednn_is_faster", lambda: faster)
        return torch.backends.mkldnn.matmul

    return choose


def test_the_setting_lasts_as_long_as_the_block(products):
    setting = products(True)
    with cpu.large_batches():
        with cpu.large_batches():
            assert setting.fp32_precision == "bf16"
        assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == "none"
    with contextlib.suppress(ZeroDivisionError), cpu.large_batches():
        raise ZeroDivisionError
    assert setting.fp32_precision == "none"


def test_a_slower_or_less_exact_library_and_a_users_setting_change_nothing(products):
    setting = products(False)
    with cpu.large_batches():
        assert setting.fp32_precision == "none"
    products(True)
    setting.fp32_precision = "ieee"
    try:
        with cpu.large_batches():
            assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = "none"


def test_the_choice_needs_a_clear_gain_and_exact_products(monkeypatch):
    measure = cpu._onednn_is_faster.__wrapped__
    monkeypatch.setattr(cpu, "CLEARLY_FASTER", 1e9)
    supported = torch.backends.mkldnn.is_available() and not torch.cpu._is_amx_tile_supported()
    assert measure() == supported
    monkeypatch.setattr(cpu, "CLEARLY_FASTER", 0.0)
    assert not measure()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(cpu, "CLEARLY_FASTER", 1e9)
    assert not measure()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_products_are_those_of_float32():
    x, y = torch.randn(512, 64), torch.randn(64, 300)
    exact = x.double() @ y.double()
    with cpu.large_batches():
        error = (x @ y - exact).abs().max()
    assert error < 1e-5 * exact.abs().max()
