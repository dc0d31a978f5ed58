"""What a plan is made for: a device file in YAML, typed, and refused with key and line like a recipe.

Numbers are those of one device; a `null` is a number that nobody has published or measured, and what needs it is left
out of a plan. Devices that come with the program lie in devices/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, ValidationError

from gemma_deploy import backends, reading
from gemma_deploy.errors import UsageError
from gemma_deploy.recipe import document as documents
from gemma_deploy.recipe import explain
from gemma_deploy.recipe.sections import Positive, Section

if TYPE_CHECKING:
    BackendType: TypeAlias = str
else:
    BackendType = Literal[backends.ROWS]

SHIPPED = Path(__file__).parent / "devices"
SUFFIX = ".yaml"
Kind: TypeAlias = Literal["cpu", "gpu", "accelerator"]
CPU: Kind = "cpu"
GPU: Kind = "gpu"
NEXT_STEP = "correct the lines above; docs/plan.md has an example, and `gemma-deploy plan --measure FILE` writes one"
DEVICE_FILE = reading.FileKind(
    error=UsageError,
    expected="a device file, YAML in UTF-8",
    next_step=NEXT_STEP,
    limit_bytes=4 * documents.MAX_CHARS,
)
Rate = Annotated[float, Field(gt=0, le=1e9)]
Word = Annotated[str, Field(min_length=1)]


class Device(Section):
    """One or several equal devices.

    Attributes:
        name: of the kind; what: a sentence about it.
        kind: `cpu`, `gpu` or `accelerator`: measured shares of the rates below are those of a kind.
        count: devices of one machine.
        memory_gb: of each, in 10^9 bytes; usable: the share of it that weights, cache and activations may take.
        bandwidth_gb_s: at which its memory is read, in 10^9 bytes a second.
        int8_tops, fp16_tflops, fp32_tflops: 10^12 operations a second of products of matrices; a product and its sum
            are two.
        link_gb_s: between two devices, in 10^9 bytes a second, one way.
        backends: that compute on it.
        sources: key -> where its number is from.
    """

    name: Word
    what: str = ""
    kind: Kind
    count: Positive = 1
    memory_gb: Rate | None
    usable: Annotated[float, Field(gt=0, le=1)] = 0.9
    bandwidth_gb_s: Rate | None
    int8_tops: Rate | None
    fp16_tflops: Rate | None
    fp32_tflops: Rate | None
    link_gb_s: Rate | None = None
    backends: Annotated[list[BackendType], Field(min_length=1)]
    sources: Annotated[dict[str, str], Field(default_factory=dict)]

    @classmethod
    def load(cls, asked: str) -> Self:
        """Read a file, or one of those that come with the program by its name.

        Raises:
            UsageError: there is none, or everything that is wrong in it, each with its line.
        """
        path = find_device(asked)
        return cls.from_text(reading.read_text(path, DEVICE_FILE, pipes=True), where=str(path))

    @classmethod
    def from_text(cls, text: str, where: str = "device") -> Self:
        """Like `load`, from YAML text."""
        document = documents.parse(text, (), {})
        device = None
        try:
            device = cls.model_validate(_with_floats(document.values))
        except ValidationError as error:
            if document.values or not document.problems:
                found = error.errors(include_url=False)
                document.problems += [(tuple(one["loc"]), explain.sentence(cls, one)) for one in found]
        if device is not None:
            unknown = sorted(set(device.sources) - set(cls.model_fields))
            document.problems += [(("sources", key), "is no key of a device file: remove it") for key in unknown]
        if document.problems or device is None:
            problems = document.sentences()
            raise UsageError(
                f"the device file has {len(problems)} problem{'s' if len(problems) != 1 else ''}",
                where=where,
                problems=problems,
                next_step=NEXT_STEP,
            )
        return device

    @property
    def room_bytes(self) -> int | None:
        """Of each device, what a model may take; None where nobody has said how much memory it has."""
        return None if self.memory_gb is None else int(self.memory_gb * 1e9 * self.usable)

    def to_yaml(self) -> str:
        """The file it is read from."""
        import yaml

        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=110)


def _with_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers where fractions are wanted too: `memory_gb: 16`."""
    fractions = {name for name in Device.model_fields if name.endswith(("_gb", "_gb_s", "ops", "usable"))}
    return {
        key: float(value) if key in fractions and type(value) is int and abs(value) < 1 << 53 else value
        for key, value in values.items()
    }


def shipped_devices() -> dict[str, Path]:
    """Files of the devices that come with the program, by the name that a command takes."""
    return {file.stem: file for file in sorted(SHIPPED.glob(f"*{SUFFIX}"))}


def find_device(asked: str) -> Path:
    """A path, or the name of a shipped device.

    Raises:
        UsageError: there is neither.
    """
    shipped = shipped_devices()
    if asked in shipped:
        return shipped[asked]
    if (why := reading.why_absent(asked)) is None:
        return Path(asked)
    raise UsageError(
        f"{why}, and no device of that name comes with the program",
        where=asked,
        expected=f"the path of a device file, or one of {', '.join(shipped)}",
        next_step="name one of these, or write a file: `gemma-deploy plan --measure FILE`",
    )
