"""The README's own example, run as it stands there."""

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "__main__" in block)


@pytest.mark.usefixtures("ray_session")
def test_readme_own_suite_runs_to_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = example().replace("episodes=24", "episodes=6")
    (tmp_path / "sensors.py").write_text(source, encoding="utf-8")
    found = runpy.run_path("sensors.py", run_name="__main__")
    shown = capsys.readouterr().out
    assert "starting Ray" in shown  # progress
    tables = shown[shown.index("   trial") :]
    assert "full_best" in tables and "cost_mean" in tables and "..." not in tables
    assert max(map(len, tables.splitlines())) <= 80
    assert found["result"].finished
    assert len(found["result"].table()) == 2
    assert found["result"].best_policy.levels == ("features", "head")


def test_readme_names_only_modules_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    tree = text[text.index("## Where things are") :]
    package = {path.stem for path in (README.parent / "rlhf_ray").rglob("*.py")} - {
        "__init__",
        "__main__",
    }
    missing = {name for name in package if not re.search(rf"\b{name}\b", tree)}
    assert not missing
