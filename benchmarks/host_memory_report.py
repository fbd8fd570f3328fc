"""Tables from the results of scripts/gpu_host_check.py, for the terminal and for report.py.

python benchmarks/host_memory_report.py RESULTS/host_memory.json
"""

import json
import sys
from pathlib import Path


def table(columns, rows, markdown=False):
    """Rows of cells as aligned text or as a markdown table."""
    cells = [[_cell(value) for value in row] for row in rows]
    if markdown:
        return "\n".join(
            [
                "| " + " | ".join(columns) + " |",
                "|" + " --- |" * len(columns),
                *("| " + " | ".join(row) + " |" for row in cells),
            ]
        )
    widths = [
        max(len(column), *(len(row[i]) for row in cells)) if cells else len(column) for i, column in enumerate(columns)
    ]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in (columns, *cells)
    )


def _cell(value):
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sections(report, task):
    return {name: data for name, data in report["sections"].items() if data["task"] == task}


def modes(report):
    """(columns, rows) of the host's memory modes."""
    columns = [
        "mode",
        "load s",
        "ready s",
        "own RAM GB",
        "first step s",
        "step s",
        "slowest",
        "own RAM while sampling GB",
        "x resident",
        "VRAM peak GB",
        "LoRA step s",
        "slowest LoRA",
        "x plain",
        "LoRA peak GB",
        "equal",
        "equal with LoRA",
        "left after unload GB",
    ]
    found = sections(report, "modes")
    resident = found.get("static", {}).get("steps", {}).get("step")
    rows = []
    for name, data in found.items():
        steps, lora, peaks = data["steps"], data["lora"], data["peaks_gb"]
        own = data["load"]["own"] - data["idle"]["own"]
        rows.append([
            name, data["load"]["seconds_open"], data["load"]["seconds_ready"], own, steps["first"], steps["step"], max(steps["times"][1:]), steps["own"] - data["idle"]["own"], steps["step"] / resident if resident else None, peaks.get("steps"), lora["step"], max(lora["times"][1:]),
            lora["step"] / steps["step"], peaks.get("lora"), data.get("errors", {}).get("plain"), data.get("errors", {}).get("with LoRA"), data["unloaded"]["vram"] - data["idle"]["vram"],
        ])  # fmt: skip
    return columns, rows


def limits(report):
    """[(what, measured, limit, kept)] of everything this pack promises about memory."""
    out = []

    def check(what, value, limit):
        if value is not None:
            out.append((what, float(value), limit, "yes" if value <= limit else "NO"))

    for name, data in sections(report, "headless").items():
        for case in (case for case in data if case.startswith("streamed")):
            check(f"{case}: peak GB", data[case]["torch_peak"], data[case]["budget"])
            check(f"{case}: error", data[case]["error"], 1e-6)
            if case + ", LoRA" in data:
                check(f"{case}: step / resident", data[case]["step"] / data["resident"]["step"], 1.10)
                check(f"{case}: ready seconds", data[case]["ready"], 2.0)
        for case in (case for case in data if case + ", LoRA" in data):
            check(f"{case}: LoRA step / step", data[case + ", LoRA"]["step"] / data[case]["step"], 1.15)
        check("opening the 22B model: seconds", data["open 2"]["seconds"], 2.0)
        check("opening the 22B model: RAM beside the file, GB", data["open 2"]["own_gb"], 1.0)
    for name, data in sections(report, "modes").items():
        if data["limit_gb"] is None and name in ("static", "dynamic"):
            check(f"{name}: ready seconds", data["load"]["seconds_ready"], 2.0)
            check(f"{name}: RAM beside the file, GB", data["load"]["own"] - data["idle"]["own"], 1.0)
            if name == "static":  # dynamic VRAM keeps what it has page-locked, within its own limits
                check(
                    f"{name}: RAM beside the file after unloading, GB",
                    data["unloaded"]["own"] - data["idle"]["own"],
                    1.0,
                )
        if data["limit_gb"] is not None:
            check(f"{name}: VRAM peak GB", max(data["peaks_gb"].values(), default=0), data["limit_gb"])
        resident = report["sections"].get("static", {}).get("steps", {}).get("step")
        if name == "novram" and resident:
            check(f"{name}: step / resident", data["steps"]["step"] / resident, 1.10)
            check(
                f"{name}: VRAM peak GB", data["peaks_gb"].get("steps"), 4.0
            )  # a LoRA stays on the device where there is room
        if (
            "--disable-pinned-memory" not in data["flags"]
        ):  # then a LoRA that does not fit is copied from ordinary memory, at its speed
            check(f"{name}: LoRA step / step", data["lora"]["step"] / data["steps"]["step"], 1.2)
        if data["dynamic"] and resident:
            check(f"{name}: step / resident", data["steps"]["step"] / resident, 1.10)
        check(f"{name}: reload, error", data["reload"]["equal"], 1e-6)
        check(f"{name}: after the LoRA, error", data["without lora"]["equal"], 1e-6)
        for kind, value in data.get("errors", {}).items():
            check(f"{name}: {kind}, error against resident", value, 0.0 if kind == "plain" else 1e-3)
    for name, data in sections(report, "prompts").items():
        second, last = data["prompts"][1], data["prompts"][-1]
        for what in ("vram", "rss", "own"):
            check(f"{name}: {what} after 20 / after 2", last[what] / second[what] if second[what] else None, 1.02)
    for name, data in sections(report, "vae").items():
        for size, limit in (("768x512x121", 3.0), ("1280x704x241", 5.0)):
            check(f"{name}: {size} peak GB", data.get(f"{size} automatic", {}).get("torch_peak"), limit)
        if "768x512x121 one piece" in data:
            check(
                f"{name}: 768x512x121 time / one piece",
                data["768x512x121 automatic"]["seconds"] / data["768x512x121 one piece"]["seconds"],
                1.05,
            )
            check(f"{name}: 768x512x121 error against one piece", data["768x512x121 automatic"]["error"], 1e-3)
    for name, data in sections(report, "small").items():
        for row in data["small"]:
            best = "recorded x floor" if "recorded x floor" in row else "plain x floor"
            check(
                f"{name}: {row['tokens']} tokens, {best.replace(' x ', ' / ')}",
                row.get(best),
                1.5 if best.startswith("recorded") else 2.0,
            )
            check(f"{name}: {row['tokens']} tokens, recorded blocks against plain ones", row.get("error"), 0.0)
    for name, data in sections(report, "oom").items():
        check(f"{name}: works afterwards, error", data["still_works"], 1e-6)
    return out


