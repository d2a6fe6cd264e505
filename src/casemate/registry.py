"""What exists, by name. One line here registers a method; nothing is imported until it is used.

`schema(kind, name)` reads a class's fields from its source, so validating params.yaml needs no torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import InitErrorDetails

from casemate.errors import UserError, near
from casemate.fields import VOCABULARY

TABLES: dict[str, dict[str, str]] = {
    "dataset": {
        "digits": "casemate.data.digits:Digits",
        "mnist": "casemate.data.mnist:MNIST",
        "fashion_mnist": "casemate.data.mnist:FashionMNIST",
        "cifar10": "casemate.data.cifar10:CIFAR10",
        "cifar100": "casemate.data.cifar100:CIFAR100",
        "svhn": "casemate.data.svhn:SVHN",
        "stl10": "casemate.data.stl10:STL10",
        "tinyimagenet": "casemate.data.tinyimagenet:TinyImageNet",
        "imagenet10": "casemate.data.imagenet10:ImageNet10",
        "imagenet10_small": "casemate.data.imagenet10_small:ImageNet10Small",
        "nips17": "casemate.data.nips17:NIPS17",
    },
    "network": {
        "digits_cnn": "casemate.networks.small:DigitsCNN",
        "lenet5": "casemate.networks.small:LeNet5",
        "small_cnn": "casemate.networks.small:SmallCNN",
        "madry_cnn": "casemate.networks.mnist_cnns:MadryCNN",
        "fast_cnn": "casemate.networks.mnist_cnns:FastCNN",
        "tla_cnn": "casemate.networks.mnist_cnns:TLACNN",
        "er_plain_cnn": "casemate.networks.mnist_cnns:ERPlainCNN",
        "lid_cnn": "casemate.networks.lid_cnn:LIDCNN",
        "defense_gan_net": "casemate.networks.defense_gan_nets:DefenseGANNet",
        "manifold_cnn": "casemate.networks.defense_gan_nets:ManifoldCNN",
        "compact_resnet": "casemate.networks.compact_resnet:CompactResNet",
        "resnet20": "casemate.networks.resnet20:ResNet20",
        "preact_resnet18": "casemate.networks.preact_resnet:PreActResNet18",
        "resnet18": "casemate.networks.resnet18:ResNet18",
        "resnet101": "casemate.networks.resnet101:ResNet101",
        "inception_v3": "casemate.networks.inception_v3:InceptionV3",
        "efficientnet_lite": "casemate.networks.efficientnet_lite:EfficientNetLite",
        "vgg16_bn": "casemate.networks.vgg:VGG16BN",
        "stl10_cnn": "casemate.networks.stl10_cnn:STL10CNN",
        "wrn": "casemate.networks.wrn:WideResNet",
        "madry_wrn": "casemate.networks.madry_wrn:MadryWRN",
        "er_conv": "casemate.networks.encoders:ERConv",
        "er_vgg": "casemate.networks.encoders:ERVGG",
    },
    "attack": {
        "fgsm": "casemate.attacks.gradient:FGSM",
        "pgd": "casemate.attacks.gradient:PGD",
        "mim": "casemate.attacks.gradient:MIM",
        "cw_margin": "casemate.attacks.gradient:CWMargin",
        "apgd": "casemate.attacks.apgd:APGD",
        "apgd_t": "casemate.attacks.apgd:APGDT",
        "fab_t": "casemate.attacks.fab:FABT",
        "fab_norm": "casemate.attacks.fab:FABNorm",
        "square": "casemate.attacks.square:Square",
        "autoattack": "casemate.attacks.autoattack:AutoAttack",
        "cw_l2": "casemate.attacks.carlini_wagner:CWL2",
        "cw_adam": "casemate.attacks.carlini_wagner:CWAdam",
        "feature": "casemate.attacks.feature:Feature",
        "latent": "casemate.attacks.latent:Latent",
        "spsa": "casemate.attacks.black_box:SPSA",
        "rays": "casemate.attacks.black_box:RayS",
        "transfer": "casemate.attacks.transfer:Transfer",
        "all_iterates": "casemate.attacks.adaptive:AllIterates",
        "pre_compensation": "casemate.attacks.adaptive:PreCompensation",
        "noise_averaged": "casemate.attacks.adaptive:NoiseAveraged",
        "smoothed_sign": "casemate.purification.imt_attacks:SmoothedSign",
        "mask_control": "casemate.purification.imt_attacks:MaskControl",
        "published_atld": "casemate.purification.imt_attacks:PublishedATLD",
        "joint": "casemate.attacks.joint:Joint",
        "manifold": "casemate.attacks.manifold:Manifold",
        "gap": "casemate.attacks.gap:GAP",
        "advgan": "casemate.attacks.advgan:AdvGAN",
        "exp": "casemate.attacks.explicit:EXP",
        "exp_am": "casemate.attacks.amortised:ExpAM",
        "imp_am": "casemate.attacks.amortised:ImpAM",
        "l2l": "casemate.attacks.l2l:L2L",
        "l2l_da": "casemate.attacks.l2l:L2LDA",
        "stadv": "casemate.attacks.spatial:StAdv",
        "adef": "casemate.attacks.spatial:ADef",
        "eot_rotation": "casemate.attacks.rotation:EOTRotation",
        "rotation_translation": "casemate.attacks.rotation:RotationTranslation",
        "pixel_mass_wasserstein": "casemate.attacks.wasserstein:PixelMassWasserstein",
        "iwda": "casemate.attacks.iwda:IWDA",
        "iwda_sliced": "casemate.attacks.iwda_sliced:IWDASliced",
        "iwda_generator": "casemate.attacks.iwda_generator:IWDAGenerator",
    },
    "defense": {
        "standard": "casemate.defenses.standard:Standard",
        "given": "casemate.defenses.given:Given",
        "at_pgd": "casemate.defenses.at_pgd:ATPGD",
        "at_cw": "casemate.defenses.at_cw:ATCW",
        "fgsm_ut": "casemate.defenses.fgsm_ut:FGSMUT",
        "fgsm_ll": "casemate.defenses.fgsm_ll:FGSMLL",
        "fgsm_rs": "casemate.defenses.fgsm_rs:FGSMRS",
        "n_fgsm": "casemate.defenses.n_fgsm:NFGSM",
        "grad_align": "casemate.defenses.grad_align:GradAlign",
        "free": "casemate.defenses.free:Free",
        "alp": "casemate.defenses.alp:ALP",
        "mart": "casemate.defenses.mart:MART",
        "trades": "casemate.defenses.trades:TRADES",
        "atld": "casemate.defenses.atld:ATLD",
        "iwdd": "casemate.defenses.iwdd:IWDD",
        "iwdd_plus_pgd": "casemate.defenses.iwdd_plus_pgd:IWDDPlusPGD",
        "adt_exp": "casemate.defenses.adt_exp:ADTEXP",
        "adt_exp_am": "casemate.defenses.adt_exp_am:ADTEXPAM",
        "adt_imp_am": "casemate.defenses.adt_imp_am:ADTIMPAM",
        "l2l": "casemate.defenses.l2l:L2L",
        "l2l_star": "casemate.defenses.l2l_star:L2LStar",
        "l2l_da": "casemate.defenses.l2l_da:L2LDA",
        "bilateral": "casemate.defenses.bilateral:Bilateral",
        "feature_scattering": "casemate.defenses.feature_scattering:FeatureScattering",
        "lat": "casemate.defenses.lat:LAT",
        "rse": "casemate.defenses.rse:RSE",
        "tla": "casemate.defenses.tla:TLA",
        "er": "casemate.defenses.er:ER",
        "er_trades": "casemate.defenses.er_trades:ERTrades",
        "e_cla": "casemate.defenses.e_cla:ECLA",
        "vae_cla": "casemate.defenses.vae_cla:VAECLA",
        "defense_gan": "casemate.defenses.defense_gan:DefenseGAN",
    },
    "detector": {
        "er": "casemate.detectors.er:ERDetector",
        "kd": "casemate.detectors.kd:KD",
        "lid": "casemate.detectors.lid:LID",
        "reconstruction": "casemate.detectors.reconstruction:Reconstruction",
    },
    "learned_attack": {
        "gap": "casemate.attacks.gap:GAPTrainer",
        "advgan": "casemate.attacks.advgan:AdvGANTrainer",
        "exp_am": "casemate.attacks.amortised:ExpAMTrainer",
        "imp_am": "casemate.attacks.amortised:ImpAMTrainer",
        "l2l": "casemate.attacks.l2l:L2LTrainer",
        "l2l_da": "casemate.attacks.l2l:L2LDATrainer",
        "iwda_generator": "casemate.attacks.iwda_generator:IWDAGeneratorTrainer",
    },
}

SOURCE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """The registered names of a kind (`attack`, `defense`, `detector`, `network`, `dataset`), sorted."""
    return sorted(TABLES[kind])


def location(kind: str, name: str) -> tuple[str, str]:
    """(module, class name) of a registered name. Raises UserError with the near matches."""
    table = TABLES[kind]
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}{near(name, table)}")
    module, _, attribute = table[name].partition(":")
    return module, attribute


def resolve(kind: str, name: str) -> type[Any]:
    """Import and return the registered class."""
    module, attribute = location(kind, name)
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def source_file(kind: str, name: str) -> Path:
    """The file that holds a registered class; found without importing it."""
    module, _ = location(kind, name)
    return _module_file(module)


def _module_file(module: str) -> Path:
    relative = Path(*module.split(".")[1:])
    plain = SOURCE / relative.with_suffix(".py")
    return plain if plain.exists() else SOURCE / relative / "__init__.py"


# --- fields, read from the source ---------------------------------------------------------------------------


@functools.cache
def schema(kind: str, name: str) -> type[BaseModel]:
    """A pydantic model with the fields of a registered class. Unknown keys are errors, as in the class itself."""
    module, attribute = location(kind, name)
    fields: dict[str, Any] = _fields(module, attribute)
    return create_model(attribute, __config__=ConfigDict(extra="forbid"), **fields)


def check(kind: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a registered class with its defaults filled in; for use inside a pydantic validator.

    Raises ValueError for an unknown name, and ValidationError with `options` in the path for a wrong field.
    """
    try:
        model = schema(kind, name)
    except UserError as error:  # pydantic adds the path to a ValueError only
        raise ValueError(str(error)) from None
    try:
        found = model(**options).model_dump()
    except ValidationError as error:
        details = [
            InitErrorDetails(type=e["type"], loc=("options", *e["loc"]), input=e["input"], ctx=e.get("ctx", {}))
            for e in error.errors()
        ]
        raise ValidationError.from_exception_data(error.title, details) from None
    try:
        _own_rules(kind, name, found)
    except UserError as error:
        raise ValueError(str(error)) from None
    return found


