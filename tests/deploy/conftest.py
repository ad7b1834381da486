"""A trained tiny teacher with its data, and an export of it."""

import pytest
from workspace import write_data

from exports import QUIET, Exported
from stillroom import export
from tiny import make_teacher


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("export")
    data = write_data(root / "data")
    make_teacher().save(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(root / "cache"))
        manifest = export(
            root / "model",
            root / "export",
            formats="onnx,onnx-int8,torch",
            dataset=str(data),
            console=QUIET,
        )
    return Exported(root / "model", data, root / "export", manifest)
