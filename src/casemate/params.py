"""params.yaml as validated types: the whole file is checked before anything runs, and without importing torch.

An unknown key or a bad value raises UserError that names its path, such as `defenses.trades.options.beta`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from casemate import registry
from casemate.errors import UserError, first_line, near
from casemate.evaluation.detection_schema import DetectParams
from casemate.evaluation.schema import EvaluateParams, ThreatParams
from casemate.evaluation.study_schema import StudyParams
from casemate.fields import Count, Flag, Natural, Positive, Seed, Text, Unit
from casemate.training.recipe import Recipe

NEEDED: dict[str, str] = {
    "train_size": "null", "defenses": "{}", "tuned": "{}", "subset": "{}", "detect": "{}", "study": "{}",
    "notes": "{}", "finetune": "{}", "release": "{}", "export": "", "export.models": "", "evaluate.models": "",
    "evaluate.source": "",
}  # fmt: skip
"""Keys that stages depend on, so that nothing runs without them although they have defaults; with what stands for
none, where that runs."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Network(Section):
    name: Text
    options: dict[str, Any] = {}
    normalise: Flag = False
    """Put the data set's mean and standard deviation into a first layer."""

    @model_validator(mode="after")
    def _known(self) -> Network:
        registry.check("network", self.name, self.options)
        return self


class Method(Section):
    """A row that is trained: a registered defense, its options, and how long."""

    method: Text
    options: dict[str, Any] = {}
    network: Network | None = None
    """Another network than the profile's."""
    recipe: Recipe

    @model_validator(mode="after")
    def _known(self) -> Method:
        registry.check("defense", self.method, self.options)
        return self


class Tuned(Method):
    """A row that begins with another row's weights."""

    start: Name
    """A row under pretrain or defenses. Its classifier must be the network that this method trains."""


class Generator(Section):
    """An attack that learns: a registered one, its options, and how long it is fitted to each victim."""

    method: Text
    options: dict[str, Any] = {}
    recipe: Recipe

    @model_validator(mode="after")
    def _known(self) -> Generator:
        registry.check("learned_attack", self.method, self.options)
        return self


class Finetune(Section):
    """The attacks that learn, by name; each is fitted to every victim."""

    generators: dict[Name, Generator] = {}
    victims: list[Name] | Literal["all"] = "all"
    """Rows they are fitted to, of those that are evaluated; the others are not attacked with them."""


class Subset(Section):
    """A class subset of an ImageNet-layout folder."""

    source: Text
    classes: list[Text] = Field(min_length=2)
    train_per_class: Count = 1300
    test_per_class: Count = 50
    allow_missing: Flag = False


class Export(Section):
    models: list[Name] = []
    opset: Annotated[int, Field(ge=18, le=21)] = 18
    conv: Literal["auto", "transpose", "flip"] = "auto"
    """How the gradient's convolutions are written: "transpose" suits a GPU."""
    layout: Literal["float32-nchw", "uint8-nhwc"] = "float32-nchw"
    purified: Flag = True
    """Offer the purified images as an output."""
    parity_images: Count = 1000
    noise: Literal["seeded", "random"] = "seeded"
    """Of a randomised system: constants of the file, or drawn by the runtime."""
    draws: Count | None = None
    """How many draws of noise its answer is the mean of; by default what the defense says."""
    variants: list[Literal["float16", "int8"]] = []
    """Made beside each file, each with a robust accuracy of its own."""
    attack_images: Count = 200
    attack_queries: Count = 500
    """What that is measured with, beside the stored adversarial images: Square and RayS on so many images."""


class Release(Section):
    """The gate that an exported file must pass: it is attacked as it is served, by black-box attacks and transfer."""

    margin: Unit = 0.02
    """How far its robust accuracy may fall under the evaluation's worst case on the same images."""
    images: Count = 500
    """At most those that the evaluation's worst case is of."""
    queries: Count = 1000
    """Of Square and of RayS, for each image."""
    steps: Count = 100
    """Of APGD on the PyTorch system, whose images are then sent to the file."""


class Tracking(Section):
    experiment: Text = "casemate"


