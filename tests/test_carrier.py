"""Samples taken elsewhere reach pytest-benchmark's JSON bit for bit."""

import json
import math

import pytest

from lora_bench.bench.carrier import CLOCK

pytest_plugins = ["pytester"]

# Out of order, repeated, a subnormal, and numbers whose sums and differences would be rounded.
SAMPLES = [0.3, 0.1, 0.1, 1e-9, 5e-324, math.nextafter(1, 2), 1 / 3, 12345.678]


def test_samples_and_their_notes_arrive_bit_for_bit_and_in_order(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(f"""
        import pytest
        from lora_bench.bench.carrier import CLOCK, carry

        @pytest.mark.benchmark(timer=CLOCK, group="g")
        @pytest.mark.parametrize("samples", [{SAMPLES!r}, [2.0]], ids=["many", "one"])
        def test_carried(samples, request):
            carry(request.getfixturevalue("benchmark"), samples, {{"unit": "seconds", "count": len(samples)}})
    """)
    result = pytester.runpytest_inprocess(
        "--benchmark-json=out.json", "-p", "no:cacheprovider", "-p", "no:lora_bench.plugin"
    )

    result.assert_outcomes(passed=2)
    many, one = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert [value.hex() for value in many["stats"]["data"]] == [value.hex() for value in SAMPLES]
    assert one["stats"]["data"] == [2.0]
    assert (many["stats"]["rounds"], many["stats"]["iterations"]) == (len(SAMPLES), 1)
    assert many["extra_info"] == {"unit": "seconds", "count": len(SAMPLES)}
    assert many["options"]["timer"] == "lora_bench.sample_clock"


def test_the_clock_s_name_is_the_same_in_every_run_for_saved_ones_are_compared_by_it() -> None:
    assert CLOCK.__name__ == repr(CLOCK) == "lora_bench.sample_clock"