def _own_rules(kind: str, name: str, options: dict[str, Any]) -> None:
    """What the class itself says of fields that do not go together: its `__post_init__`, run from its source on the
    fields alone. Where it needs more than its fields and `UserError`, the class says so itself once it is made."""
    module, attribute = location(kind, name)
    for _, found in _lineage(module, attribute):
        rules = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"), None)
        if rules is not None:
            known: dict[str, Any] = {"UserError": UserError}
            exec(compile(ast.Module([rules], []), f"<{module}>", "exec"), known)
            made = type(attribute, (), {})()
            vars(made).update(options)
            with contextlib.suppress(NameError, AttributeError, RuntimeError):
                known["__post_init__"](made)
            return


def declared(kind: str, name: str, attribute: str) -> Any:
    """The literal that a registered class, or the nearest of its bases, gives a class variable; a frozenset of
    literals too. None where nobody does."""
    for _, found in _lineage(*location(kind, name)):
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == attribute:
                value = node.value
                inner = value.args[0] if isinstance(value, ast.Call) else value
                return None if inner is None else ast.literal_eval(inner)
    return None


def method(kind: str, name: str, called: str) -> tuple[str, ast.FunctionDef] | None:
    """(module, source) of a method that a registered class, or the nearest of its bases, defines."""
    for module, found in _lineage(*location(kind, name)):
        for node in found.body:
            if isinstance(node, ast.FunctionDef) and node.name == called:
                return module, node
    return None


