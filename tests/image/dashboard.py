"""What the Grafana dashboard asks Prometheus for, and what the patched vLLM answers."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "scripts/docker/grafana/dashboards/uniprefill.json"
SERIES = {"counter": ("_total", "_created"), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count", "_created")}


def load() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """The panels that show data, rows left out."""
    return [panel for panel in load()["panels"] if panel["type"] != "row"]


def queries(model: str = ".+", interval: str = "1m") -> dict[str, str]:
    """Panel title and query letter -> PromQL, the dashboard's variables filled in."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"].replace("$model", model).replace("$__rate_interval", interval)
            assert "$" not in text, f"{panel['title']}: a variable that is not filled in: {text}"
            found[f"{panel['title']} {target['refId']}"] = text
    return found


def series_and_labels(query: str) -> tuple[set[str], set[str]]:
    """The series that a query reads, and every label that it names."""
    names = set(re.findall(r"vllm:\w+", query))
    labels = {m for block in re.findall(r"{([^}]*)}", query) for m in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", block)}
    for block in re.findall(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^)]*)\)", query):
        labels |= {label.strip() for label in block.split(",") if label.strip()}
    return names, labels


def registered() -> dict[str, set[str]]:
    """Series of the installed vLLM -> their labels, as its source registers them; nothing is imported."""
    package = Path(importlib.util.find_spec("vllm").origin).parent
    found: dict[str, set[str]] = {}
    for file in [package / "v1/metrics/loggers.py", package / "v1/uniprefill/stats.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            kind = re.fullmatch(r"_(counter|gauge|histogram)_cls", node.func.attr)
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            if kind and isinstance(arguments.get("name"), ast.Constant):
                labels = {n.value for n in ast.walk(arguments["labelnames"]) if isinstance(n, ast.Constant)}
                name = arguments["name"].value.removesuffix("_total" if kind[1] == "counter" else "")
                for suffix in SERIES[kind[1]]:
                    extra = {"le"} if suffix == "_bucket" else set()
                    found[name + suffix] = {"model_name", "engine"} | labels | extra
    return found
