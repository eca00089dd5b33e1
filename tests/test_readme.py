"""The README says what the code does."""

from __future__ import annotations

from pathlib import Path

from llmstream.config import describe, load
from llmstream.presets import PRESETS, Preset
from llmstream.telemetry.metrics import Metrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
START, END = "<!-- settings: ", "<!-- /settings -->"


def settings_table() -> str:
    """The configuration table as it has to stand in the README."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for setting in describe():
        default = "" if setting.default is None else f"`{setting.default}`"
        meaning = setting.meaning.replace("``", "`").replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{setting.key}` | {default} | {meaning} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """The table of metrics as it has to stand in the README."""
    rows = ["| metric | labels | meaning |", "|---|---|---|"]
    for metric in Metrics():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` ({metric.kind}) | {labels} | {metric.meaning} |")
    return "\n".join(rows)


def test_the_table_of_metrics_is_complete() -> None:
    """Every metric stands in the README with its labels and meaning."""
    start, end = "<!-- metrics: ", "<!-- /metrics -->"
    table = README[README.index(start) : README.index(end)].split("-->\n", 1)[1].strip()
    assert table == metrics_table()


def test_the_configuration_table_is_complete() -> None:
    """Every setting stands in the README with its default and meaning."""
    table = README[README.index(START) : README.index(END)].split("-->\n", 1)[1].strip()
    assert table == settings_table()


def providers_table() -> str:
    """The table of providers as it has to stand in the README."""
    abilities = ("tools", "json_schema", "logprobs", "choices", "embeddings")
    heads = ["`preset`", "API", "key", "goes on by", *(f"`{name}`" for name in abilities), "`stream_usage`", "`rename`"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(rows + [f"| {' | '.join(_provider(preset, abilities))} |" for preset in PRESETS.values()])


def _provider(preset: Preset, abilities: tuple[str, ...]) -> list[str]:
    where = f"{preset.title}, `{preset.base_url}`" if preset.base_url else preset.title
    keys, can = ", ".join(f"`{name}`" for name in preset.key_variables), preset.can
    marks = ["yes" if getattr(can, name) else "–" for name in abilities]
    renamed = ", ".join(f"`{pair}`" for pair in can.rename)
    return [f"`{preset.name}`", where, keys, f"`{can.continue_by}`", *marks, f"`{can.stream_usage}`", renamed]


def test_the_table_of_providers_is_complete() -> None:
    """Every provider stands in the README with what it can do."""
    start = README.index("<!-- providers: ")
    table = README[start : README.index("<!-- /providers -->")].split("-->\n", 1)[1].strip()
    assert table == providers_table()


def test_the_example_of_prices_is_read() -> None:
    """The example file of prices is a configuration as it stands."""
    prices = load(ROOT / "examples" / "prices.yaml", {}).prices
    assert prices["openrouter/*"].output == 6


def test_ci_runs_the_readme_command() -> None:
    """CI types exactly what the README tells people to type to run the tests."""
    commands = [line for line in README.splitlines() if line.endswith("python -m pytest")]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()