def _lineage(module: str, attribute: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its bases in this package, each with its module, in Python's order where no base is shared."""
    tree = _tree(module)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == attribute), None)
    if found is not None:
        yield module, found
        for base in found.bases:
            origin = _origin(tree, module, base)
            if origin is not None:
                yield from _lineage(*origin)


def _fields(module: str, attribute: str) -> dict[str, tuple[Any, Any]]:
    tree = _tree(module)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == attribute), None)
    if found is None:
        raise LookupError(f"{module} has no class {attribute}")
    fields: dict[str, tuple[Any, Any]] = {}
    for base in reversed(found.bases):  # the first base has the last word, as in Python
        origin = _origin(tree, module, base)
        if origin is not None:
            fields.update(_fields(*origin))
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            where = f"{module}:{attribute}.{node.target.id}"
            default = ... if node.value is None else _default(node.value, where)
            fields[node.target.id] = (_annotation(node.annotation, f"{module}:{attribute}"), default)
    return fields


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_module_file(module).read_text())


def _origin(tree: ast.Module, module: str, base: ast.expr) -> tuple[str, str] | None:
    """Where a base class is defined, if in this package."""
    if not isinstance(base, ast.Name):
        return None
    if any(isinstance(n, ast.ClassDef) and n.name == base.id for n in tree.body):
        return module, base.id
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("casemate"):
            for alias in node.names:
                if (alias.asname or alias.name) == base.id:
                    return str(node.module), alias.name
    return None


