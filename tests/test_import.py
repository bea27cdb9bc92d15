"""What importing costs, and what it gives."""

import pytest

import lora_bench
from tests.fresh_interpreter import loaded_by


@pytest.mark.parametrize(
    "module", ["lora_bench", "lora_bench.plugin", "lora_bench.__main__", "lora_bench.spec", "lora_bench.case"]
)
def test_importing_is_cheap(module: str) -> None:
    loaded = loaded_by(f"import {module}")

    assert module in loaded
    assert loaded.isdisjoint({"torch", "transformers", "peft", "numpy", "hypothesis"})


def test_looking_around_is_cheap() -> None:
    loaded = loaded_by(
        "import lora_bench; dir(lora_bench); lora_bench.LoraSpec(2, 4); lora_bench.Case(); lora_bench.Subject"
    )

    assert {"lora_bench.spec", "lora_bench.case", "lora_bench.subject"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", lora_bench.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(lora_bench, name)

    assert name in dir(lora_bench)
    assert value is getattr(lora_bench, name)
    assert getattr(value, "__name__", name) == name  # a class or function; REFERENCE is a record


def test_public_names_are_few_and_sorted() -> None:
    assert set(lora_bench.__all__) == {
        "REFERENCE",
        "Case",
        "Factors",
        "LoraSpec",
        "Nonconformance",
        "Subject",
        "conforms",
    }
    assert set(lora_bench.__all__) == set(lora_bench._HOMES)
    assert dir(lora_bench) == sorted(set(dir(lora_bench)))


@pytest.mark.parametrize("name", ["nope", "Conforms", "torch", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'lora_bench' has no attribute '{name}'$"):
        getattr(lora_bench, name)
    assert not hasattr(lora_bench, name)


def test_the_version_is_that_of_the_package() -> None:
    parts = lora_bench.__version__.split(".")

    assert len(parts) == 3
    assert all(part.isdecimal() for part in parts)
