"""A dense model in, a factored model out: factoring, ranks, calibration, checkpoints."""
