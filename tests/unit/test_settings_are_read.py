"""No setting, and no field of a plan, is there for nothing."""

from pathlib import Path

from tests.support.settings_reads import find_reads

ROOT = Path(__file__).parents[2]
PRODUCT = [
    *("pdserve", "router", "prefill_worker", "decode_worker", "kvtransfer", "placement", "deploy"),
]
EXAMPLE = """
from typing import ClassVar, Literal, Optional


class Settings:
    def model_dump(self, mode: str = "python", include=None, exclude=None) -> dict:
        return {}


def model_validator(mode: str):
    return lambda method: method


class Timers(Settings):
    used_s: float = 1.0
    unused_s: float = 1.0
    only_checked_s: float = 1.0
    only_written_s: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> "Timers":
        if self.only_checked_s < 0:
            raise ValueError
        return self


class Pool(Settings):
    name: str = ""  # the same name is read of something else
    passed_on: int = 1
    left_out: int = 1


class DecodePool(Pool):
    own_passed_on: int = 1


class Cluster(Settings):
    version: Literal[1] = 1
    timers: Timers = Timers()
    pool: Optional[Pool] = None
    handed_on: int = 1
    renamed: ClassVar[dict] = {}


class Other:
    name: str = ""
    unused_s: float = 0.0
"""
READER = """
from product.models import Cluster, Other, Timers


def start(cluster: Cluster, other: Other, **settings: object) -> float:
    if cluster.pool is not None:
        start(cluster, other, **cluster.pool.model_dump(exclude={"left_out", "name"}))
    return cluster.timers.used_s + other.unused_s + len(other.name)


def hand_on(cluster: Cluster) -> dict:
    return cluster.model_dump(include={"handed_on"})


def write(timers: Timers) -> dict:
    return timers.model_dump(mode="json")
"""


def test_every_field_of_settings_and_plans_is_read_by_the_product() -> None:
    found = find_reads(ROOT, PRODUCT, base="pdserve.config.base.Settings")
    assert len(found.declared) > 30, "all classes of settings are found"
    assert found.unread() == [], "read it or delete it"


def test_a_read_counts_for_the_class_that_declares_the_field(tmp_path: Path) -> None:
    package = tmp_path / "product"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(EXAMPLE)
    (package / "reader.py").write_text(READER)
    found = find_reads(tmp_path, ["product"], base="product.models.Settings")
    assert found.unread() == [
        "product.models.Cluster.handed_on",
        "product.models.Pool.left_out",
        "product.models.Pool.name",
        "product.models.Timers.only_checked_s",
        "product.models.Timers.only_written_s",
        "product.models.Timers.unused_s",
    ]
