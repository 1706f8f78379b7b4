"""Files that start training on clusters are valid and consistent."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flows.runtime.supervisor import group
from lotlip.core.compute import RendezvousLaunch, SlurmLaunch, TrainingCompute

INFRA = Path(__file__).parent.parent / "infra"
KUBERNETES = INFRA / "kubernetes" / "lotlip.yaml"


def launch_in(text: str) -> TrainingCompute:
    """The settings for params.yaml that a comment states."""
    (line,) = re.findall(r"compute: \{training: (\{.*?\}\})\}", text.replace("\n# ", " "))
    return TrainingCompute.model_validate(yaml.safe_load(line))


def test_the_slurm_job_is_valid_and_matches_its_launch():
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


# The oldest version that infra/README.md names, and the newest one of the library.
VERSIONS = ("1.31", kubernetes_validate.latest_version())


def kubernetes() -> dict[str, Any]:
    """The manifests by kind."""
    documents = list(yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8")))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_follow_kubernetes_schemas(version: str):
    for document in kubernetes().values():
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [
        ("Job", "spec.template.spec.containers.0", "liveness"),
        ("Job", "spec.template.spec.containers.0.securityContext", "readOnlyRootFileSystem"),
        ("Job", "spec.template.spec", "restartpolicy"),
        ("NetworkPolicy", "spec", "policyType"),
        ("NetworkPolicy", "spec.egress.0.to.0", "podSelectors"),
        ("Service", "spec", "publishNotReadyAddress"),
        ("PersistentVolumeClaim", "spec", "accessMode"),
    ],
)
def test_a_misspelt_field_of_a_manifest_is_refused(kind: str, path: str, name: str):
    document = part = kubernetes()[kind]
    for key in path.split("."):
        part = part[int(key) if key.isdigit() else key]
    part[name] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match=rf"Additional properties .*'{name}' was unexpected"):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def check_confined(pod: dict[str, Any], environment: dict[str, str]) -> None:
    """Checks the rights and resources of a pod's only container, and that it can write its home and temporary files."""
    (container,) = pod["containers"]
    confined = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["securityContext"] == confined
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # the root is read-only
    written = {environment["HOME"], environment.get("TMPDIR", "/tmp"), "/tmp", container["workingDir"]}
    assert written <= {mount["mountPath"] for mount in container["volumeMounts"]}


def check_dns(rule: dict[str, Any]) -> None:
    """Checks that a rule of a NetworkPolicy allows only requests to the cluster's DNS server."""
    (server,) = rule["to"]
    assert set(server) == {"namespaceSelector", "podSelector"} and {port["port"] for port in rule["ports"]} == {53}


