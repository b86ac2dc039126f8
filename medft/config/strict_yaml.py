"""Strict reading of user-written YAML: unknown keys and wrong types are errors with their line.

YAML 1.2 is read, so 1e-4 is a number and `no` is a string. A key given twice is an error.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from medft.errors import RecipeError
from medft.foreign import open_regular, path_problem

MAX_YAML_BYTES = 2**20
"""Bytes of a file at most."""

MAX_YAML_NODES = 50_000
"""Keys and values of a file at most, an alias counted as what it stands for."""

MAX_YAML_DEPTH = 32
"""Mappings and lists in each other at most."""

_TOO_MANY = f"it has more than {MAX_YAML_NODES} keys and values"
_TOO_DEEP = f"it is nested more than {MAX_YAML_DEPTH} deep"

MAX_KEY_LENGTH = 1000
"""Characters of a key at most."""

MAX_PROBLEMS = 50
"""Wrong keys that are described at most."""

ErrorDetails = dict[str, Any]
"""One of pydantic's errors: loc, type, msg."""


class Section(BaseModel):
    """A frozen mapping of a file: unknown keys are refused, types are not converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def shortened(value: object) -> str:
    """A value of any size, as short text."""
    short = Repr()
    short.maxlevel, short.maxdict, short.maxlist = 3, 8, 8
    short.maxstring = short.maxother = short.maxlong = 120
    try:
        return short.repr(value)
    except ValueError:  # an integer has too many digits
        return "a number of thousands of digits"


def _checked_path(text: str) -> str:
    problem = path_problem(text)
    if problem:
        raise ValueError(problem)
    return text


PathText = Annotated[str, Field(min_length=1), AfterValidator(_checked_path)]
"""A text that can be a path."""


def errors_of(check: Callable[[], object], *prefix: str) -> list[ErrorDetails]:
    """Errors of pydantic from a check, with `prefix` before their locations."""
    try:
        check()
    except ValidationError as error:
        return [{**found, "loc": (*prefix, *found["loc"])} for found in error.errors()]
    return []


@dataclass(frozen=True)
class StrictYaml:
    """The content of a YAML file and the location of every key."""

    path: Path
    raw: dict[str, Any]
    """The file's mapping, with overrides applied."""

    places: dict[tuple[str | int, ...], str]
    """`file:line` of every key and list item, or the override that set it."""

    overrides: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The text of each override, by section and key."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file that holds a mapping.

        Raises:
            RecipeError: the file cannot be read, is not YAML, or is not a mapping with string keys.
        """
        try:
            with open_regular(path, max_bytes=MAX_YAML_BYTES) as file:
                text = file.read().decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8 text"
            raise RecipeError(
                f"expected a YAML file at {path}, could not read it ({reason}): check the path"
            ) from error
        try:
            raw, places = _parsed(text, path)
        except YAMLError as error:
            raise RecipeError(_syntax_problem(path, error)) from error
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"{path}: expected plain YAML, could not read it ({error}): write names, "
                f"numbers, texts and lists only"
            ) from error
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else f"a {type(raw).__name__}"
            raise RecipeError(f"{path}: expected named sections, found {found}: write them")
        _check_names(raw, path)
        return cls(path, raw, places)

    def override(self, text: str) -> None:
        """Set `section.key=value`, or `section=null`.

        Raises:
            RecipeError: the text is not of this form, its value is not YAML, or an override before
                it set the same key, or the section of it.
        """
        name, equals, value = text.partition("=")
        keys = tuple(name.split("."))
        if not equals or len(keys) > 2 or not all(keys):
            raise RecipeError(
                f"expected an override as section.key=value, got {shortened(text)}: "
                f"for example train.learning_rate=1e-4"
            )
        for earlier, other in self.overrides.items():
            if keys[: len(earlier)] == earlier[: len(keys)]:
                raise RecipeError(
                    f"expected a key to be overridden once, {shortened(other)} and "
                    f"{shortened(text)} both set {'.'.join(keys[: len(earlier)])}: "
                    f"remove one"
                )
        self.overrides[keys] = text
        target = self.raw
        if len(keys) == 2:
            if not isinstance(target.get(keys[0]), dict):
                target[keys[0]] = {}
            target = target[keys[0]]
        place = f"override {shortened(text)}"
        try:
            target[keys[-1]], _ = _parsed(value, self.path)
        except (YAMLError, TypeError, ValueError) as error:
            raise RecipeError(f"{place}: expected a YAML value: quote it for the shell") from error
        self.places[keys] = place

    def describe(
        self, errors: Iterable[ErrorDetails], explain: Callable[[ErrorDetails], str | None]
    ) -> list[str]:
        """A sentence for each key that is wrong.

        Args:
            errors: pydantic's, from one or several checks of this file.
            explain: returns the sentence for an error, or None to use pydantic's message.
        """
        by_place: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
        for error in errors:
            by_place.setdefault(self._written(error), []).append(error)
        described = list(by_place.items())[:MAX_PROBLEMS]
        problems = [self._sentence(place, found, explain) for place, found in described]
        more = len(by_place) - len(described)
        return (
            problems
            + [f"{self.path}: {more} more keys are wrong: correct these first"][: bool(more)]
        )

    def _written(self, error: ErrorDetails) -> tuple[str | int, ...]:
        """The longest prefix of an error's location that is in the file; for a missing key, all."""
        loc = tuple(error["loc"])
        if error["type"] == "missing":
            return loc
        while loc and loc not in self.places:
            loc = loc[:-1]
        return loc

    def _sentence(
        self,
        keys: tuple[str | int, ...],
        errors: list[ErrorDetails],
        explain: Callable[[ErrorDetails], str | None],
    ) -> str:
        known = keys
        while known and known not in self.places:
            known = known[:-1]
        place = self.places.get(known, str(self.path))
        explained = explain(errors[0])
        if explained:
            return f"{place}: {explained}"
        name = ".".join(map(str, keys)) or "the file"
        if errors[0]["type"] == "missing":
            return f"{place}: {name} is required and missing: add it"
        got: Any = self.raw
        for key in keys:
            got = got[key]
        expected = " or ".join(
            error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            for error in errors
            if "class" not in error.get("ctx", {})
        )
        return f"{place}: {name}: expected {expected}, got {shortened(got)}: correct the value"


