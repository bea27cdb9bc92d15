"""What a source imports, wherever in it."""

import ast
from collections.abc import Iterator

import lora_bench

IMPORTERS = {"import_module", "quiet_import", "__import__"}


def imported(source: str) -> Iterator[str]:
    """Every module that `source` imports anywhere, in full; for a public name of lora_bench, the module it lives in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            if node.module == "lora_bench":
                taken = [alias.name for alias in node.names if alias.name != "__version__"]
                yield from (f"lora_bench.{lora_bench._HOMES.get(name, name)}" for name in taken)
            else:
                yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in IMPORTERS:
                yield str(node.args[0].value)