def render(report, markdown=False):
    """(text, names of limits missed)."""
    parts = []

    def part(title, columns, rows):  # columns without any value are left out
        if rows:
            filled = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
            columns, rows = [columns[i] for i in filled], [[row[i] for i in filled] for row in rows]
            parts.append((f"### {title}\n\n" if markdown else f"\n{title}\n") + table(columns, rows, markdown))

    env = report["environment"]
    parts.append(
        f"{env.get('gpu', env['device'])}, torch {env['torch']}, Python {env['python']}"
        + (f", ComfyUI {env['host']}" if env.get("host") else "")
        + (" (tiny models, a check of the script)" if report.get("tiny") else "")
    )
    part("Memory modes of the host, 22B Q4_0, 6144 tokens", *modes(report))
    for data in sections(report, "headless").values():
        rows = []
        for case, v in data.items():
            if isinstance(v, dict) and "step" in v:
                plain, lora = data[case.removesuffix(", LoRA")]["step"], case.endswith(", LoRA")
                rows.append(
                    [
                        case,
                        v["ready"],
                        v.get("first"),
                        v["step"],
                        v["step"] / data["resident, LoRA" if lora else "resident"]["step"],
                        v["step"] / plain if lora else None,
                        v["torch_peak"],
                        v["error"],
                    ]
                )
        part(
            "Python pipeline",
            ["case", "ready s", "first step s", "step s", "x resident", "x without the LoRA", "peak GB", "error"],
            rows,
        )
        part(
            "Activations of one step",
            ["tokens", "measured GB", "planned GB"],
            [list(row.values()) for row in data["activations"]],
        )
    for name, data in sections(report, "small").items():
        columns = [
            "tokens",
            "floor",
            "plain",
            "plain x floor",
            "recorded",
            "recorded x floor",
            "blocks recorded",
            "error",
        ]
        part(
            f"{name.capitalize()}: seconds of a step",
            columns,
            [[row.get(column) for column in columns] for row in data["small"]],
        )
    rows = []
    for name, data in sections(report, "vae").items():
        rows += [
            [name, case, v["seconds"], v["torch_peak"], data["peaks_gb"].get(case), v.get("error"), v["plan"]]
            for case, v in data.items()
            if isinstance(v, dict) and "seconds" in v
        ]
    part("VAE decode", ["section", "case", "s", "peak GB", "device peak GB", "error", "plan"], rows)
    for data in sections(report, "vae").values():
        found = data.get("against float32")
        part(
            "VAE decode of 384x256x49, errors against float32 in one piece",
            list(found or ()),
            [list(found.values())] if found else [],
        )
    rows = []
    for name, data in sections(report, "prompts").items():
        rows += [
            [name, row["prompt"], row["vram"], row["rss"], row["own"]]
            for row in data["prompts"]
            if row["prompt"] in (1, 2, 3, 4, 10, 19, 20)
        ]
    part(
        "Twenty prompts, two models and two LoRAs in turn",
        ["section", "after prompt", "VRAM GB", "RSS GB", "own RAM GB"],
        rows,
    )
    for data in sections(report, "lora").values():
        part(
            "LoRA: milliseconds beyond the product (Q4_0)",
            ["out", "in", "tokens", "rank", "product ms", "on the weight", "beside it", "chosen", "right"],
            [list(row.values()) for row in data["lora"]],
        )
    for data in sections(report, "oom").values():
        parts.append(
            f"\nOut of memory, {data['limit_gb']} GB, 163840 tokens ({data['seconds']:.1f} s): {data['message']}"
        )
    found = limits(report)
    part("Limits", ["what", "measured", "limit", "kept"], [list(row) for row in found])
    return "\n\n".join(parts) if markdown else "\n".join(parts), [row[0] for row in found if row[3] == "NO"]


def main():
    print(render(json.loads(Path(sys.argv[1]).read_text()))[0])


if __name__ == "__main__":
    main()
