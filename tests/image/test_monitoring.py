"""The dashboard, Prometheus' settings and the compose files: valid, consistent, about metrics that exist."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import dashboard
import pytest
import yaml

from scripts.fork import ROOT

DOCKER = ROOT / "scripts" / "docker"


def compose(name="compose.yaml"):
    return yaml.safe_load((DOCKER / name).read_text())


@pytest.fixture(scope="module")
def registered():
    return dashboard.registered()


def test_registered_metrics_are_found(registered):
    assert registered["vllm:uniprefill_requests_total"] == {"model_name", "engine", "outcome", "reason"}
    assert registered["vllm:uniprefill_computed_share_bucket"] == {"model_name", "engine", "le"}
    assert "vllm:num_requests_running" in registered and "vllm:num_requests_running_total" not in registered


@pytest.mark.parametrize("title", dashboard.queries())
def test_query_reads_registered_series(title, registered):
    query = dashboard.queries()[title]
    names, labels = dashboard.series_and_labels(query)
    assert names, query
    missing = names - registered.keys()
    assert not missing, f"{title}: vLLM registers no {', '.join(missing)}"
    assert labels <= set().union(*(registered[name] for name in names)), query


@pytest.mark.parametrize("title", dashboard.queries())
def test_query_is_promql(title):
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    query = dashboard.queries()[title]
    parser.parse(query)
    with pytest.raises(ValueError):
        parser.parse(query.removesuffix(")") + "(")


def test_dashboard_shows_what_it_must():
    read = {name for query in dashboard.queries().values() for name in dashboard.series_and_labels(query)[0]}
    grouped = {label for query in dashboard.queries().values() for label in re.findall(r"by \(([^)]*)\)", query)}
    assert {"vllm:uniprefill_computed_share_bucket", "vllm:uniprefill_entered_tokens_total"} <= read
    assert {"vllm:uniprefill_prompt_tokens_total", "vllm:uniprefill_requests_total"} <= read
    assert {"vllm:uniprefill_time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"} <= read
    assert {"vllm:uniprefill_lane_busy_seconds_total", "vllm:uniprefill_lane_waiting"} <= read
    assert {"vllm:kv_cache_usage_perc", "vllm:num_requests_waiting"} <= read
    assert {"segment", "le, outcome", "reason"} <= grouped


def test_panels_have_a_place_of_their_own_and_a_word():
    taken = {}
    for panel in dashboard.load()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
            assert taken.setdefault(cell, panel["id"]) == panel["id"], f"{panel['title']} overlaps {taken[cell]}"
    ids = [panel["id"] for panel in dashboard.load()["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["description"] for panel in dashboard.panels())


def lost(before, after, path=""):
    """What a document has that its copy has not, or has otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            p for k in before for p in (lost(before[k], after[k], f"{path}.{k}") if k in after else [f"{path}.{k}"])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [p for i, (b, a) in enumerate(zip(before, after, strict=True)) for p in lost(b, a, f"{path}[{i}]")]
    return [] if before == after else [path]


def through_grafana(document):
    """The document as Grafana's own model of dashboards, panels and Prometheus queries reads and writes it."""
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(document)))


def test_grafana_knows_every_field():
    document = dashboard.load()
    assert lost(document, through_grafana(document)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(titel="x"),
        lambda d: d["panels"][0].update(colour="red"),
        lambda d: d["panels"][0]["options"].update(graphmode="area"),
        lambda d: d["panels"][5]["fieldConfig"]["defaults"]["custom"].update(lineWith=1),
        lambda d: d["panels"][5]["targets"][0].update(expression="up"),
    ],
)
def test_grafana_drops_a_field_it_does_not_know(spoil):
    document = dashboard.load()
    spoil(document)
    assert len(lost(document, through_grafana(document))) == 1


TYPES = "./node_modules/@grafana/schema/dist/esm/raw/composable"
KINDS = {"timeseries": "TimeSeries", "stat": "Stat", "heatmap": "Heatmap"}
# the schema's enums are TypeScript's, and JSON has their values
PLAIN = "type Plain<T> = T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[]"
PLAIN += " : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;"


def as_typescript(document):
    """The dashboard as constants that have the types of Grafana's schema; a compiler refuses what they lack."""
    lines = ["import type { Dashboard, Panel, RowPanel } from '@grafana/schema';", PLAIN]
    for kind, name in KINDS.items():
        file = f"{TYPES}/{kind}/panelcfg/x/{name}PanelCfg_types.gen"
        lines.append(f"import type {{ Options as {name}Options }} from '{file}';")
        if kind != "stat":
            lines.append(f"import type {{ FieldConfig as {name}Field }} from '{file}';")
    lines.append(f"export const dashboard: Plain<Dashboard> = {json.dumps(document)};")
    for panel in document["panels"]:
        number, name = panel["id"], KINDS.get(panel["type"])
        lines.append(f"export const p{number}: Plain<{'Panel' if name else 'RowPanel'}> = {json.dumps(panel)};")
        if name:
            lines.append(f"export const o{number}: Plain<{name}Options> = {json.dumps(panel['options'])};")
        if custom := panel.get("fieldConfig", {}).get("defaults", {}).get("custom"):
            lines.append(f"export const f{number}: Plain<{name}Field> = {json.dumps(custom)};")
    return "\n".join(lines)