def _default(node: ast.expr, where: str) -> Any:
    """A literal, or a quotient of two such as 8 / 255."""
    try:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return ast.literal_eval(node.left) / ast.literal_eval(node.right)
        return ast.literal_eval(node)
    except (ValueError, TypeError, ZeroDivisionError):
        shown = ast.unparse(node)
        raise LookupError(f"{where}: the default {shown} must be a literal, or a quotient of two") from None


def _annotation(node: ast.expr, where: str) -> Any:
    """The type an annotation names: a word of `casemate.fields`, `Literal[...]`, `X | None`, or `tuple[X, ...]`."""
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Name) and node.id in VOCABULARY:
        return VOCABULARY[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _annotation(node.left, where), _annotation(node.right, where)
        return left | right if right is not None else left | None
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "Literal":
            return Literal[ast.literal_eval(node.slice)]
        if node.value.id == "tuple" and isinstance(node.slice, ast.Tuple):
            first, rest = node.slice.elts[0], node.slice.elts[1:]
            if len(rest) == 1 and isinstance(rest[0], ast.Constant) and rest[0].value is Ellipsis:
                return tuple[_annotation(first, where), ...]  # type: ignore[misc]
            return tuple[tuple(_annotation(e, where) for e in node.slice.elts)]  # type: ignore[misc]
    raise TypeError(f"{where}: field type {ast.unparse(node)!r} is not a word of casemate.fields")


# --- code as an input ---------------------------------------------------------------------------------------


@functools.cache
def code_hash(module: str) -> str:
    """A hash of what a module does: comments, docstrings and layout do not count."""
    return text_hash(_module_file(module).read_text())


def text_hash(source: str) -> str:
    """`code_hash` of Python source given as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:16]


def _dump(node: object) -> str:
    """`ast.dump` without what differs between Python versions: fields that are empty, and contexts."""
    if isinstance(node, ast.AST):
        parts = [f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if name not in ("ctx", "kind")]
        return f"{type(node).__name__}({', '.join(p for p in parts if not p.endswith(('=None', '=[]')))})"
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    return repr(node)
