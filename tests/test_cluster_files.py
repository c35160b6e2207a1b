"""The files under cluster/ hold against the schemas of what reads them, and against each other."""

import copy
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {
    requirement.name: requirement.specifier
    for requirement in map(Requirement, PROJECT["dependencies"])
}
LAUNCHED = ("onprem.yaml", "aws.yaml")
KUBERAY = {"raycluster.yaml": "rayclusters", "rayjob.yaml": "rayjobs"}


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = loaded(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


# -- schemas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_cluster_file_holds_against_the_schema_that_ray_ships(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(loaded(name)))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_misspelt_cluster_file_is_refused(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config({**loaded(name), "idle_timeout_minuts": 5})
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(config)


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_kuberay_file_holds_against_the_operators_schema(name: str, kind: str) -> None:
    """The CRDs are too large to keep here (2.3 MB): RLHF_RAY_KUBERAY_CRDS names their folder.

    They are ray-operator/config/crd/bases of KubeRay (Apache-2.0); held against those of 1.7.0.
    """
    folder = os.environ.get("RLHF_RAY_KUBERAY_CRDS")
    if folder is None:
        pytest.skip("RLHF_RAY_KUBERAY_CRDS is not set")
    definition = yaml.safe_load((Path(folder) / f"ray.io_{kind}.yaml").read_text(encoding="utf-8"))
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes checks that by itself
    jsonschema.Draft7Validator(schema).validate(loaded(name))


def closed(schema: Any) -> Any:
    """The schema, with unknown fields refused: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    open_ = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_:
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_has_groups_from_zero_a_gpu_and_the_shared_volume(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in spec["workerGroupSpecs"]:
        counts = [group[key] for key in ("replicas", "minReplicas", "maxReplicas")]
        assert counts[:2] == [0, 0]
        assert counts[2] > 0
    gpus = [container(g)["resources"]["limits"].get("nvidia.com/gpu") for g in groups(name)]
    assert gpus == [None, None, "1"]
    claim = loaded("storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(name):
        (mount,) = container(group)["volumeMounts"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert mount["name"] == volume["name"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert group["template"]["spec"]["restartPolicy"] == "Never"  # what autoscaler v2 wants


def test_cloud_workers_are_spot_and_start_from_zero() -> None:
    kinds = loaded("aws.yaml")["available_node_types"]
    head = kinds.pop(loaded("aws.yaml")["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]  # the driver runs there
    assert any(kind["resources"].get("GPU") for kind in kinds.values())
    for kind in kinds.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["min_workers"] == 0


# -- versions --------------------------------------------------------------------------------------


def images(name: str) -> list[str]:
    return re.findall(r"\S+/rlhf_ray:\S+", (CLUSTER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERAY, "reader.yaml", "README.md"])
def test_images_are_of_this_version_and_its_ray(name: str) -> None:
    found = images(name)
    assert found
    for image in found:
        match = re.search(r":([\d.]+)-ray([\d.]+)-(cpu|cuda)$", image)
        assert match is not None, image
        assert match[1] == PROJECT["version"]
        assert match[2] in REQUIRED["ray"]


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_version_of_kuberay_files_is_the_images(name: str) -> None:
    version = cluster_spec(name)["rayVersion"]
    assert version in REQUIRED["ray"]
    assert all(f"-ray{version}-" in image for image in images(name))


def test_dockerfile_pins_what_the_project_allows() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert pins["DEVICE"] == "cpu"
    assert pins["RAY_VERSION"] in REQUIRED["ray"]
    assert pins["TORCH_VERSION"] in REQUIRED["torch"]
    assert pins["TORCHVISION_VERSION"] in REQUIRED["torchvision"]
    bases = re.findall(
        r"^FROM rayproject/ray:\$\{RAY_VERSION\}-py(\d)(\d+)-(\w+) AS (\w+)$", text, re.M
    )
    assert [(device, stage) for *_, device, stage in bases] == [("cpu", "cpu"), ("gpu", "cuda")]
    for major, minor, *_ in bases:
        assert f"{major}.{minor}" in SpecifierSet(PROJECT["requires-python"])
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["cluster"])
    assert extra.specifier == REQUIRED["ray"]


def test_readme_names_only_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\bcluster/([\w.]+\w)", text):
        assert (CLUSTER / name).exists(), name


# -- security --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_cluster_file_has_token_authentication_on(name: str) -> None:
    config = loaded(name)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    (head,) = (c for c in config["head_start_ray_commands"] if "ray start" in c)
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_has_token_authentication_on(name: str) -> None:
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}
    for group in groups(name):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        assert "dashboard-host" not in group["rayStartParams"]
    for group in cluster_spec(name)["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_nothing_binds_to_all_interfaces_or_starts_without_a_token() -> None:
    for file in CLUSTER.iterdir():
        assert "0.0.0.0" not in file.read_text(encoding="utf-8"), file
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert "ENV RAY_AUTH_MODE=token" in dockerfile
    assert "AUTH_TOKEN=" not in dockerfile
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL):
        start = block.find("ray start")
        assert start < 0 or 0 <= block.find("RAY_AUTH_MODE=token") < start
    assert not re.search(r"RAY_AUTH_TOKEN=\S", readme)  # a file or a secret, never in a command