@pytest.mark.long  # installs from npm
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_pinned_grafanas_schema_has_every_field(tmp_path):
    version = compose()["services"]["grafana"]["image"].split(":")[1]
    install = ["npm", "install", "--silent", "--prefix", tmp_path, f"@grafana/schema@{version}", "typescript@5.9.3"]
    subprocess.run(install, check=True)
    compiler = [tmp_path / "node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"]
    compiler += ["--module", "esnext", "--moduleResolution", "bundler", "check.ts"]

    def problems(document):
        (tmp_path / "check.ts").write_text(as_typescript(document))
        return subprocess.run(compiler, cwd=tmp_path, capture_output=True, text=True).stdout

    document = dashboard.load()
    assert problems(document) == ""
    document["panels"][0]["options"]["graphmode"] = "area"
    document["panels"][5]["fieldConfig"]["defaults"]["custom"]["lineWith"] = 1
    found = problems(document)
    assert "'graphmode'" in found or '"graphmode"' in found
    assert "lineWith" in found


def test_variables_are_used_and_defined():
    text = dashboard.DASHBOARD.read_text()
    variables = {variable["name"] for variable in dashboard.load()["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", text)) - {"__rate_interval"}
    assert used == variables == {"datasource", "model"}
    assert all(target["expr"].count('model_name=~"$model"') >= 1 for p in dashboard.panels() for target in p["targets"])


def test_compose_files_follow_the_specification():
    program = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("check-jsonschema is not installed")
    command = [program, "--builtin-schema", "vendor.compose-spec", *sorted(DOCKER.glob("compose*.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_images_are_pinned_and_ours_is_what_make_docker_tags():
    images = {name: service["image"] for name, service in compose()["services"].items()}
    assert images["vllm"] == "uniprefill-vllm:cpu"
    assert compose("compose.cuda.yaml")["services"]["vllm"]["image"] == "uniprefill-vllm:cuda"
    assert all(re.fullmatch(r"(prom|grafana)/[a-z]+:v?\d+\.\d+\.\d+", images[n]) for n in ("prometheus", "grafana"))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.apart.yaml"])
def test_compose_volumes_are_there(name):
    document = compose(name)
    for service in document["services"].values():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in document["volumes"], volume


def test_prometheus_scrapes_the_server_and_grafana_reads_prometheus():
    services = compose()["services"]
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert services[name]["ports"] == [f"${{PORT:-{port}}}:{port}"]
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    name, port = source["url"].removeprefix("http://").split(":")
    assert services[name]["image"].startswith("prom/") and services[name]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((provisioning / "dashboards/uniprefill.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{dashboard.DASHBOARD.name}"


def words(service):
    """What a service's command is without anything set."""
    return shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", service["command"]))


def test_compose_apart_is_one_prefill_and_two_decode_servers_behind_a_router():
    from vllm_router.router_args import RouterArgs

    services, plain = compose("compose.apart.yaml")["services"], compose()["services"]["vllm"]
    router = services.pop("router")
    assert router["entrypoint"] == ["vllm-router"]
    assert set(router["depends_on"]) == set(services) and set(plain["security_opt"]) <= set(router["security_opt"])
    RouterArgs.add_cli_args(parser := argparse.ArgumentParser(), use_router_prefix=False)
    options = RouterArgs.from_cli_args(parser.parse_args(words(router)), use_router_prefix=False)
    assert options.vllm_pd_disaggregation and options.host == "0.0.0.0"
    assert router["ports"] == [f"${{PORT:-{options.port}}}:{options.port}"]
    urls = {"kv_producer": [url for url, _ in options.prefill_urls], "kv_consumer": options.decode_urls}
    alike = plain.keys() - {"command", "environment", "ports"}
    for name, service in services.items():
        assert {key: service[key] for key in alike} == {key: plain[key] for key in alike}
        at = words(service).index("--kv-transfer-config")
        assert words(service)[:at] + words(service)[at + 2 :] == words(plain)
        urls[json.loads(words(service)[at + 1])["kv_role"]].remove(f"http://{name}:8000")
    assert urls == {"kv_producer": [], "kv_consumer": []}
    # the host that a server binds is the one that others are told
    assert services["prefill"]["environment"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "prefill"


def test_compose_serves_the_needle_model_by_default():
    """The default arguments are options that vllm serve has, and the folder holds a model."""
    model, *arguments = words(compose()["services"]["vllm"])
    folder = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", compose()["services"]["vllm"]["volumes"][0]).split(":")
    assert (DOCKER / folder[0] / Path(model).relative_to(folder[1]) / "config.json").is_file()
    options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert int(options["--max-model-len"]) >= 16_000  # as the README's example


def test_promtool_accepts_the_settings_and_every_query(tmp_path):
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [{"record": f"test:{i}", "expr": query} for i, query in enumerate(dashboard.queries().values())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": rules}]}))
    for command in (["config", DOCKER / "prometheus.yml"], ["rules", tmp_path / "rules.yml"]):
        done = subprocess.run([promtool, "check", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
