"""deploy/ is consistent with itself, with the defaults, and with what really runs."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import yaml_subset
from coordinators import CoordinatorProcess
from deployed import (
    DEPLOY,
    DOCKERFILES,
    GRPC_PORT,
    METRICS_PORT,
    RENDEZVOUS_PORT,
    ROOT,
    USER,
    run,
)

from dtruntime import CheckpointManager
from dtruntime.ranks import launch

if TYPE_CHECKING:
    from pathlib import Path

KUBERNETES = DEPLOY / "kubernetes"
MONITORING = DEPLOY / "monitoring"


def yaml_of(path: Path) -> Any:
    return yaml_subset.document(path.read_text())


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def walk(value: Any) -> Any:
    """Return a value with every dict and list in it."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from walk(item)


# Files


@pytest.mark.parametrize(
    "path",
    sorted(p for p in DEPLOY.rglob("*") if p.suffix in {".yaml", ".yml", ".json"}),
    ids=lambda path: str(path.relative_to(DEPLOY)),
)
def test_every_file_parses(path):
    if path.suffix == ".json":
        assert json_of(path)
    else:
        assert all(yaml_subset.documents(path.read_text()))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "a: 1\nb: [x, 2]\nc:\n- d: e f\n  g: 'h'\n- i\n",
            {"a": 1, "b": ["x", 2], "c": [{"d": "e f", "g": "h"}, "i"]},
        ),
        ("# no\na: |\n  b\n   c\nd: >-\n  e\n  f\n", {"a": "b\n c\n", "d": "e f"}),
        (
            "x: &x\n  a: 1\n  b: 2\ny:\n  <<: *x\n  b: 3\n",
            {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}},
        ),
        ("A::B: {{ c }}\n", None),
        ("a: b: c\n", None),
        ("a: yes\n", None),
        ("a: 1\n b: 2\n", None),
        ("a: 1\na: 2\n", None),
        ("a: *b\n", None),
        ("a:\t1\n", None),
    ],
)
def test_the_yaml_reader_refuses_what_it_does_not_support(text, value):
    if value is None:
        with pytest.raises(yaml_subset.NotYamlError):
            yaml_subset.document(text)
    else:
        assert yaml_subset.document(text) == value


# The coordinator's settings


def check_config(text: str, folder: Path) -> None:
    (folder / "coordinator.toml").write_text(text)
    result = run("coordinator", "check-config", cwd=folder)
    assert (result.returncode, result.stdout) == (0, "the configuration is right\n"), result.stderr


def printed_config(file: Path) -> dict[str, str]:
    """Return what is set, by section and key."""
    text = run("coordinator", "--config", file, "--print-config").stdout
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, value = line.split(" = ", 1)
            found[f"{section}.{name}"] = value.split("  # ")[0]
    return found


def test_the_sample_configuration_is_valid_with_and_without_its_comments(tmp_path):
    text = (DEPLOY / "coordinator.toml").read_text()
    check_config(text, tmp_path)
    storage = re.sub(r'^# (?=(backend|bucket|region|path) = ")', "", text, flags=re.MULTILINE)
    assert storage.count("\nbackend = ") == 1
    check_config(storage, tmp_path)
    (tmp_path / "tokens").write_text("operators-0123456789\n")
    check_config(storage.replace('# token = "/etc/dtruntime/', f'token = "{tmp_path}/'), tmp_path)


def test_kubernetes_has_the_values_of_the_sample(tmp_path):
    [config] = [
        d for d in manifests() if d["kind"] == "ConfigMap" and "coordinator.toml" in d["data"]
    ]
    file = tmp_path / "of-kubernetes.toml"
    file.write_text(config["data"]["coordinator.toml"])
    here = printed_config(file)
    there = printed_config(DEPLOY / "coordinator.toml")
    assert {k: v for k, v in there.items() if not k.startswith("dataset.")} == here


def test_ports_are_the_defaults():
    text = run("coordinator", "--print-config", cwd="/").stdout
    assert f'address = "127.0.0.1:{GRPC_PORT}"' in text
    assert f'metrics_address = "0.0.0.0:{METRICS_PORT}"' in text
    coordinator, worker = (path.read_text() for path in DOCKERFILES)
    assert f"\nEXPOSE {GRPC_PORT} {METRICS_PORT}\n" in coordinator
    assert f'\nCMD ["0.0.0.0:{GRPC_PORT}"]\n' in coordinator
    assert f"\nEXPOSE {RENDEZVOUS_PORT}\n" in worker
    assert f"MASTER_PORT:-{RENDEZVOUS_PORT}" in (DEPLOY / "dt-launch").read_text()


