"""Settings: every variable, and what is said about one that cannot be read."""

from __future__ import annotations

import pytest

from posttrain_operator.settings import PREFIX, Settings, SettingsError, Timing, read_settings


def read(**values: str) -> Settings:
    return read_settings({PREFIX + name: value for name, value in {"TRAINER_IMAGE": "t:1", **values}.items()})


def test_all_of_them() -> None:
    settings = read(
        NAMESPACE="ops",
        TRAINER_IMAGE_PULL_POLICY="Always",
        ALLOW_CPU="true",
        STATUS_URL="https://s.ops.svc:10443/",
        STATUS_PORT="10443",
        STATUS_SECRET="keys",
        METRICS_PORT="0",
        LOG_LEVEL="debug",
        LOG_FORMAT="text",
        WATCH_NAMESPACES="a, b,",
        TIME_SCALE="0.1",
        LOST_NODE_SECONDS="200",
        HALF_PLACED_SECONDS="900",
    )
    assert settings.plan.allow_cpu is True
    assert settings.status_url == "https://s.ops.svc:10443"
    assert settings.watch_namespaces == ("a", "b")
    assert (settings.timing.lost_node, settings.timing.half_placed) == (20, 90)
    assert settings.timing.resync == pytest.approx(Timing().resync / 10)


def test_empty_means_default() -> None:
    settings = read(STATUS_URL="", STATUS_PORT="", WATCH_NAMESPACES="")
    assert (settings.status_url, settings.status_port, settings.watch_namespaces) == ("", None, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRAINER_IMAGE", ""),
        ("ALLOW_CPU", "yes"),
        ("LOG_LEVEL", "loud"),
        ("METRICS_PORT", "70000"),
        ("METRICS_PORT", "http"),
        ("TIME_SCALE", "0"),
        ("TIME_SCALE", "nan"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=PREFIX + name):
        read(**{name: value})
