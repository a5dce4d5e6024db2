"""Who may import whom: the direction of dependencies, walked over the syntax tree."""

import ast
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {
    "train",
    "engine",
    "losses",
    "models",
    "loaders",
    "eval",
    "data_prep",
    "studies",
    "benchmarks",
    "tests",
}
MAY_USE = {
    "losses": {"losses"},
    # A model is loaded, and exported, with the tokenizer of its texts and the transform of images.
    "models": {
        "models",
        "loaders.crops",
        "loaders.decoders",
        "loaders.errors",
        "loaders.specs",
        "loaders.tokenizers",
        "loaders.views",
    },
    "loaders": {"loaders"},
    "engine": {"engine", "losses", "models", "loaders"},
    "eval": {"eval", "models", "loaders", "engine.dist", "engine.launch"},
    "data_prep": {
        "data_prep",
        "loaders.arrays",
        "loaders.errors",
        "loaders.manifest",
        "loaders.plain_text",
        "loaders.progress",
        "loaders.specs",
        "loaders.tarreader",
    },
    # Commands are started as processes; what is imported reads configurations and result rows.
    "studies": {
        "studies",
        "engine.clock",
        "engine.config",
        "engine.config_file",
        "engine.identity",
        "engine.run_lock",
        "eval.report",
        "eval.rows",
        "eval.sources",
        "loaders.errors",
        "loaders.specs",
    },
}
# A room is a folder in a package; its parts are for the commands and shared files above it, and for
# the rooms that are listed here. The order of rooms has no way back.
ROOMS = {
    "data_prep.sets": set(),
    "data_prep.download": {"data_prep.sets"},
    "data_prep.archives": {"data_prep.sets", "data_prep.download"},
    "data_prep.checks": {"data_prep.sets", "data_prep.download"},
    "data_prep.clipart": set(),
    "eval.sources": set(),
    "eval.tasks": {"eval.sources"},
    "eval.report": {"eval.sources", "eval.tasks"},
    "eval.detector": {"eval.tasks"},
    "models.formats": set(),
}
# Rooms that serve another package: studies name sets and draw tables as evaluation does.
SERVE = {"eval.sources": {"studies"}, "eval.report": {"studies"}}
FOREIGN = {  # beyond the standard library
    "losses": {"torch", "triton"},  # Triton comes with torch for GPUs
    "models": {"torch", "timm", "transformers", "safetensors", "yaml", "PIL", "huggingface_hub"},
    "loaders": {
        "numpy",
        "PIL",
        "simplejpeg",
        "torch",
        "torchvision",
        "timm",
        "tqdm",
        "transformers",
        "ftfy",
        "tokenizers",
    },
    "studies": {"numpy", "omegaconf", "safetensors", "scipy"},
}
# Names that would hide an installed package when train.py puts this folder first on the path.
SHADOWS = {"datasets", "tokenizers", "accelerate", "wandb", "timm", "torch", "transformers"}


def imports(path):
    """(module, line) of every import in a file, late ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if (
                node.module.split(".")[0] in OURS
                and (ROOT / node.module.replace(".", "/")).is_dir()
            ):
                yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)
            else:
                yield node.module, node.lineno


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def allowed(module, names):
    return any(module == name or module.startswith(name + ".") for name in names)


def test_import_directions():
    wrong = []
    for package, may in MAY_USE.items():
        for path in files(package):
            for module, line in imports(path):
                if module.split(".")[0] in OURS and not allowed(module, may):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_foreign_packages_stay_where_they_belong():
    wrong = []
    for package in MAY_USE:
        for path in files(package):
            for module, line in imports(path):
                top = module.split(".")[0]
                if top in OURS or top in sys.stdlib_module_names:
                    continue
                where = f"{path.relative_to(ROOT)}:{line} imports {module}"
                if top == "deepspeed" and package != "engine":
                    wrong.append(where)
                # One source of evaluation sets is torchvision's own readers.
                torchvision = top == "torchvision" and path.stem.startswith("elevater")
                if package == "data_prep" and top in ("torch", "torchvision", "timm"):
                    wrong += [] if torchvision else [where]
                if package in FOREIGN and top not in FOREIGN[package]:
                    wrong.append(where)
    assert not wrong, "\n".join(wrong)


@functools.cache
def graph():
    """Module -> modules of ours that it imports, with late imports and those for types alone."""
    modules = {}
    for package in MAY_USE:
        for path in files(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    edges = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # of a module, or from one
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in modules else node.module for name in names}
        edges[module] = (found & modules.keys()) - {module}
    return edges


def test_nothing_imports_in_a_circle():
    edges, state = graph(), {}

    def visit(module, way):
        state[module] = "open"
        for other in sorted(edges[module]):
            assert state.get(other) != "open", " -> ".join([*way, module, other])
            if other not in state:
                visit(other, [*way, module])
        state[module] = "done"

    for module in sorted(edges):
        if module not in state:
            visit(module, [])


def room_of(module):
    """The room that a part is in; None for what lies above all rooms."""
    return next((room for room in ROOMS if module.startswith(room + ".")), None)


def test_parts_are_imported_by_their_commands_and_the_rooms_that_may():
    folders = {
        f"{package}.{path.parent.name}"
        for package in MAY_USE
        for path in files(package)
        if path.parent.parent == ROOT / package
    }
    assert folders == ROOMS.keys()
    wrong = []
    for module, others in graph().items():
        for other in others:
            own, room = room_of(module), room_of(other)
            if room is None:  # what lies above rooms may serve them, say `eval.rows`
                continue
            package = module.split(".")[0]
            if package in SERVE.get(room, ()):
                continue
            inside = package == other.split(".")[0]
            if not inside or (own not in (None, room) and room not in ROOMS[own]):
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_engine_for_evaluation_needs_no_deepspeed():
    assert not any("deepspeed" in module for module, _ in imports(ROOT / "engine" / "dist.py"))


def test_what_launchers_say_needs_no_torch():
    found = {module.split(".")[0] for module, _ in imports(ROOT / "engine" / "launch.py")}
    assert found <= {"loaders", *sys.stdlib_module_names}


def test_no_name_hides_a_dependency():
    assert not SHADOWS & {path.stem for path in ROOT.iterdir()}


def test_manifest_needs_neither_torch_nor_pil():
    reached, queue = set(), ["loaders.manifest"]
    while queue:
        module = queue.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in reached or not path.exists():
            continue
        reached.add(module)
        for name, _ in imports(path):
            assert name.split(".")[0] not in ("torch", "PIL", "torchvision"), f"{module}: {name}"
            queue.append(
                name
                if (ROOT / (name.replace(".", "/") + ".py")).exists()
                else name.rpartition(".")[0]
            )


def test_files_stay_short():
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for package in [*OURS - {"train"}]
        for path in files(package)
        if (count := len(path.read_text().splitlines())) > 400
    ]
    assert not long, "\n".join(long)
