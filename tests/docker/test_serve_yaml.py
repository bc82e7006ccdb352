"""serve.yaml: its parts agree with each other, with the image and with the server's flags, and it
runs as the pod runs it."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
import yaml
from helpers import ROOT
from manifests import instructions, of_any_pod, of_document

from early_exit import serve

DOCKER = ROOT / "docker"
DOCUMENTS = list(yaml.safe_load_all((DOCKER / "serve.yaml").read_text()))
DOCKERFILE = instructions((DOCKER / "Dockerfile.deploy").read_text())
PATIENCE = 120  # seconds; ends a test that would never end


def problems(documents: list[dict]) -> Iterator[str]:
    """A line for every mistake: the name of the rule, and what was found."""
    for doc in documents:
        yield from of_document("serve.yaml", doc)
    service, deployment = (doc["spec"] for doc in documents)
    template = deployment["template"]
    spec, labels = template["spec"], template["metadata"]["labels"]
    (container,) = spec["containers"]
    yield from of_any_pod(spec)
    for selector in (service["selector"], deployment["selector"]["matchLabels"]):
        if selector != labels:
            yield f"selector: it selects {selector}, the pods have {labels}"
    update = deployment["strategy"]["rollingUpdate"]
    if update["maxUnavailable"] != 0 or not update["maxSurge"]:
        yield f"update: {update} ends pods before new ones are ready"
    yield from of_container(container)
    args = serve.parser().parse_args(container["args"])
    word, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    if word != "sleep" or spec["terminationGracePeriodSeconds"] < int(seconds) + args.grace + 1:
        yield "grace: the pod is given less than the sleep and --grace"
    (port,) = container["ports"]
    ports = {service["ports"][0]["targetPort"], *(probe["port"] for probe in probes(container))}
    annotations = template["metadata"]["annotations"]
    scraped = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port["containerPort"]),
        "prometheus.io/path": "/metrics",
    }
    if ports != {port["name"]} or port["containerPort"] != args.port or annotations != scraped:
        yield f"port: of --port {args.port}, the Service, the probes and Prometheus"


def of_container(container: dict) -> Iterator[str]:
    """The command, its model, the image and its user."""
    args = serve.parser().parse_args(container["args"])
    if container["command"] != ["python", "-m", "early_exit.serve"]:
        yield f"command: it runs {container['command']}"
    if args.host != "0.0.0.0":
        yield f"host: it listens on {args.host}, where no other pod reaches it"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    if not mounts.get(str(args.model), {}).get("readOnly"):
        yield f"model: {args.model} is not mounted, or can be written to"
    if "/tmp" not in mounts:
        yield "tmp: nothing can be written in /tmp"


def probes(container: dict) -> list[dict]:
    """The requests of the three probes."""
    return [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]


def put(value: object, *keys: object, document: int = 1):
    """A mistake: another value at these keys."""

    def plant(documents: list[dict]) -> None:
        part = documents[document]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return plant


POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
MISTAKES = {
    "other pods": (put({"app": "x"}, "spec", "selector", document=0), "selector: .*x"),
    "labels": (put({}, "metadata", "labels"), "labels: "),
    "labels of the trainer": (
        put("early-exit", "metadata", "labels", "app.kubernetes.io/name", document=0),
        "labels: ",
    ),
    "fewer pods": (put(1, "spec", "strategy", "rollingUpdate", "maxUnavailable"), "update: "),
    "no new pods": (put(0, "spec", "strategy", "rollingUpdate", "maxSurge"), "update: "),
    "a short grace": (put(35, *POD, "terminationGracePeriodSeconds"), "grace: "),
    "root": (put(0, *POD, "securityContext", "runAsUser"), "pod-rights: "),
    "a token": (put(True, *POD, "automountServiceAccountToken"), "token: "),
    "a file system that is written to": (
        put(False, *CONTAINER, "securityContext", "readOnlyRootFilesystem"),
        "container-rights: ",
    ),
    "a model that is written to": (
        put(False, *CONTAINER, "volumeMounts", 0, "readOnly"),
        "model: /model",
    ),
    "a model that is not there": (put("/models", *CONTAINER, "args", 0), "model: /models"),
    "no /tmp": (put("/var", *CONTAINER, "volumeMounts", 1, "mountPath"), "tmp: "),
    "loopback": (put("--host=127.0.0.1", *CONTAINER, "args", 2), "host: .*127"),
    "another command": (put(["python"], *CONTAINER, "command"), "command: "),
    "another port": (put("--port=80", *CONTAINER, "args", 3), "port: .*80"),
    "another port of the Service": (
        put("web", "spec", "ports", 0, "targetPort", document=0),
        "port: ",
    ),
    "another port of a probe": (
        put(80, *CONTAINER, "livenessProbe", "httpGet", "port"),
        "port: ",
    ),
    "another port of Prometheus": (
        put("80", "spec", "template", "metadata", "annotations", "prometheus.io/port"),
        "port: ",
    ),
    "no limit": (put({}, *CONTAINER, "resources", "limits"), "limit-missing: .*memory"),
    "a quantity": (
        put("4Gib", *CONTAINER, "resources", "limits", "memory"),
        "quantity: .*'4Gib'",
    ),
}


class TestRules:
    def test_the_file_has_no_mistake(self):
        assert [doc["kind"] for doc in DOCUMENTS] == ["Service", "Deployment"]
        assert list(problems(DOCUMENTS)) == []

    @pytest.mark.parametrize(("plant", "expected"), MISTAKES.values(), ids=MISTAKES)
    def test_a_mistake_is_found(self, plant, expected):
        documents = copy.deepcopy(DOCUMENTS)
        plant(documents)
        assert any(re.match(expected, line) for line in problems(documents))

    def test_the_image_and_the_claim_are_those_of_the_other_files(self):
        """Also after the page's command that names a registry, which changes all files alike."""
        spec = DOCUMENTS[1]["spec"]["template"]["spec"]
        trainer = yaml.safe_load((DOCKER / "train_pod.yaml").read_text())["spec"]
        (container,) = spec["containers"]
        own = trainer["containers"][0]["image"].replace("early-exit:", "early-exit-deploy:")
        assert container["image"] == own
        assert spec["securityContext"] == trainer["securityContext"]
        assert dict(DOCKERFILE)["USER"] == "10001:10001"
        claims = yaml.safe_load_all((DOCKER / "volumes.yaml").read_text())
        (volume, _) = spec["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] in {
            claim["metadata"]["name"] for claim in claims
        }