def nearest(key: str, known: Iterable[str]) -> str:
    """Advice with the closest known key, or with all known keys if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"


def _parsed(text: str, path: Path) -> tuple[Any, dict[tuple[str | int, ...], str]]:
    """The content of YAML, and the place of every key and item in it.

    Raises:
        YAMLError: it is no YAML.
        TypeError, ValueError: a value cannot be read, there are too many once aliases are expanded,
            or they are nested too deeply.
    """
    _check_events(text)
    tree = YAML(pure=True).compose(text)
    places = {}
    for count, (keys, place) in enumerate(_places(tree, path), start=1):
        if count > MAX_YAML_NODES:
            raise ValueError(_TOO_MANY)
        places[keys] = place
    return YAML(typ="safe", pure=True).load(text), places


def _check_events(text: str) -> None:
    """Raise ValueError before a text is parsed that would take long, or exceed Python's stack."""
    depth = 0
    for count, event in enumerate(YAML(pure=True).parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(_TOO_DEEP)
        if count > 2 * MAX_YAML_NODES:
            raise ValueError(_TOO_MANY)


def _places(node: Any, path: Path, *prefix: str | int) -> Iterable[tuple[tuple, str]]:
    if len(prefix) > MAX_YAML_DEPTH:
        raise ValueError(_TOO_DEEP)
    children: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(node, MappingNode):
        children = ((_name(key), key, value) for key, value in node.value)
    elif isinstance(node, SequenceNode):
        children = ((index, value, value) for index, value in enumerate(node.value))
    for key, marked, value in children:
        yield (*prefix, key), f"{path}:{marked.start_mark.line + 1}"
        yield from _places(value, path, *prefix, key)


def _name(key: Any) -> str:
    if not isinstance(key, ScalarNode):
        raise ValueError("a key is a list or a mapping")
    if len(key.value) > MAX_KEY_LENGTH:
        raise ValueError(f"a key has more than {MAX_KEY_LENGTH} characters")
    return key.value


def _check_names(content: Any, path: Path) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(key, str):
                raise RecipeError(
                    f"{path}: expected names as keys, found {shortened(key)}: quote it"
                )
            _check_names(value, path)
    elif isinstance(content, list):
        for value in content:
            _check_names(value, path)


def _syntax_problem(path: Path, error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return f"{path}: expected YAML, could not parse it: correct the file"
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    problem = (error.problem or "could not parse it").splitlines()[0]
    return f"{path}:{line}: expected YAML, {problem}: correct the line"