def test_pods_are_confined_and_reach_only_one_another_and_dns():
    by_kind = kubernetes()
    pod = by_kind["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_confined(pod, {entry["name"]: entry.get("value", "") for entry in container["env"]})
    policy = by_kind["NetworkPolicy"]["spec"]
    pods = {"matchLabels": by_kind["Service"]["spec"]["selector"]}
    assert policy["podSelector"] == pods and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert [rule["from"] for rule in policy["ingress"]] == [[{"podSelector": pods}]]
    own, dns = policy["egress"]
    assert own["to"] == [{"podSelector": pods}]
    check_dns(dns)


def filled_in(value: Any, variables: dict[str, Any]) -> Any:
    """A job template with the values of its variables, as Prefect fills it in."""
    if isinstance(value, dict):
        return {key: filled_in(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [filled_in(each, variables) for each in value]
    if isinstance(value, str) and (name := re.fullmatch(r"\{\{ (\w+) \}\}", value)):
        return variables[name[1]]
    return re.sub(r"\{\{ (\w+) \}\}", lambda name: str(variables[name[1]]), value) if isinstance(value, str) else value


def test_jobs_of_a_pool_are_valid_and_confined():
    template = yaml.safe_load((INFRA / "pools" / "kubernetes.yaml").read_text(encoding="utf-8"))
    variables = {name: each.get("default") for name, each in template["variables"]["properties"].items()}
    variables |= {"name": "trial", "command": ["prefect", "flow-run", "execute"]}
    filled = filled_in(template["job_configuration"], variables)
    job = filled["job_manifest"]
    policy = yaml.safe_load((INFRA / "kubernetes" / "pool.yaml").read_text(encoding="utf-8"))
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
        kubernetes_validate.validate(policy, version, strict=True)
    check_confined(job["spec"]["template"]["spec"], filled["env"])

    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert selected and selected.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"} and policy["spec"]["ingress"] == []
    team, dns = policy["spec"]["egress"]
    reached = {port for rule in team["ports"] for port in range(rule["port"], rule.get("endPort", rule["port"]) + 1)}
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
    published = {int(port.rsplit(":", 1)[1]) for port in compose["services"]["proxy"]["ports"]}
    assert published and reached == published | {22, 443}  # git
    check_dns(dns)


@pytest.mark.integration
def test_the_probes_tell_an_agent_that_waits_from_one_that_does_not(tmp_path: Path):
    """Runs the probes' command and the agent's as pod 1 does, with /tmp in a temporary folder."""
    (container,) = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    ((*shell, probe),) = {tuple(one["exec"]["command"]) for one in probes}
    (script,) = container["args"]
    heartbeat = tmp_path / "agent"
    assert "/tmp/agent" in probe and "/tmp/agent" in script
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def alive(index: int = 1) -> bool:
        command = [*shell, probe.replace("/tmp/agent", str(heartbeat))]
        done = subprocess.run(command, env={**environment, "JOB_COMPLETION_INDEX": str(index)}, check=False)
        return done.returncode == 0

    assert alive(index=0) and not alive()
    command = [*container["command"], script.replace("/tmp/agent", str(heartbeat))]
    environment |= {"JOB_COMPLETION_INDEX": "1", "PYTHONPATH": str(INFRA.parent)}
    with group(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        deadline = time.monotonic() + 120
        while not alive():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    assert alive()  # for another minute
    os.utime(heartbeat, (time.time() - 61,) * 2)
    assert not alive()


def test_kubernetes_objects_match_each_other_and_their_launch():
    by_kind = kubernetes()
    assert set(by_kind) == {"Service", "NetworkPolicy", "PersistentVolumeClaim", "Job"}
    service, job = by_kind["Service"], by_kind["Job"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]

    config = launch_in(KUBERNETES.read_text(encoding="utf-8"))
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
    assert claim == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    (script,) = container["args"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    modules = re.findall(r"python -m (\w+(?:\.\w+)+)", script)
    assert modules == ["flows.reproduce", "flows.runtime.agent"]
    assert all(importlib.util.find_spec(module) for module in modules)


def team() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))


def test_every_service_of_a_team_is_confined_and_has_a_health_check():
    services = team()["services"]
    published = {name for name, service in services.items() if "ports" in service}
    assert published == {"proxy"}
    assert all(port.startswith("${TEAM_BIND}:") for port in services["proxy"]["ports"])
    for name, service in services.items():
        assert service["user"] == "1000:1000" and service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["image"].endswith(":${TEAM_VERSION}"), name
        assert service["init"] != service["image"].startswith("lotlip:"), name  # that image has an init
        assert (service["restart"] == "on-failure") != ("healthcheck" in service), name
        for other, how in service.get("depends_on", {}).items():
            # podman cannot start a container that requires one that has ended and has requirements
            assert how["condition"] == "service_healthy" and "healthcheck" in services[other], name


def test_a_teams_secrets_are_files_and_each_service_mounts_only_its_own():
    file = team()
    for name, service in file["services"].items():
        assert "env_file" not in service, name  # podman-compose passes its values on the command line
        mounted = {secret.removesuffix(".env") for secret in service.get("secrets", []) if secret.endswith(".env")}
        assert len(mounted) <= 1, name
        words = " ".join(map(str, (*service["command"], *service.get("environment", {}).values())))
        assert not re.search("password|secret|PGPASS", words, re.IGNORECASE), name
        assert not any("local/secrets" in volume for volume in service.get("volumes", [])), name
    for secret in file["secrets"].values():
        assert secret["file"].startswith("local/secrets/")  # git ignores infra/local
    assert "/infra/local/" in (INFRA.parent / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.slow
def test_settings_and_secrets_of_a_team_are_private_and_kept_until_rotation(tmp_path: Path):
    local = tmp_path / "local"

    def init(*arguments: str) -> dict[str, str]:
        environment = {**os.environ, "TEAM_LOCAL": str(local)}
        subprocess.run(["bash", str(INFRA / "team/init.sh"), *arguments], env=environment, check=True)
        return {path.name: path.read_text(encoding="utf-8") for path in (local / "secrets").iterdir()}

    first = init("team.example.org")
    assert local.stat().st_mode & 0o777 == 0o700 and (local / "login").stat().st_mode & 0o777 == 0o600
    assert set(first) == set(team()["secrets"])
    assert "TEAM_HOST=team.example.org" in (local / "settings.env").read_text(encoding="utf-8")
    assert init() == first
    rotated = init("rotate")
    assert {name for name in first if rotated[name] != first[name]} == set(first) - {"tls.key", "tls.crt", "hosts.map"}
    done = subprocess.run(["bash", str(INFRA / "team/init.sh"), "a;b"], env={**os.environ, "TEAM_LOCAL": str(local)})
    assert done.returncode == 1
