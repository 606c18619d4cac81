import torch
from torch import nn

from benchmarks.inference import TIMED, report, settle

ENVIRONMENT = {"processor": "Abacus", "threads": 2, "torch": "2.15"}


def row(model: str, batch: int, **others):
    place = {"runtime": "torch", "device": "cpu", "precision": "fp32"}
    return {"model": model, "batch": batch} | place | others


def ratio(model: str, batch: int, speedup: float, noise: bool):
    spread = {"speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1, "within_noise": noise}
    return row(model, batch, baseline="dense", speedup=speedup) | spread


def test_the_report_shows_what_is_slower_what_is_noise_and_what_was_refused():
    network = {
        "network": "net",
        "device": "cpu",
        "planned_batch": 8,
        "plans": {
            "params=0.5": {"parameters": 0.5, "macs": 0.75},
            "params=0.25": {"refused": "out of reach"},
            TIMED: {"parameters": 0.4, "macs": 0.3, "latency": 0.49},
        },
        "rows": [row("dense", 1, latency_ms_p50=4.0), row("dense", 8, latency_ms_p50=16.0)],
        "ratios": [
            ratio("params=0.5", 1, 0.5, noise=False),
            ratio("params=0.5", 8, 1.05, noise=True),
            ratio(TIMED, 1, 1.5, noise=False),
            ratio(TIMED, 8, 2.1, noise=False),
        ],
        "environment": ENVIRONMENT,
    }
    lines = report([network]).splitlines()
    assert "## Abacus, 2 threads, torch 2.15, fp32" in lines
    assert "| net | dense | 100% | 100% | 4.00 ms | 16.00 ms |" in lines
    assert "| net | params=0.5 | 50% | 75% | 0.50× (0.40–0.60) | *1.05× (0.95–1.15)* |" in lines
    assert "| net | params=0.25 | out of reach |  |  |  |" in lines
    assert "| net | 8 | 0.49 | 0.48 (0.45–0.50) | yes |" in lines


def test_a_random_network_that_is_settled_computes_something_in_half_precision():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).eval()
    for layer in layers:
        layer[0].weight.data *= 0.1
    x = torch.randn(4, 8, 32, 32)
    assert not model.half()(x.half()).std(dim=0).any()
    settle(model.float(), x)
    assert model.half()(x.half()).std(dim=0).min() > 0.01
    assert not any(module.training for module in model.modules())