@pytest.mark.slow
def test_it_serves_as_the_pod_runs_it(deployed_model, tmp_path):
    """The pod's command, arguments and environment, with the model mounted elsewhere and another
    port. Nothing is written beside /tmp."""
    for package in (*serve.PACKAGES, "onnxruntime"):
        pytest.importorskip(package)
    template = DOCUMENTS[1]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    model = shutil.copytree(deployed_model, tmp_path / "model")
    places = [model, *model.iterdir()]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = [path.stat() for path in places]
    for name in ("workspace", "tmp"):
        (tmp_path / name).mkdir()
    (variable,) = container["env"]
    assert variable["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    process = subprocess.Popen(
        [sys.executable, *container["command"][1:], model, *container["args"][1:], "--port=0"],
        cwd=tmp_path / "workspace",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",  # into ROOT, which an image does not let it
            "HOME": str(tmp_path / "tmp"),
            "TMPDIR": str(tmp_path / "tmp"),
            variable["name"]: container["resources"]["limits"]["cpu"],
        },
    )
    try:
        found = re.match(r"http://0\.0\.0\.0:(\d+) serves mine ", process.stdout.readline())
        assert found, process.communicate(timeout=PATIENCE)
        url = f"http://127.0.0.1:{found[1]}"

        def get(path: str) -> bytes:
            with urllib.request.urlopen(url + path, timeout=PATIENCE) as response:
                assert response.status == 200
                return response.read()

        for probe in probes(container):
            assert json.loads(get(probe["path"])) in ({"live": True}, {"ready": True})
        metrics = get(template["metadata"]["annotations"]["prometheus.io/path"])
        assert b"early_exit_rows_in_flight 0.0" in metrics
        assert json.loads(get("/v2/models/mine"))["name"] == "mine"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert [path.stat().st_mtime_ns for path in places] == [one.st_mtime_ns for one in before]
    assert sorted(model.iterdir()) == sorted(places[1:])
    assert list((tmp_path / "workspace").iterdir()) == []
