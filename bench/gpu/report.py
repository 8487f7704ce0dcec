"""The headline figures, and the tables."""

from pathlib import Path
from typing import Any

HEADLINE = (  # key, part
    ("images_per_s_4step_http_1024", "server"),
    ("gpu_ms_4step_b1_1024", "stages"),
    ("vae_decode_ms_1024", "stages"),
    ("speedup_over_diffusers_eager", "stages"),
    ("variant_switch_ms", "stages"),
    ("ready_s", "server"),
    ("psnr_db_vs_diffusers", "check"),
    ("share_of_matmul_rate", "stages"),
)
OTHERS = (
    *("import_s", "load_s", "ready_s", "first_image_s", "all_graphs_ready_s", "compiled_s", "matmul_tflops"),
    *("psnr_db_fp8_vs_fp16", "step_ms_of_4"),
)
COMPILED = ("decode_vectorised_and_folded_compiled_ms", "diffusers_compiled")
ABOUT = ("weights", "gpu", "cuda", "torch", "diffusers", "transformers", "python", "date")


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """What the project is judged by; None where its part has not run."""
    return {key: results.get(part, {}).get(key) for key, part in HEADLINE}


def show(results: dict[str, Any], path: Path) -> None:
    """Write all of it as Markdown, and print it."""
    lines = ["# GPU benchmark", "", *(f"- {name}: {results[name]}" for name in ABOUT if name in results), ""]
    lines += _table(["figure", "value"], [[key, results.get(key)] for key, _ in HEADLINE])
    stages, served = results.get("stages", {}), results.get("server", {})
    found = {**results.get("check", {}), **stages, **served}
    rows = [[key, found[key]] for key in OTHERS if found.get(key) is not None]
    lines += ["", "## Start-up, files, single techniques", "", *_table(["figure", "value"], rows)]
    for title, table in stages.get("without_ms", {}).items():
        lines += ["", f"without: {title}, ms by batch: {table}"]
    for title in ("ours", "ours_compiled", "diffusers"):
        for pixels, table in stages.get(title, {}).items():
            if isinstance(table, dict) and table:
                pieces = f" ({', '.join(stages[title]['pieces'])})" if title == "ours_compiled" else ""
                lines += ["", f"## {title.replace('_', ', ')}{pieces}, {pixels} px", "", *_by_stage(table)]
    for name in ("decode_folded_ms", "decode_plain_attention_ms", *COMPILED, "skipped"):
        if stages.get(name):
            lines += ["", f"{name.replace('_', ' ')}: {stages[name]}"]
    for title, found in (("Over HTTP", served), ("Over HTTP, compiled", served.get("compiled", {}))):
        loads = {key: row for key, row in found.items() if isinstance(row, dict) and "p50_ms" in row}
        if loads:
            columns = list(next(iter(loads.values())))
            lines += ["", f"## {title}, with PNG", ""]
            lines += _table(["load", *columns], [[key, *(row.get(c) for c in columns)] for key, row in loads.items()])
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    print("\n" + text)


def _by_stage(table: dict[str, Any]) -> list[str]:
    lines = []
    if "step" in table:
        batches = sorted(table["step"], key=int)
        stages = [name for name in ("text", "step", "decode", "images_per_s") if name in table]
        rows = [
            [name if name == "images_per_s" else f"{name}, ms", *(table[name].get(b) for b in batches)]
            for name in stages
        ]
        lines += [*_table(["stage", *(f"batch {batch}" for batch in batches)], rows), ""]
    elif "images_per_s" in table:
        lines += [*_table(["batch", "images/s"], list(map(list, table["images_per_s"].items()))), ""]
    alone = [[f"{name}, one picture", table[name]] for name in ("copy", "png") if table.get(name) is not None]
    return [*lines, *_table(["whole pictures", "ms"], [*map(list, table["ms"].items()), *alone])]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in [head, *rows]]
    return [body[0], "|" + "---|" * len(head), *body[1:]]
