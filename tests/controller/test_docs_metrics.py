"""The pages on metrics and on the status server say what the code does."""

import re
from pathlib import Path

from posttrain_api import names
from posttrain_api.records import MAX_METRICS, MAX_REPORT_BYTES, Report
from posttrain_operator.certificates import Lifetimes
from posttrain_operator.jobseries import JobsCollector
from posttrain_operator.metrics import OperatorMetrics
from posttrain_operator.statusserver import handlers
from posttrain_operator.statusserver.bodies import read_kubeflow, read_report
from posttrain_operator.statusserver.keeper import SecretPlace
from posttrain_operator.statusserver.server import ServerOptions
from posttrain_trainer.prometheus import ALL_SERIES, PREFIX, MetricsExporter

PAGES = Path(__file__).parents[2] / "docs" / "platform"
METRICS = (PAGES / "metrics.md").read_text()
SERVER = (PAGES / "status-server.md").read_text()
Row = tuple[str, ...]


def rows(text: str, prefix: str) -> dict[str, Row]:
    """Table rows whose first cell is a code word with this prefix: {word: other cells}."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(f"| `{prefix}"):
            found[cells[0].strip("`")] = tuple(cells[1:])
    return found


def exported() -> dict[str, Row]:
    """{name: (type, labels, help)} of the operator's own metrics, those without a value too."""
    metrics = OperatorMetrics()
    made = [each for each in vars(metrics).values() if hasattr(each, "_labelnames")]
    labels = {each._name: ", ".join(each._labelnames) for each in made}
    labels |= {each.name: ", ".join(each._labelnames) for each in JobsCollector(tuple).collect()}
    labels["posttraining_build_info"] = "version, python"
    families = [each for each in metrics.registry.collect() if each.name.startswith("posttraining_")]
    return {
        each.name + ("_total" if each.type == "counter" else ""): (
            each.type,
            labels.get(each.name, ""),
            each.documentation,
        )
        for each in families
    }


def test_every_metric_of_the_operator_is_in_the_table_and_no_other() -> None:
    assert rows(METRICS, "posttraining_") == exported()


def test_every_metric_of_the_trainer_is_in_the_table_and_no_other() -> None:
    exporter = MetricsExporter()
    labels = {each.name: ", ".join(each._labelnames) for each in exporter.collect()}
    expected = {
        PREFIX + each.name: (
            "counter" if each.counter else "gauge",
            labels.get(PREFIX + each.name, ""),
            each.source,
            each.help,
        )
        for each in ALL_SERIES
    }
    assert rows(METRICS, "posttrain_") == expected


def test_every_result_of_a_report_is_named() -> None:
    assert all(result in METRICS for result in handlers.RESULTS.values())


def test_the_status_servers_page_names_what_the_code_has() -> None:
    variables = {value for name, value in vars(names).items() if name.startswith(("ENV_STATUS", "ENV_KUBEFLOW"))}
    assert variables == set(rows(SERVER, "POSTTRAIN_STATUS")) | set(rows(SERVER, "KUBEFLOW"))
    assert names.STATUS_PATH in SERVER
    assert names.KUBEFLOW_STATUS_PATH in SERVER
    assert f"`{names.STATUS_AUDIENCE}`" in SERVER
    assert all(f"`{manager}`" in SERVER for manager in (names.STATUS_MANAGER, names.PROGRESS_MANAGER))


def test_every_answer_is_explained() -> None:
    source = Path(handlers.__file__).read_text()
    reasons = set(re.findall(r'Refusal\(\s*\d+, "(\w+)"', source))
    listed = {word for line in SERVER.splitlines() if re.match(r"\| \d+ \|", line) for word in re.findall(r"\w+", line)}
    assert reasons <= listed
    assert {str(code) for code in handlers.RESULTS} <= listed


def test_the_examples_are_accepted() -> None:
    ours, kubeflow = re.findall(r"```json\n(.*?)```", SERVER, re.DOTALL)
    assert read_report(ours.encode()).report.step == 120
    assert read_kubeflow(kubeflow.encode()).percent == 45


def test_every_field_of_a_report_is_explained() -> None:
    for name, field in Report.model_fields.items():
        assert f"`{field.alias or name}`" in SERVER, name


def test_the_numbers_are_the_defaults() -> None:
    options = ServerOptions(SecretPlace("n", "s", ("host",)))
    lives = Lifetimes()
    assert (options.writing.urgent_interval, options.writing.min_interval, options.writing.max_interval) == (2, 10, 60)
    assert options.per_pod == (20, 1.0)
    assert options.failures[0] == 30
    assert (lives.serving.days, lives.authority.days) == (90, 3 * 365)
    assert str(MAX_REPORT_BYTES) in SERVER
    assert f"at most {MAX_METRICS} numbers" in SERVER
