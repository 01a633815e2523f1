import pytest

from deploy.up import DEFAULT_PORTS, settings_of
from pdserve.config.processes import RouterSettings
from pdserve.domain.errors import LocalFault


def test_flags_that_were_not_given_change_nothing() -> None:
    settings = settings_of(None, {"model": None, "router.port": 0}, [])
    assert settings.model == "demo"
    assert settings.router.port == 0


def test_assignments_are_yaml_and_flags_win_over_them() -> None:
    settings = settings_of(
        None,
        {"decode.replicas": 3},
        ["decode.replicas=2", "prefix_reuse=false", "transports=[tcp]", "timers.drain_s=1.5"],
    )
    assert settings.decode.replicas == 3
    assert settings.prefix_reuse is False
    assert settings.transports == ("tcp",)
    assert settings.timers.drain_s == 1.5


@pytest.mark.parametrize("text", ["port", "=3", "a=[", "router=1"])
def test_bad_assignment_is_named(text: str) -> None:
    with pytest.raises(LocalFault):
        settings_of(None, {}, [text])


def test_default_ports_are_those_of_the_settings() -> None:
    assert (RouterSettings().port, RouterSettings().internal_port) == DEFAULT_PORTS
