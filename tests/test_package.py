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
           "tinybert_6_from_bert.py", "quantize.py", "predict.py"]
# Scripts that compute nothing; their `--help` must not wait for torch.
WITHOUT_TORCH = ["prepare_data"]
PACKAGE = sorted(path.stem for path in (REPO / "transformer").glob("*.py")
                 if path.stem != "__init__")
TYPES = {"str": str, "int": int, "float": float, "Path": "Path"}
FLAGS = [(script, flag) for script, flags in read_json(GOLDEN / "cli_flags.json").items()
         for flag in flags if (REPO / script).is_file() and "/" not in script]
SOURCES = [REPO / script for script in SCRIPTS] + sorted((REPO / "transformer").glob("*.py"))


def tree(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parser_of(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(script.removesuffix(".py")).get_args_parser()


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    return {script: parser_of(script) for script in SCRIPTS}


# ------------------------------------------------------------------ the package


def imports() -> dict[str, set[str]]:
    """Return for each module of the repository the modules of the repository that it imports."""
    paths = {".".join(path.relative_to(REPO).with_suffix("").parts): path
             for folder in (".", "transformer", "demo", "driver")
             for path in (REPO / folder).glob("*.py")}
    return {name: {found for found in imported_names(tree(path)) if found in paths}
            for name, path in paths.items()}


def imported_names(module: ast.Module) -> set[str]:
    """Return every name that may be an imported module, whole and with what is imported of it."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_there_is_no_import_cycle():
    remaining = imports()
    while leaves := [name for name, needed in remaining.items() if not needed & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert not remaining, "these import each other"


def test_no_module_of_the_package_and_no_script_imports_a_script_or_a_test():
    scripts = {path.stem for path in REPO.glob("*.py")}
    tests = {path.stem for path in (REPO / "tests").glob("*.py")} | {"tests"}
    for path in [*REPO.glob("*.py"), *REPO.glob("transformer/*.py"), *REPO.glob("K-prune/**/*.py")]:
        names = imported_names(tree(path))
        assert not names & (tests | scripts - {path.stem})


@pytest.mark.parametrize("script", WITHOUT_TORCH)
def test_a_script_that_computes_nothing_imports_no_torch(script):
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import {script}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True)
    assert "torch" not in result.stdout.split()


def test_importing_everything_parses_nothing_logs_nothing_and_touches_no_device(tmp_path):
    names = [f"transformer.{name}" for name in PACKAGE] + [s.removesuffix(".py") for s in SCRIPTS]
    code = f"""
import importlib, logging, sys
sys.path.insert(0, {str(REPO)!r})
sys.argv = ["x", "--no_such_flag"]
handlers = list(logging.getLogger().handlers)
for name in {names!r}:
    importlib.import_module(name)
import torch
assert logging.getLogger().handlers == handlers, "a log handler was set up"
assert not torch.cuda.is_initialized(), "a device was touched"
assert "transformers" not in sys.modules, "the Hugging Face library is for tests only"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize(("script", "flag"), FLAGS,
                         ids=[f"{s} {f['flags'][0]}" for s, f in FLAGS])
def test_every_flag_of_the_original_exists_with_its_type_and_default(parsers, script, flag):
    actions = {name: a for a in parsers[script]._actions for name in a.option_strings}
    assert set(flag["flags"]) <= set(actions), "a name is missing"
    action = actions[flag["flags"][0]]
    assert all(actions[name] is action for name in flag["flags"])
    if flag.get("action") == "'store_true'":
        assert isinstance(action, argparse._StoreTrueAction)
        assert action.default is False
        return
    if "type" in flag:
        found = action.type or str
        assert found is TYPES[flag["type"]] or found.__name__ == flag["type"]
    assert action.required == (flag.get("required") == "True")
    if "default" in flag:
        assert action.default == ast.literal_eval(flag["default"])


def test_all_scripts_of_the_original_are_there():
    assert all((REPO / script).is_file() for script in SCRIPTS)
    named = set(read_json(GOLDEN / "cli_flags.json"))
    assert {name for name in named if "/" not in name} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_and_help_prints_defaults(parsers, script):
    parser = parsers[script]
    assert parser.formatter_class is argparse.ArgumentDefaultsHelpFormatter
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS, action.option_strings
    text = parser.format_help()
    for action in parser._actions:
        assert action.option_strings[0] in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_unit_of_every_number(parsers, script):
    for action in parsers[script]._actions:
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


def calls(node: ast.AST):
    return (n for n in ast.walk(node) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_exit_inside_functions_and_no_bare_except(path):
    module = tree(path)
    assert not [n.lineno for n in ast.walk(module)
                if isinstance(n, ast.ExceptHandler) and n.type is None]
    if path.name == "runtime.py":
        return  # run_script ends the process, nothing else does
    for call in calls(module):
        name = ast.unparse(call.func)
        assert name not in ("exit", "quit", "sys.exit", "os._exit"), f"line {call.lineno}"
    raised = [ast.unparse(n.exc) for n in ast.walk(module) if isinstance(n, ast.Raise) and n.exc]
    assert not [text for text in raised if text.startswith("SystemExit")]


def test_only_run_script_ends_the_process():
    for node in ast.walk(tree(REPO / "transformer" / "runtime.py")):
        if isinstance(node, ast.FunctionDef) and node.name != "run_script":
            assert not [c for c in calls(node) if ast.unparse(c.func) == "sys.exit"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_docstring_with_its_command_parser_main_and_guard(script):
    module = tree(REPO / script)
    assert f"python {script}" in ast.get_docstring(module)
    functions = {n.name for n in module.body if isinstance(n, ast.FunctionDef)}
    assert {"get_args_parser", "main"} <= functions
    assert ast.unparse(module.body[-1]) == (
        "if __name__ == '__main__':\n    run_script(main, get_args_parser())")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_module_class_and_public_function_of_a_module_is_documented(path):
    module = tree(path)
    assert ast.get_docstring(module)
    public = [n for n in module.body if isinstance(n, ast.FunctionDef)
              and not n.name.startswith("_") and n.name not in ("main", "get_args_parser")]
    if path.parent.name == "transformer":
        missing = [n.name for n in public if not ast.get_docstring(n)]
        assert not missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_path_of_a_developers_machine_is_in_the_code(path):
    text = path.read_text(encoding="utf-8")
    for wrong in ("/work/", "/tmp/", "/home/", "/root/", "../shared"):
        assert wrong not in text
