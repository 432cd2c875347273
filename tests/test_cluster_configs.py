"""The files that start a cluster: checked by Ray's own validator or KubeRay's own schema, and against each other.

Nothing here reaches a cloud: that these files start a cluster there is not shown.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader
from ray.scripts.scripts import start

from cluster.placement import NodeResources, RoleDemand, place, shortages
from cluster_files import (
    CLUSTERS,
    DOCKER,
    KUBERAY,
    MARKET,
    PINS,
    PROJECT,
    ROOT,
    VERSION,
    documents,
    environment,
    last_stage,
    read,
    runs_in,
    user_of,
)
from pipeline.arguments.parsing import parse
from pipeline.arguments.submission import parse_submission
from pipeline.config.run_config import RunConfig
from pipeline.plan.places import demands_of

CRD = ROOT.parent / "shared" / "data" / "kuberay-crd"
LAUNCHED = ("aws", "gcp", "onprem")
CLOUDS = ("aws", "gcp")
LEARNERS = {"policy", "critic", "manager", "finetune.learner", "reward_model.learner"}
CPU_IMAGE, GPU_IMAGE = f"registry.example/raylign:{VERSION}", f"registry.example/raylign:{VERSION}-gpu"


# --- Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_s_own_validator_takes_a_launcher_file(name: str) -> None:
    validate_config(prepare_config(read(CLUSTERS / f"{name}.yaml")))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_file_has_no_field_that_ray_does_not_know(name: str) -> None:
    """Ray's schema leaves `provider` open, so its fields are compared here."""
    schema = json.loads(Path(str(ray.autoscaler.__file__)).with_name("ray-schema.json").read_text())
    given = read(CLUSTERS / f"{name}.yaml")
    known = schema["properties"]
    assert set(given) - set(known) - {"min_workers"} == set()
    assert set(given["provider"]) <= set(known["provider"]["properties"]) | {"use_internal_ips"}
    assert ("min_workers" in given) == (name == "onprem"), "Ray takes it away from machines of one's own, in `prepare`"


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: given.update(max_wokers=3),
        lambda given: given["docker"].update(imge="x"),
        lambda given: given["auth"].update(user="x"),
        lambda given: given.update(idle_timeout_minutes="ten"),
        lambda given: given.pop("provider"),
    ],
    ids=["typo at the top", "typo in docker", "typo in auth", "words for a number", "no provider"],
)
def test_ray_s_validator_would_notice(name: str, spoil: Callable[[Any], Any]) -> None:
    given = prepare_config(read(CLUSTERS / f"{name}.yaml"))
    spoil(given)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(given)


@pytest.mark.parametrize("name", CLOUDS)
def test_autoscaler_v2_reads_types_labels_images_and_idle_times(name: str) -> None:
    config = launched(name)
    types = config.get_node_type_configs()
    assert sorted(types) == ["head", "learner", "rollout"]
    assert {kind: each.labels[MARKET] for kind, each in types.items()} == {
        "head": "on-demand",
        "learner": "on-demand",
        "rollout": "spot",
    }
    assert [types[kind].min_worker_nodes for kind in ("learner", "rollout")] == [0, 0], "nothing runs without a run"
    assert types["head"].max_worker_nodes == 1
    assert types["head"].resources == {"CPU": 0}, "Ray starts no worker on the head"
    idle = [types[kind].idle_timeout_s for kind in ("learner", "rollout")]
    assert all(idle) and idle[0] > idle[1] and config.get_idle_timeout_s() == 600
    assert config.get_max_num_worker_nodes() == sum(types[kind].max_worker_nodes for kind in ("learner", "rollout"))
    assert {kind: config.get_docker_config(kind)["image"] for kind in types} == {
        "head": CPU_IMAGE,
        "learner": GPU_IMAGE,
        "rollout": GPU_IMAGE,
    }
    for each in types.values():
        validate_node_label_syntax(each.labels)


