"""What docs/serving.md and README.md tell a user to do, on the committed champion; and the dashboard's metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import ROOT
from tests.serving_toys import Server

CHAMPION = ROOT / "models/mnist/champion"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(CHAMPION, folder=tmp_path_factory.mktemp("docs")) as started:
        yield started


def test_the_picture_of_the_readme_is_a_seven(server: Server) -> None:
    assert "--data-binary @examples/seven.png 127.0.0.1:8000/predict" in (ROOT / "README.md").read_text()
    body = (ROOT / "examples/seven.png").read_bytes()
    status, _, answer = server.ask("POST", "/predict", body, {"Content-Type": "image/png"})
    told = json.loads(answer)
    assert status == 200 and told["class"] == "7" and told["tested"]["radius"] == pytest.approx(0.3)


def test_the_client_of_the_docs(server: Server) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "http.client" in block)
    name = json.loads(server.ask("GET", "/")[2])["model"]
    assert name == "mnist-at_pgd"
    found: dict[str, Any] = {}
    exec(code.replace('"127.0.0.1", 8000', f'"127.0.0.1", {server.port}'), found)
    assert found["logits"].shape == (2, 10) and found["told"]["name"] == "logits"


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:casemate|process)_\w+", expression))


def test_the_dashboard_and_the_alerts_read_metrics_that_exist(server: Server) -> None:
    body = (ROOT / "examples/seven.png").read_bytes()
    server.ask("POST", "/predict", body, {"Content-Type": "image/png"})
    server.ask("GET", "/nothing")
    there = names(server.ask("GET", "/metrics")[2].decode())
    folder = ROOT / "examples/monitoring"
    dashboard = json.loads((folder / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((folder / "alerts.yml").read_text())["groups"][0]["rules"]
    asked += [rule["expr"] for rule in rules]
    assert len(asked) > 15
    for expression in asked:
        assert names(expression) and names(expression) <= there, expression
    scrape = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    assert all((folder / name).is_file() for name in scrape["rule_files"])


def test_links_of_the_page_lead_somewhere() -> None:
    text = (ROOT / "docs/serving.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (Path(ROOT / "docs") / target).exists(), target
