"""What the terminal says of a result is what the result says."""

from pathlib import Path

import pytest

from export.result import ExportResult
from stiefel.tables import export_line, plain


@pytest.mark.parametrize(
    ("compared", "words"),
    [("outputs", "over 5,000 outputs"), ("layers", "over 5,000 values inside the network")],
)
def test_an_export_counts_its_external_data_and_says_what_was_compared(compared, words):
    result = ExportResult(
        path=Path("gone.onnx"),
        format="onnx",
        precision="fp32",
        file_size_bytes=3 * 2**30,
        max_abs_error=1e-5,
        max_rel_error=1e-6,
        outputs_compared=5000,
        compared=compared,
        ranks={"a": 3},
        merged=("b",),
        folded=(),
    )
    line = export_line(result)
    assert "(3072.00 MiB, fp32): 1 factored layers, 1 merged back to dense." in line
    assert words in line


def test_what_is_not_finite_is_null_in_json():
    found = plain({"loss": float("nan"), "rows": [float("inf"), 1.5]})
    assert found == {"loss": None, "rows": [None, 1.5]}