def test_only_rollouts_are_bought_on_the_spot_market() -> None:
    aws, gcp = (read(CLUSTERS / f"{name}.yaml")["available_node_types"] for name in CLOUDS)
    assert {kind: "InstanceMarketOptions" in each["node_config"] for kind, each in aws.items()} == {
        "head": False,
        "learner": False,
        "rollout": True,
    }
    assert aws["rollout"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {kind: each["node_config"].get("scheduling", {}).get("provisioningModel") for kind, each in gcp.items()} == {
        "head": None,
        "learner": None,
        "rollout": "SPOT",
    }


def test_aws_knows_the_fields_of_the_machines() -> None:
    """By the description of the service that comes with boto3 (`pip install raylign[aws]`)."""
    loaders = pytest.importorskip("botocore.loaders", reason="raylign[aws] is not installed")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    ec2 = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2"))
    shape = ec2.operation_model("RunInstances").input_shape
    for each in read(CLUSTERS / "aws.yaml")["available_node_types"].values():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **each["node_config"]}, shape)
        assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_cluster_has_a_token_that_is_not_in_the_file(name: str) -> None:
    given = read(CLUSTERS / f"{name}.yaml")
    assert "--env RAY_AUTH_MODE=token" in given["docker"]["run_options"]
    home = re.search(r"HOME=(\S+)", last_stage("Dockerfile")["ENV"])
    assert home
    assert given["file_mounts"] == {f"{home[1]}/.ray/auth_token": "~/.ray/auth_token"}  # where Ray looks for it


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_start_knows_the_options_and_the_dashboard_stays_on_loopback(name: str) -> None:
    given = read(CLUSTERS / f"{name}.yaml")
    head, worker = (ray_start(given[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker["address"] == "$RAY_HEAD_IP:6379" and head["port"] == 6379
    if name == "onprem":  # the launcher gives labels and resources to cloud machines only
        assert head["labels"] == worker["labels"] == f"{MARKET}=on-demand"
        assert head["num_cpus"] == 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_all_nodes_mount_the_runs_where_the_images_have_them(name: str) -> None:
    given = read(CLUSTERS / f"{name}.yaml")
    assert "--volume /mnt/runs:/runs" in given["docker"]["run_options"]
    assert any("/mnt/runs" in command and "mount -t nfs" in command for command in given["initialization_commands"])
    assert f"sudo chown {user_of('Dockerfile')}:{user_of('Dockerfile')} /mnt/runs" in given["initialization_commands"]
    assert given["setup_commands"] == given["head_setup_commands"] == given["worker_setup_commands"] == []
    stop_wait = [option for option in given["docker"]["head_run_options"] if "RAY_JOB_STOP_WAIT_TIME_S" in option]
    assert stop_wait == ["--env RAY_JOB_STOP_WAIT_TIME_S=300"]


# --- KubeRay


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Kind -> schema of KubeRay in which unknown fields are errors, and those of the objects beside it."""
    if not CRD.is_dir():
        pytest.skip(f"KubeRay's schemas are not part of the project; this test looks for them in {CRD}")
    found = {}
    for kind in ("RayCluster", "RayJob"):
        with gzip.open(CRD / f"ray.io_{kind.lower()}s.yaml.gz") as file:
            crd = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1")
        found[kind] = closed(version["schema"]["openAPIV3Schema"])
    cluster = found["RayCluster"]["properties"]["spec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    found["NetworkPolicy"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["podSelector"],
        "properties": {
            "podSelector": rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"],
            "policyTypes": {"items": {"enum": ["Ingress", "Egress"]}},
            "ingress": rules["ingressRules"],
            "egress": rules["egressRules"],
        },
    }
    volume = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]["items"]
    claim = volume["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    found["PersistentVolumeClaim"] = claim
    return found


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_s_schema_takes_every_object_and_knows_all_its_fields(name: str, schemas: dict[str, Any]) -> None:
    for kind, given in documents(KUBERAY / f"{name}.yaml").items():
        assert problems(kind, given, schemas) == []
        assert set(given) == {"apiVersion", "kind", "metadata", "spec"}
        assert set(given["metadata"]) <= {"name", "annotations"}
    api = {kind: given["apiVersion"] for kind, given in documents(KUBERAY / f"{name}.yaml").items()}
    assert api == {
        "PersistentVolumeClaim": "v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        {"raycluster": "RayCluster", "rayjob": "RayJob"}[name]: "ray.io/v1",
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("enableInTreeAutoscalng", True),
        ("autoscalerOptions.version", "v3"),
        ("autoscalerOptions.idleTimeout", 60),
        ("authOptions.mode", "tokn"),
        ("headGroupSpec.template.spec.terminationGracePeriod", 30),
        ("headGroupSpec.template.spec.containers.0.lifecycle.prestop", {}),
        ("workerGroupSpecs.1.maxReplicas", None),
        ("workerGroupSpecs.1.template.spec.containers.0.startupProbe.httpGet.url", "/"),
        ("workerGroupSpecs.1.template.spec.containers.0.resources.limits.cpu", "many"),
    ],
)
def test_the_schema_would_notice(path: str, value: Any, schemas: dict[str, Any]) -> None:
    given = copy.deepcopy(documents(KUBERAY / "raycluster.yaml")["RayCluster"])
    *way, last = path.split(".")
    spot = given["spec"]
    for step in way:
        spot = spot[int(step)] if step.isdigit() else spot[step]
    spot[last] = value
    assert problems("RayCluster", given, schemas)


def test_the_job_s_cluster_storage_and_network_are_those_of_the_cluster() -> None:
    cluster, job = documents(KUBERAY / "raycluster.yaml"), documents(KUBERAY / "rayjob.yaml")
    assert job["RayJob"]["spec"]["rayClusterSpec"] == cluster["RayCluster"]["spec"]
    assert job["RayJob"]["metadata"]["annotations"] == cluster["RayCluster"]["metadata"]["annotations"]
    for kind in ("PersistentVolumeClaim", "NetworkPolicy"):
        assert job[kind] == cluster[kind]


def test_a_pod_has_the_right_image_market_and_user() -> None:
    spec = documents(KUBERAY / "raycluster.yaml")["RayCluster"]["spec"]
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    seen = {}
    for group, pod in pods():
        container = pod["spec"]["containers"][0]
        seen[group["labels"][MARKET], group.get("groupName", "head")] = container["image"]
        validate_node_label_syntax(group["labels"])
        assert pod["spec"]["restartPolicy"] == "Never"
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == security["fsGroup"] == int(user_of("Dockerfile"))
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == container["image"].endswith("-gpu")
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
        assert pod["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "raylign-runs"}
        assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & environment(container).keys(), "the operator sets them"
    assert seen == {
        ("on-demand", "head"): CPU_IMAGE,
        ("on-demand", "learner"): GPU_IMAGE,
        ("spot", "rollout"): GPU_IMAGE,
    }
    job = documents(KUBERAY / "rayjob.yaml")["RayJob"]["spec"]
    assert job["submitterPodTemplate"]["spec"]["containers"][0]["image"] == CPU_IMAGE
    assert job["shutdownAfterJobFinishes"] is True


def test_a_pod_s_grace_period_is_longer_than_its_drain_and_the_stop_of_its_jobs() -> None:
    for group, pod in pods():
        container = pod["spec"]["containers"][0]
        drain = float(environment(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        before = 0.0
        if "groupName" not in group:  # the head: its preStop comes before SIGTERM, and counts
            command = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:4] == ["python", "-m", "cluster.stop_jobs", "--timeout"]
            before = float(command[4])
            assert before > float(environment(container)["RAY_JOB_STOP_WAIT_TIME_S"])
        assert pod["spec"]["terminationGracePeriodSeconds"] > before + drain


def test_a_pod_s_probes_ask_what_answers_without_a_token() -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for _, pod in pods():
        container = pod["spec"]["containers"][0]
        asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
        for kind in ("startup", "liveness"):
            assert asked[kind]["port"] == 52365 and asked[kind]["path"] in PUBLIC_EXACT_PATHS
        assert asked["readiness"]["path"] in {"/api/gcs_healthz", "/api/local_raylet_healthz"}


def test_no_shell_is_left_in_a_pod(tmp_path: Path) -> None:
    """The shell replaces itself by the generated command, whose quotes it keeps: a signal reaches `ray start`."""
    stub = tmp_path / "ray"
    stub.write_text('#!/bin/sh\necho $$\nfor each in "$@"; do echo "$each"; done\n')
    stub.chmod(0o755)
    generated = 'ray start --address=head:6379  --block --labels="ray.io/market-type=spot" --resources=\'{"a": 1}\' '
    for _, pod in pods():
        container = pod["spec"]["containers"][0]
        process1, *shell = [*container["command"], *container["args"]]
        assert process1 == "tini" and shell[0] == "--"
        process = subprocess.Popen(
            shell[1:],
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": generated},
        )
        pid, *arguments = process.communicate(timeout=60)[0].splitlines()
        assert int(pid) == process.pid
        assert arguments == [
            "start",
            "--address=head:6379",
            "--block",
            f"--labels={MARKET}=spot",
            '--resources={"a": 1}',
        ]


def test_the_network_policy_is_about_all_pods_and_lets_only_them_and_the_operator_in() -> None:
    policy = documents(KUBERAY / "raycluster.yaml")["NetworkPolicy"]["spec"]
    ours = policy["podSelector"]["matchLabels"]
    for _, pod in pods():
        assert ours.items() <= pod["metadata"]["labels"].items()
    submitter = documents(KUBERAY / "rayjob.yaml")["RayJob"]["spec"]["submitterPodTemplate"]
    assert ours.items() <= submitter["metadata"]["labels"].items()
    everybody, operator = policy["ingress"]
    assert everybody == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert list(operator["from"][0]) == ["namespaceSelector"]
    assert [port["port"] for port in operator["ports"]] == [8265]


# --- what a run asks, and what a cluster can bring


@pytest.mark.parametrize("where", ["aws", "gcp", "kuberay", "rayjob"])
def test_the_documented_run_fits_and_its_learners_fit_on_nodes_that_stay(where: str) -> None:
    nodes = {"aws": cloud_nodes, "gcp": cloud_nodes}.get(where, lambda _: pod_nodes())(where)
    for config in map(config_of, documented_runs(where)):
        assert config.cluster.cpus_per_bundle > 0, "an empty cluster cannot say how many CPUs fit"
        assert config.cluster.place_timeout_s >= 600, "machines take minutes to come"
        for roles in demands_of(config, ("sft", "reward", "rl", "evaluate")).values():
            everywhere = [node for market in nodes.values() for node in market]
            assert shortages(place(config.cluster, roles), everywhere) == []
            learners = [role for role in roles if role.role in LEARNERS]
            assert shortages(place(config.cluster, learners), nodes["on-demand"]) == []


def test_a_run_that_is_too_large_would_be_noticed() -> None:
    config = config_of(next(iter(documented_runs("aws"))))
    asked = [RoleDemand(role="policy", workers=3, gpus=1)]
    assert shortages(place(config.cluster, asked), cloud_nodes("aws")["on-demand"])


@pytest.mark.parametrize("recipe", ["quickstart", "walks"])
def test_the_recipes_for_a_laptop_fit_on_one_node(recipe: str) -> None:
    config = parse(["run", recipe, "--cluster.cpus-per-bundle", "2"]).config
    for nodes in (cloud_nodes("aws"), cloud_nodes("gcp"), pod_nodes()):
        for roles in demands_of(config, ("sft", "reward", "rl", "evaluate")).values():
            assert shortages(place(config.cluster, roles), nodes["on-demand"][:1]) == []


@pytest.mark.parametrize("folder", [CLUSTERS, KUBERAY], ids=lambda folder: folder.name)
def test_a_page_says_what_was_not_shown_and_needs_ten_commands_at_most(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "alidated offline; never run on a real" in text
    assert list(runs_in(text)) or folder == KUBERAY
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        commands = [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
        assert len(commands) <= 10


def test_the_files_come_with_the_package() -> None:
    given = PROJECT["tool"]["setuptools"]["package-data"]["cluster"]
    found = {path for pattern in given for path in (ROOT / "cluster").glob(pattern)}
    assert {path for folder in (CLUSTERS, KUBERAY) for path in folder.iterdir()} == found


def test_no_secret_stands_in_any_file() -> None:
    for path in [*CLUSTERS.glob("*.yaml"), *KUBERAY.glob("*.yaml"), *DOCKER.iterdir()]:
        if path.is_file() and path.name != "token":
            assert not re.search(r"RAY_AUTH_TOKEN\s*[:=]|[0-9a-f]{32}", path.read_text()), path


def launched(name: str) -> AutoscalingConfig:
    """A launcher file as autoscaler v2 reads it on the head."""
    return FileConfigReader(str(CLUSTERS / f"{name}.yaml")).get_cached_autoscaling_config()


def ray_start(commands: list[str]) -> dict[str, Any]:
    """The options of the one `ray start`, parsed by Ray's own command line; it is not carried out."""
    (command,) = [each for each in commands if "ray start" in each]
    assert [each for each in commands if each != command] == ["ray stop"]
    context = start.make_context("ray start", shlex.split(command)[2:])
    return dict(context.params)


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(group, its pod template) of the cluster: the head first."""
    spec = documents(KUBERAY / "raycluster.yaml")["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group, group["template"]


def cloud_nodes(name: str) -> dict[str, list[NodeResources]]:
    """Market -> all nodes that the launcher may start for runs."""
    nodes: dict[str, list[NodeResources]] = {"on-demand": [], "spot": []}
    for kind, each in launched(name).get_node_type_configs().items():
        has = each.resources
        for _ in range(each.max_worker_nodes if kind != "head" else 0):
            nodes[each.labels[MARKET]].append(NodeResources(name=kind, cpus=has["CPU"], gpus=has["GPU"]))
    return nodes


def pod_nodes() -> dict[str, list[NodeResources]]:
    """Market -> all pods that KubeRay may start for runs."""
    nodes: dict[str, list[NodeResources]] = {"on-demand": [], "spot": []}
    for group, pod in list(pods())[1:]:
        has = pod["spec"]["containers"][0]["resources"]["limits"]
        one = NodeResources(name=group["groupName"], cpus=float(has["cpu"]), gpus=float(has["nvidia.com/gpu"]))
        nodes[group["labels"][MARKET]] += [one] * group["maxReplicas"]
    return nodes


def config_of(run: list[str]) -> RunConfig:
    """The configuration of a documented run or submission."""
    config = parse_submission(run[1:]).config if run[0] == "submit" else parse(run).config
    assert config is not None
    return config


def documented_runs(where: str) -> list[list[str]]:
    """The runs that a page or the job tells an operator to start."""
    if where == "rayjob":
        text = documents(KUBERAY / "rayjob.yaml")["RayJob"]["spec"]["entrypoint"]
    else:
        text = ((KUBERAY if where == "kuberay" else CLUSTERS) / "README.md").read_text()
    runs = list(runs_in(text))
    assert runs
    return runs


def closed(schema: Any) -> Any:
    """The same schema with unknown fields refused wherever fields are named; formats of Kubernetes are left out."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def problems(kind: str, given: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """What the schema says against an object."""
    part = given if kind in ("RayCluster", "RayJob") else given["spec"]
    found = jsonschema.Draft7Validator(schemas[kind]).iter_errors(part)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in found]