class Params(Section):
    profile: Name
    budget: Positive
    """Scales epochs and attack steps; written into every result. 1 is what the profile means to run."""
    seed: Seed
    device: Literal["auto", "cpu", "cuda"]
    threads: Natural
    """CPU threads of every stage; 0 means all cores."""
    dataset: Text
    validation: Count
    """Images set aside from the training set; selection never sees the test set."""
    train_size: Count | None = None
    threat: ThreatParams
    network: Network
    pretrain: dict[Name, Method]
    defenses: dict[Name, Method] = {}
    tuned: dict[Name, Tuned] = {}
    finetune: Finetune = Finetune()
    subset: dict[Name, Subset] = {}
    evaluate: EvaluateParams
    detect: dict[Name, DetectParams] = {}
    """Detectors, by the row that they stand behind."""
    notes: dict[Name, Text] = {}
    """A line of words on a row, such as what is smaller in it than in its paper; the report shows it."""
    study: StudyParams = StudyParams()
    """Success tables, distances and pictures beside the leaderboard; off unless it names models."""
    export: Export = Export()
    release: Release = Release()
    tracking: Tracking = Tracking()

    @field_validator("dataset")
    @classmethod
    def _dataset(cls, name: str) -> str:
        try:
            registry.location("dataset", name)
        except UserError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _rows(self) -> Params:
        for section, others in {"defenses": {"pretrain"}, "tuned": {"pretrain", "defenses"}}.items():
            for row in getattr(self, section):
                for other in sorted(others):
                    if row in getattr(self, other):
                        raise ValueError(f"{section}.{row}: this row is under {other} too")
        untuned = {**self.pretrain, **self.defenses}
        for row, tuned in self.tuned.items():
            if tuned.start not in untuned:
                raise ValueError(f"tuned.{row}.start: {_no_row(tuned.start, untuned, 'pretrain or defenses')}")
        victims = [] if self.finetune.victims == "all" else self.finetune.victims
        for row in victims:
            if row not in self.evaluate.models:
                raise ValueError(f"finetune.victims: {_no_row(row, self.evaluate.models, 'evaluate.models')}")
        lists = {
            "evaluate.models": self.evaluate.models,
            "evaluate.source": [self.evaluate.source] if self.evaluate.source else [],
            "evaluate.floors": [row for floor in self.evaluate.floors for row in floor.rows],
            "detect": list(self.detect),
            "notes": list(self.notes),
            "export.models": self.export.models,
        }
        for where, rows in lists.items():
            for row in rows:
                if row not in self.rows:
                    raise ValueError(f"{where}: {_no_row(row, self.rows, 'pretrain, defenses or tuned')}")
        for where, rows in (("evaluate.models", self.evaluate.models), ("export.models", self.export.models)):
            if twice := next((row for row in rows if rows.count(row) > 1), None):
                raise ValueError(f"{where}: {twice} is there twice")
        for row in self.export.models:
            if row not in self.evaluate.models:
                raise ValueError(f"export.models: {row} is not evaluated, and an export is held against that")
        if "index" in self.detect:
            raise ValueError("detect.index: this name is that of the list of detectors; give the row another")
        return self

    @model_validator(mode="after")
    def _norms(self) -> Params:
        """Every attack works in the norm that it is given, which would else be noticed after training."""
        cells: dict[str, Any] = {
            f"evaluate.suites.{suite}.attacks.{name}": cell
            for suite, content in self.evaluate.suites.items() for name, cell in content.attacks.items()
        } | {
            f"detect.{row}.attacks.{name}": cell
            for row, found in self.detect.items() for name, cell in found.attacks.items()
        }  # fmt: skip
        if self.evaluate.sweep is not None:
            cells["evaluate.sweep"] = self.evaluate.sweep
        for where, cell in cells.items():
            own = getattr(cell, "threat", None)
            try:
                cell.check_norm((own or self.threat).norm)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return self

    @model_validator(mode="after")
    def _studied(self) -> Params:
        self.study.check(self.evaluate, list(self.rows))
        return self

    @model_validator(mode="after")
    def _generators(self) -> Params:
        """Every attack that learns has an entry that fits it: of its own name, or named by its option `generator`."""
        fitted = self.finetune.generators
        for suite, content in self.evaluate.suites.items():
            for name, cell in content.attacks.items():
                if cell.attack not in registry.TABLES["learned_attack"]:
                    continue
                wanted, where = cell.options.get("generator") or name, f"evaluate.suites.{suite}.attacks.{name}"
                if wanted not in fitted:
                    raise ValueError(f"{where}: no {wanted!r} under finetune.generators{near(wanted, fitted)}")
                if fitted[wanted].method != cell.attack:
                    method = fitted[wanted].method
                    raise ValueError(f"{where}: finetune.generators.{wanted} fits {method}, not {cell.attack}")
        return self

    @property
    def rows(self) -> dict[str, Method]:
        """Everything that is trained, by row name."""
        return {**self.pretrain, **self.defenses, **self.tuned}

    @property
    def victims(self) -> list[str]:
        """Evaluated rows that the attacks that learn are fitted to."""
        return self.evaluate.models if self.finetune.victims == "all" else list(self.finetune.victims)

    @property
    def models_dir(self) -> Path:
        return Path("models", self.profile)

    @property
    def reports_dir(self) -> Path:
        return Path("reports", self.profile)


