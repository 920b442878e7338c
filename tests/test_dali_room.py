"""In a checkout the DALI modules have one name, whatever the user's own folder holds."""

import subprocess
import sys
from pathlib import Path

from avion_dali.assembly.dali_room import pipelines_module
from pipelines import support

ROOT = Path(__file__).parents[1]
# The checkout is searched last, as after `pip install --editable`.
IN_A_FOREIGN_FOLDER = """
import sys
sys.path.append(sys.argv[1])
from avion_dali.assembly.dali_room import pipelines_module
support = pipelines_module("support")
print(support.__name__, support.__file__, set(support.cpu_codec_support().values()))
"""


def test_a_checkout_has_one_identity_of_each_module() -> None:
    assert pipelines_module("support") is support
    assert Path(support.__file__) == ROOT / "pipelines" / "support.py"


def test_a_users_package_of_the_same_name_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise RuntimeError('the package of the user')\n")
    command = [sys.executable, "-c", IN_A_FOREIGN_FOLDER, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["pipelines.support", support.__file__, "{'works'}"], done