# Kubernetes


def manifests() -> list[dict[str, Any]]:
    found = []
    for path in sorted(KUBERNETES.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            found += yaml_subset.documents(path.read_text())
    return found


def named(kind: str, name: str) -> dict[str, Any]:
    [one] = [d for d in manifests() if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return one


WORKLOADS = [("Deployment", "coordinator"), ("StatefulSet", "worker")]


def pod_of(kind: str, name: str) -> dict[str, Any]:
    return named(kind, name)["spec"]["template"]


def container_of(kind: str, name: str) -> dict[str, Any]:
    [container] = pod_of(kind, name)["spec"]["containers"]
    return container


def environment_of(kind: str, name: str) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container_of(kind, name)["env"]}


def test_manifests_have_their_versions():
    versions = {
        "ConfigMap": "v1",
        "Deployment": "apps/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "PersistentVolumeClaim": "v1",
        "PodDisruptionBudget": "policy/v1",
        "Service": "v1",
        "ServiceAccount": "v1",
        "StatefulSet": "apps/v1",
    }
    for document in manifests():
        assert document["apiVersion"] == versions[document["kind"]]
    names = [(d["kind"], d["metadata"]["name"]) for d in manifests()]
    assert len(names) == len(set(names))


def test_kustomization_names_every_file():
    kustomization = yaml_of(KUBERNETES / "kustomization.yaml")
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    images = {container_of(*workload)["image"].split(":")[0] for workload in WORKLOADS}
    assert {image["name"] for image in kustomization["images"]} == images


@pytest.mark.parametrize(("kind", "name"), WORKLOADS)
def test_selectors_match_labels(kind, name):
    labels = pod_of(kind, name)["metadata"]["labels"]
    selecting = [
        named(kind, name)["spec"]["selector"]["matchLabels"],
        named("Service", name)["spec"]["selector"],
        named("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"],
        named("NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selecting:
        assert selector.items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container_of(kind, name)["ports"]}
    for port in named("Service", name)["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]


@pytest.mark.parametrize(("kind", "name"), WORKLOADS)
def test_pods_are_not_root_and_refer_to_existing_objects(kind, name):
    pod, container = pod_of(kind, name)["spec"], container_of(kind, name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"requests", "limits"} <= set(container["resources"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    templates = named(kind, name)["spec"].get("volumeClaimTemplates", [])
    known = set(volumes) | {template["metadata"]["name"] for template in templates}
    assert {mount["name"] for mount in container["volumeMounts"]} == known
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        if "configMap" in volume:
            named("ConfigMap", volume["configMap"]["name"])
    for source in container.get("envFrom", []):
        named("ConfigMap", source["configMapRef"]["name"])
    token = environment_of(kind, name)["COORDINATOR_TOKEN"]["secretKeyRef"]
    assert (
        f"kubectl create secret generic {token['name']} --from-literal={token['key']}="
        in (DEPLOY / "README.md").read_text()
    )


def test_there_is_one_coordinator_with_persistent_state():
    spec = named("Deployment", "coordinator")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    container = container_of("Deployment", "coordinator")
    image = DOCKERFILES[0].read_text()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f'\nVOLUME ["{mounts["state"]}"]\n' in image
    assert f"\nENV STATE_DIRECTORY={mounts['state']}\n" in image
    assert f"{mounts['config']}/coordinator.toml" in container["args"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == GRPC_PORT
    annotations = pod_of("Deployment", "coordinator")["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(METRICS_PORT)
    # Longer than its drain.
    drain = re.search(r"DRAIN: Duration = Duration::from_secs\((\d+)\)", server_source())
    assert drain
    grace = pod_of("Deployment", "coordinator")["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(drain[1])


def server_source() -> str:
    return (ROOT / "coordinator" / "src" / "server.rs").read_text()


def test_the_service_that_probes_ask_for_is_the_one_that_ends_first():
    probe = container_of("Deployment", "coordinator")["readinessProbe"]["grpc"]
    assert probe["service"] == "dtruntime.v1.Membership"
    assert "set_not_serving::<MembershipServer" in server_source()


def test_workers_find_the_coordinator_and_each_other():
    environment = environment_of("StatefulSet", "worker")
    spec = named("StatefulSet", "worker")["spec"]
    assert environment["COORDINATOR_URL"] == f"http://coordinator:{GRPC_PORT}"
    [grpc] = [p for p in named("Service", "coordinator")["spec"]["ports"] if p["name"] == "grpc"]
    assert grpc["port"] == GRPC_PORT
    assert spec["podManagementPolicy"] == "Parallel"
    service = named("Service", spec["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert environment["MASTER_ADDR"] == f"worker-0.{spec['serviceName']}"
    assert environment["WORLD_SIZE"] == str(spec["replicas"])
    assert environment["RANK"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    ranks = {"RANK": "worker-3", "WORLD_SIZE": environment["WORLD_SIZE"]}
    assert launch.rank_and_world_size(None, None, ranks) == (3, 4)
    named("ServiceAccount", spec["template"]["spec"]["serviceAccountName"])
    # Longer than the save's deadline and torchrun's timeout.
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 30
    [claim] = spec["volumeClaimTemplates"]
    classes = yaml_subset.documents((DEPLOY / "aws" / "storage-class.yaml").read_text())
    default, fast = classes
    assert claim["spec"]["storageClassName"] == fast["metadata"]["name"]
    # The coordinator's claim names none.
    assert "storageClassName" not in named("PersistentVolumeClaim", "coordinator-state")["spec"]
    is_default = "storageclass.kubernetes.io/is-default-class"
    assert default["metadata"]["annotations"] == {is_default: "true"}
    args = container_of("StatefulSet", "worker")["args"]
    mentioned = set(re.findall(r"\$\((\w+)\)", " ".join(args)))
    assert mentioned <= set(named("ConfigMap", "worker")["data"])


def test_the_network_policy_lets_in_workers_and_prometheus_only():
    [workers, prometheus] = named("NetworkPolicy", "coordinator")["spec"]["ingress"]
    labels = pod_of("StatefulSet", "worker")["metadata"]["labels"]
    [source] = workers["from"]
    assert source["podSelector"]["matchLabels"].items() <= labels.items()
    assert [port["port"] for port in workers["ports"]] == [GRPC_PORT]
    assert [port["port"] for port in prometheus["ports"]] == [METRICS_PORT]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_renders_the_kustomization():
    result = run("kubectl", "kustomize", KUBERNETES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nkind: ") == len(manifests())


# Compose


def compose() -> dict[str, Any]:
    return yaml_of(DEPLOY / "compose.yaml")


def test_compose_refers_only_to_what_it_defines():
    file = compose()
    services = file["services"]
    workers = [name for name in services if name.startswith("worker-")]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in file["volumes"] or (DEPLOY / source).exists(), volume
        for dependency in service.get("depends_on", []):
            assert dependency in services
        build = service.get("build")
        if build:
            assert (DEPLOY / build["context"]).resolve() == ROOT
            text = (ROOT / build["dockerfile"]).read_text()
            assert all(f"\nARG {argument}=" in text for argument in build.get("args", {}))
        for option in service.get("security_opt", []):
            if option.startswith("seccomp="):
                assert (DEPLOY / option.removeprefix("seccomp=")).exists()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine"
        for value in service.get("environment", {}).values():
            url = re.fullmatch(r"http://([\w-]+):(\d+)", str(value))
            assert url is None or url[1] in services
    for number, name in enumerate(sorted(workers)):
        environment = services[name]["environment"]
        assert environment["RANK"] == str(number)
        assert environment["WORLD_SIZE"] == str(len(workers))
        assert environment["MASTER_ADDR"] == "worker-0"
        assert environment["COORDINATOR_URL"] == f"http://coordinator:{GRPC_PORT}"
        assert services[name]["hostname"] == name


def test_seccomp_lets_io_uring_through_and_little_else():
    profile = json_of(DEPLOY / "seccomp-io-uring.json")
    refused = {name for rule in profile["syscalls"] for name in rule["names"]}
    assert all(rule["action"] == "SCMP_ACT_ERRNO" for rule in profile["syscalls"])
    assert not [name for name in refused if name.startswith("io_uring")]
    dangerous = {
        "mount",
        "bpf",
        "ptrace",
        "init_module",
        "kexec_load",
        "keyctl",
        "setns",
        "unshare",
    }
    assert dangerous <= refused
    flags = {rule["args"][0]["value"] for rule in profile["syscalls"] if rule["names"] == ["clone"]}
    assert sum(flags) == 0x7E020000, "every namespace"


# Monitoring


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Return a coordinator's metrics, each with its labels, while a job has a checkpoint."""
    process = CoordinatorProcess(tmp_path_factory.mktemp("coordinator"))
    process.start()
    store = tmp_path_factory.mktemp("store")

    def save(rank: int) -> None:
        place = {"rank": rank, "world_size": 2, "coordinator_url": process.url}
        with CheckpointManager(store, agreement_timeout=30, **place) as manager:
            manager.save({"rank": rank}, step=1)

    with ThreadPoolExecutor() as ranks:
        list(ranks.map(save, range(2)))
    text = process.page("metrics")
    process.end()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        kind = re.match(r"# TYPE (\w+) (\w+)", line)
        if kind:
            suffixes = ("_bucket", "_sum", "_count") if kind[2] == "histogram" else ("",)
            found |= {kind[1] + suffix: set() for suffix in suffixes}
        elif not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            found[name] |= set(re.findall(r'(\w+)="', line))
    return found


METRIC = re.compile(r"\b((?:coordinator|checkpoint|shard)_\w+)")


def expressions() -> list[str]:
    rules = [r for g in yaml_of(MONITORING / "alerts.yml")["groups"] for r in g["rules"]]
    dashboard = json_of(MONITORING / "grafana" / "dashboard.json")
    found = [rule["expr"] for rule in rules]
    found += [v["expr"] for v in walk(dashboard) if isinstance(v, dict) and "expr" in v]
    found += [v["query"] for v in dashboard["templating"]["list"]]
    return found


def test_alerts_and_dashboard_use_existing_metrics(families):
    used = set()
    for expression in expressions():
        used |= set(METRIC.findall(expression))
        for name, labels in re.findall(METRIC.pattern + r"\{([^}]*)\}", expression):
            # Prometheus's own label `job` renames the coordinator's.
            asked = {
                label.replace("exported_job", "job") for label in re.findall(r"(\w+)[=~!]", labels)
            }
            assert asked <= families[name], expression
    assert used <= set(families)
    shown = {name.removesuffix("_bucket") for name in used}
    every = {re.sub("_(bucket|sum|count)$", "", name) for name in families}
    assert every <= shown | {"shard_assignment_duration_seconds"}, "each is shown somewhere"


def test_states_of_workers_are_those_of_the_coordinator():
    source = (ROOT / "coordinator" / "src" / "state" / "summary.rs").read_text()
    states = set(re.findall(r'\("(\w+)", WorkerState::', source))
    asked = {s for e in expressions() for s in re.findall(r'state="(\w+)"', e)}
    assert asked
    assert asked <= states


def test_every_alert_says_what_to_do_and_is_tested():
    rules = [r for g in yaml_of(MONITORING / "alerts.yml")["groups"] for r in g["rules"]]
    tested = (MONITORING / "alerts_test.yml").read_text()
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["alert"] in tested


def test_prometheus_and_grafana_use_the_services_addresses():
    services = compose()["services"]
    prometheus = yaml_of(MONITORING / "prometheus.yml")
    [scrape] = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"coordinator:{METRICS_PORT}"]}]
    for file in ("prometheus.yml", "prometheus-kubernetes.yml"):
        text = yaml_of(MONITORING / file)
        assert [job["job_name"] for job in text["scrape_configs"]] == ["dtruntime-coordinator"]
        assert all((MONITORING / rules).exists() for rules in text["rule_files"])
    provisioning = MONITORING / "grafana" / "provisioning"
    for source in yaml_of(provisioning / "datasources" / "sources.yml")["datasources"]:
        assert source["url"].removeprefix("http://").split(":")[0] in services
    [provider] = yaml_of(provisioning / "dashboards" / "dtruntime.yml")["providers"]
    mounted = " ".join(services["grafana"]["volumes"])
    assert f":{provider['options']['path']}/" in mounted


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_agrees():
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        result = run("promtool", *command, cwd=MONITORING)
        assert result.returncode == 0, result.stdout + result.stderr


# AWS


def blocks_of_s3() -> list[Any]:
    text = (ROOT / "engine" / "docs" / "s3.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]


def test_permissions_and_lifecycle_are_what_the_engine_needs():
    policy, lifecycle = blocks_of_s3()
    assert json_of(DEPLOY / "aws" / "iam-policy.json") == policy
    assert json_of(DEPLOY / "aws" / "lifecycle.json") == lifecycle
    cluster = yaml_of(DEPLOY / "aws" / "eks-cluster.yaml")
    [account] = cluster["iam"]["serviceAccounts"]
    assert account["attachPolicy"] == policy
    assert account["metadata"]["name"] == named("ServiceAccount", "worker")["metadata"]["name"]
    remote = named("ConfigMap", "worker")["data"]["CHECKPOINT_REMOTE"].removeprefix("s3://")
    assert policy["Statement"][2]["Resource"] == f"arn:aws:s3:::{remote}/*"


def ec2() -> dict[str, Any]:
    return yaml_of(DEPLOY / "aws" / "ec2.yaml")


def resources_of_ec2() -> dict[str, Any]:
    """Return all resources, those of one rank once."""
    resources = dict(ec2()["Resources"])
    _, _, of_a_rank = resources.pop("Fn::ForEach::Workers")
    return resources | of_a_rank


def test_the_role_on_ec2_has_these_permissions():
    policy, lifecycle = blocks_of_s3()
    role = resources_of_ec2()["WorkerRole"]["Properties"]
    [own] = [p["PolicyDocument"] for p in role["Policies"] if p["PolicyName"] == "checkpoints"]
    assert [s["Action"] for s in own["Statement"]] == [s["Action"] for s in policy["Statement"]]
    bucket = resources_of_ec2()["Bucket"]["Properties"]
    [rule] = bucket["LifecycleConfiguration"]["Rules"]
    [wanted] = lifecycle["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == wanted["AbortIncompleteMultipartUpload"]


def test_nothing_on_ec2_is_open_to_the_world():
    text = (DEPLOY / "aws" / "ec2.yaml").read_text()
    assert "0.0.0.0/0" not in text
    resources = resources_of_ec2()
    templates = [r for r in resources.values() if r["Type"] == "AWS::EC2::LaunchTemplate"]
    assert len(templates) == 2
    for template in templates:
        data = template["Properties"]["LaunchTemplateData"]
        assert data["MetadataOptions"]["HttpTokens"] == "required"
        assert "IamInstanceProfile" in data
    group = resources["CoordinatorSecurityGroup"]["Properties"]
    [rule] = group["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"]) == (GRPC_PORT, GRPC_PORT)
    assert "SourceSecurityGroupId" in rule


def test_the_template_refers_to_existing_resources():
    known = set(ec2()["Parameters"]) | set(resources_of_ec2()) | {"Rank"}
    used = set()
    for value in walk(ec2()):
        if not isinstance(value, dict):
            continue
        for key in ("Ref", "Fn::Sub"):
            if isinstance(value.get(key), str):
                text = value[key]
                used |= {text} if key == "Ref" else set(re.findall(r"\$\{([^}!]+)\}", text))
        if "Fn::GetAtt" in value and isinstance(value["Fn::GetAtt"][0], str):
            used.add(value["Fn::GetAtt"][0])
        if isinstance(value.get("Condition"), str):
            assert value["Condition"] in ec2()["Conditions"]
    used = {name.split(".")[0] for name in used if not name.startswith("AWS::")}
    assert used <= known
    ranks = ec2()["Parameters"]["Ranks"]["Default"].split(",")
    assert len(ranks) == ec2()["Parameters"]["WorldSize"]["Default"]


@pytest.mark.parametrize("name", ["CoordinatorTemplate", "WorkerTemplate${Rank}"])
def test_the_machines_scripts_are_valid_shell(name):
    data = resources_of_ec2()[name]["Properties"]["LaunchTemplateData"]
    script = re.sub(r"\$\{[^}]+\}", "x", data["UserData"]["Fn::Base64"]["Fn::Sub"])
    result = run("bash", "-n", input=script)
    assert (result.returncode, result.stderr) == (0, "")


# The page


def shell_blocks() -> list[str]:
    text = (DEPLOY / "README.md").read_text()
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_page_names_existing_files_and_options():
    blocks = shell_blocks()
    assert len(blocks) >= 8
    text = (DEPLOY / "README.md").read_text()
    for path in set(re.findall(r"(?<![\w/.])(?:file://)?((?:deploy|tests)/[\w./-]+)", text)):
        assert (ROOT / path.removeprefix("file://")).exists(), path
    for block in blocks:
        result = run("bash", "-n", input=block)
        assert (result.returncode, result.stderr) == (0, ""), block
    options = set(re.findall(r"--build-arg (\w+)=", text))
    worker = DOCKERFILES[1].read_text()
    assert options <= set(re.findall(r"^ARG (\w+)=", worker, flags=re.MULTILINE))
    names = [name for kind, name in WORKLOADS]
    for kind, name in re.findall(r"kubectl \w+ (?:-\w )?(deployment|statefulset)[ /](\w+)", text):
        assert name in names, kind
    for parameter in re.findall(r"(\w+)=(?:vpc|subnet|\d{12}\.dkr)", text):
        assert parameter in ec2()["Parameters"]


def test_the_page_has_a_row_for_each_message_of_the_tools():
    text = (DEPLOY / "README.md").read_text()
    launch = (DEPLOY / "dt-launch").read_text()
    assert "RANK=4 is not below WORLD_SIZE=4" in text
    assert "is not below WORLD_SIZE=" in launch
    backend = (ROOT / "engine" / "src" / "io" / "backend.rs").read_text()
    assert "io_uring is not available" in text
    assert "io_uring is not available" in backend
