"""The package and the scripts as a whole: imports, flags, help, house rules."""

import argparse
import ast
import importlib
import subprocess
import sys

import pytest
from helpers import GOLDEN, REPO, read_json

SCRIPTS = ["download_glue.py", "prepare_data.py", "get_bert_models.py",
           "pregenerate_training_data.py", "general_distill.py", "data_augmentation.py",
           "fix_teacher_layers.py", "finetune_teacher.py", "task_distill.py",
           "tinybert_6_from_bert.py", "quantize.py", "export_model.py", "predict.py", "report.py",
           "pretrain_bert.py"]
# Compute nothing: their `--help` must not wait for torch.
WITHOUT_TORCH = ["download_glue.py", "prepare_data.py"]
PACKAGE = sorted(REPO.glob("transformer/*.py"))
K_PRUNE = "K-prune/src/main.py"
SOURCES = [*(REPO / script for script in SCRIPTS), *PACKAGE, *sorted(REPO.glob("K-prune/**/*.py"))]
TYPES = {"str": str, "int": int, "float": float, "Path": "Path"}
FLAGS = [(script, flag) for script, flags in read_json(GOLDEN / "cli_flags.json").items()
         for flag in flags if script in (*SCRIPTS, K_PRUNE)]


def tree(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def import_in_process(code: str, folder=REPO) -> str:
    """Run code on the repository's modules in a process of its own; returns its output."""
    code = f"import importlib, logging, sys; sys.path.insert(0, {str(REPO)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=folder, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    sys.path.insert(0, str(REPO / "K-prune" / "src"))
    modules = {script: script.removesuffix(".py") for script in SCRIPTS} | {K_PRUNE: "main"}
    return {script: importlib.import_module(name).get_args_parser()
            for script, name in modules.items()}


# ------------------------------------------------------------------ imports


def imported_names(module: ast.Module) -> set[str]:
    """Return every name that may be an imported module, whole and with what is imported of it."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(("root", "folders"), [
    (".", ("", "transformer", "benchmarks", "demo", "driver")),
    ("K-prune/src", ("", "dataset", "evaluate", "utils")),
])
def test_there_is_no_import_cycle(root, folders):
    paths = {".".join(path.relative_to(REPO / root).with_suffix("").parts): path
             for folder in folders for path in (REPO / root / folder).glob("*.py")}
    remaining = {name: imported_names(tree(path)) & paths.keys() for name, path in paths.items()}
    while leaves := [name for name, needed in remaining.items() if not needed & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert not remaining, "these import each other"


def test_no_module_of_the_package_and_no_script_imports_a_script_or_a_test():
    scripts = {path.stem for path in REPO.glob("*.py")}
    tests = {"tests", *(path.stem for path in REPO.glob("tests/*.py"))}
    for path in SOURCES:
        assert not imported_names(tree(path)) & (tests | scripts - {path.stem}), path


@pytest.mark.parametrize("script", WITHOUT_TORCH)
def test_a_script_that_computes_nothing_imports_no_torch(script):
    name = script.removesuffix(".py")
    assert "torch" not in import_in_process(f"import {name}; print(*sys.modules)").split()


def test_importing_everything_parses_nothing_logs_nothing_and_touches_no_device(tmp_path):
    names = [f"transformer.{path.stem}" for path in PACKAGE if path.stem != "__init__"]
    names += [script.removesuffix(".py") for script in SCRIPTS]
    assert import_in_process(f"""
sys.argv = ["x", "--no_such_flag"]
handlers = list(logging.getLogger().handlers)
for name in {names!r}:
    importlib.import_module(name)
import torch
assert logging.getLogger().handlers == handlers, "a log handler was set up"
assert not torch.cuda.is_initialized(), "a device was touched"
assert "transformers" not in sys.modules, "the Hugging Face library is for tests only"
""", tmp_path) == ""
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize(("script", "flag"), FLAGS,
                         ids=[f"{s} {f['flags'][0]}" for s, f in FLAGS])
def test_every_flag_of_the_original_exists_with_its_type_and_default(parsers, script, flag):
    actions = {name: a for a in parsers[script]._actions for name in a.option_strings}
    assert set(flag["flags"]) <= set(actions), "a name is missing"
    action = actions[flag["flags"][0]]
    assert all(actions[name] is action for name in flag["flags"])
    if flag.get("action"):
        assert action.const is True and action.default is False
        return
    if "type" in flag:
        found = action.type or str
        assert found is TYPES[flag["type"]] or found.__name__ == flag["type"]
    # Where the original wants a value, one may be found without it: a task by its folder.
    assert not action.required or flag.get("required") == "True"
    if "default" in flag:
        assert action.default == ast.literal_eval(flag["default"])
    if "choices" in flag and action.choices:
        assert set(ast.literal_eval(flag["choices"])) <= set(action.choices)


def test_all_scripts_of_the_original_are_there():
    assert all((REPO / script).is_file() for script in SCRIPTS)
    assert {name for name in read_json(GOLDEN / "cli_flags.json") if "/" not in name} <= set(
        SCRIPTS)


@pytest.mark.parametrize("script", [*SCRIPTS, K_PRUNE])
def test_every_flag_has_a_help_text_that_names_units_and_help_prints_defaults(parsers, script):
    parser = parsers[script]
    assert parser.formatter_class is argparse.ArgumentDefaultsHelpFormatter
    text = parser.format_help()
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS, action.option_strings
        assert action.option_strings[0] in text
        if action.type in (int, float):
            assert len(action.help.split()) >= 2, action.option_strings


@pytest.mark.parametrize("script", ["task_distill.py", "general_distill.py",
                                    "finetune_teacher.py"])
def test_every_training_script_has_precision_seed_and_overwrite(parsers, script):
    actions = {name: a for a in parsers[script]._actions for name in a.option_strings}
    assert set(actions["--precision"].choices) >= {"auto", "fp32", "bf16"}
    assert actions["--seed"].default == 42
    assert actions["--overwrite_output_dir"].default is False


# ------------------------------------------------------------------ house rules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_run_script_ends_the_process_and_no_except_is_bare(path):
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), node.lineno
        if isinstance(node, ast.FunctionDef) and node.name != "run_script":
            code = ast.unparse(node)
            assert not any(end in code for end in ("sys.exit(", "os._exit(", "SystemExit("))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_docstring_with_its_command_parser_main_and_guard(script):
    module = tree(REPO / script)
    assert f"python {script}" in ast.get_docstring(module)
    functions = {n.name for n in module.body if isinstance(n, ast.FunctionDef)}
    assert {"get_args_parser", "main"} <= functions
    guard = ast.unparse(module.body[-1])
    assert guard.startswith("if __name__ == '__main__':\n")
    assert guard.endswith("run_script(main, get_args_parser())") and guard.count("\n") == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_modules_and_public_functions_of_the_package_are_documented_and_name_no_machine(path):
    module, text = tree(path), path.read_text(encoding="utf-8")
    assert ast.get_docstring(module)
    if path in PACKAGE:
        assert not [n.name for n in module.body if isinstance(n, ast.FunctionDef)
                    and not n.name.startswith("_") and not ast.get_docstring(n)]
    for wrong in ("/work/", "/tmp/", "/home/", "/root/", "../shared"):
        assert wrong not in text
