"""The files that start training on clusters: they parse, fit one another, and name what there is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import yaml

from lotlip.core.compute import RendezvousLaunch, SlurmLaunch, TrainingCompute

INFRA = Path(__file__).parent.parent / "infra"


def launch_in(text: str) -> TrainingCompute:
    """What a comment says that params.yaml says."""
    (line,) = re.findall(r"compute: \{training: (\{.*?\}\})\}", text.replace("\n# ", " "))
    return TrainingCompute.model_validate(yaml.safe_load(line))


def test_the_slurm_job_is_shell_and_fits_its_launch():
    path = INFRA / "slurm" / "reproduce.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, flags=re.MULTILINE))
    config = launch_in(text)
    assert isinstance(config.launch, SlurmLaunch)
    assert config.launch.nodes == int(options["nodes"])
    assert config.processes == int(options["nodes"]) * int(options["gpus-per-node"])
    of_32 = yaml.safe_load((INFRA / "gpus" / "32.yaml").read_text(encoding="utf-8"))["compute"]["training"]
    assert (of_32["processes"], of_32["launch"]) == (config.processes, {"kind": "slurm", "nodes": 4})
    (module,) = re.findall(r"python -m (\S+)", text)
    assert importlib.util.find_spec(module)


def test_kubernetes_objects_fit_one_another_and_their_launch():
    text = (INFRA / "kubernetes" / "lotlip.yaml").read_text(encoding="utf-8")
    found = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert set(found) == {"Service", "PersistentVolumeClaim", "Job"}
    service, job = found["Service"], found["Job"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]

    config = launch_in(text)
    assert isinstance(config.launch, RendezvousLaunch)
    host, port = config.launch.endpoint.split(":")
    assert host == f"{name}-0.{service['metadata']['name']}"
    assert [entry["port"] for entry in service["spec"]["ports"]] == [int(port)]
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]
    assert config.launch.nodes == spec["completions"]
    assert config.processes == config.launch.nodes * container["resources"]["limits"]["nvidia.com/gpu"]

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["project"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"]
    (script,) = container["args"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    modules = re.findall(r"python -m (\w+(?:\.\w+)+)", script)
    assert modules == ["flows.reproduce", "flows.runtime.agent"]
    assert all(importlib.util.find_spec(module) for module in modules)