def _no_row(row: str, rows: Iterable[str], where: str) -> str:
    return f"no row {row!r} under {where}{near(row, rows)}"


def load_params(path: Path) -> Params:
    """The validated parameters of a file. Raises UserError with the path of every wrong key or value."""
    raw = read_yaml(path)
    params = check_params(raw, str(path))
    for key, nothing in NEEDED.items():
        if _at(raw, key) is ...:
            mend = f"; '{key}: {nothing}' for none" if nothing else ""
            raise UserError(f"{path}: {key}: this key is needed, as the stages read it{mend}")
    if params.detect and _at(raw, "release.margin") is ...:
        raise UserError(f"{path}: release.margin: this key is needed, as files of detectors are held to it")
    for key, rows in (("evaluate.models", params.evaluate.models), ("export.models", params.export.models)):
        if not rows:
            raise UserError(f"{path}: {key}: the stages need at least one row")
    if params.evaluate.source is None:
        raise UserError(f"{path}: evaluate.source: the stages need a row; the pretrained one will do")
    return params


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises UserError for one that is not there, no text in UTF-8, no YAML, or that has
    a key twice, of which YAML would take the last without a word."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write it with 'python -m pipeline profile mnist'") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no text file in UTF-8: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


class _Strict(yaml.SafeLoader):
    """Refuses a key that a mapping has twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _at(raw: Any, key: str) -> Any:
    """What stands under a dotted key; ... if nothing does."""
    for part in key.split("."):
        raw = raw.get(part, ...) if isinstance(raw, dict) else ...
    return raw


def check_params(raw: Any, name: str = "params.yaml") -> Params:
    """Validate a parsed parameter file."""
    if not isinstance(raw, dict):
        raise UserError(f"{name} must be a mapping of sections; got {type(raw).__name__}")
    try:
        return Params(**raw)
    except ValidationError as error:
        problems = [_problem(e, raw) for e in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{name}: {problems[0]}{more}") from None


def _problem(error: Mapping[str, Any], raw: Any) -> str:
    """One pydantic error as `path: what is wrong`, with the near matches of an unknown key."""
    inner = error.get("ctx", {}).get("error")
    where = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _siblings(error["loc"], raw)
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=2, cutoff=0.6)
        hint = "; did you mean " + " or ".join(map(repr, close)) + "?" if close else "; known: " + ", ".join(known)
        return f"{where}: unknown key{hint if known else ''}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{where}: this key is needed"
    message = str(inner) if inner is not None else error["msg"][0].lower() + error["msg"][1:]
    given = "" if inner is not None or isinstance(error.get("input"), dict) else f", got {error.get('input')!r}"
    return f"{where + ': ' if where else ''}{message}{given}"


def _registered(loc: tuple[Any, ...], owner: Mapping[str, Any]) -> tuple[str, Any]:
    """(kind, name) of what the options at `loc` are of: some names, such as `er` and `gap`, are of several kinds."""
    if "attack" in owner or loc[-3] == "adaptive":
        return "attack", owner.get("attack", "joint")
    if "name" in owner:
        return "network", owner["name"]
    kind = {"generators": "learned_attack", "detectors": "detector"}.get(str(loc[-4]), "defense")
    return kind, owner.get("method")


def _siblings(loc: tuple[Any, ...], raw: Any) -> list[str]:
    """The keys that exist where an unknown one stands."""
    if len(loc) >= 2 and loc[-2] == "options":
        owner: Any = raw
        for key in loc[:-2]:
            owner = owner[key]
        kind, name = _registered(loc, owner)
        return sorted(registry.schema(kind, name).model_fields) if name in registry.TABLES[kind] else []
    model: Any = Params
    for key in loc[:-1]:
        fields = getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", {})
        if key in fields:
            model = fields[key].annotation
            arguments = getattr(model, "__args__", ())
            model = next((a for a in reversed(arguments) if hasattr(a, "__pydantic_fields__")), model)
    fields = getattr(model, "__pydantic_fields__", {})
    return sorted(fields)
