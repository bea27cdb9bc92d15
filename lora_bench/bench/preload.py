"""What every worker needs, imported once by the server that they are forked from; without the notices of others."""

from lora_bench.subjects import quiet_import

with quiet_import():
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lora_bench.bench.measure  # noqa: F401
