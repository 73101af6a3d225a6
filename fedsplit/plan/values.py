"""Values that several sections of a settings file have."""

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

Code = Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$")]  # module:Name
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Turn = Annotated[float, Field(ge=0.1, le=1e9)]


def one_of(*known: str, own: str) -> AfterValidator:
    """Allow some names, and one from outside: ``module:Class`` or ``module:function``."""

    def check(name: str) -> str:
        if name not in known and not all(name.partition(":")):
            raise ValueError(f"should be one of {', '.join(map(repr, known))} or 'module:{own}', got {name!r}")
        return name

    return AfterValidator(check)


def outside(kind: str) -> AfterValidator:
    """Allow what is from outside, by its name ``module:Class`` or ``module:function``."""

    def check(name: str) -> str:
        if not all(name.partition(":")):
            raise PydanticCustomError("outside", "Input should be 'module:{kind}'", {"kind": kind})
        return name

    return AfterValidator(check)


LearningSchedule = Annotated[str, one_of("constant", "cosine", "step", own="function")]
