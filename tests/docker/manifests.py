"""Rules for the files of docker/ that are in no schema.

`problems(files, dockerfile, ignored)` reads all of them together and yields a line for each
mistake: the file, the name of the rule, and what was found. test_docker.py checks that there is
none, and that each rule finds a planted one. serve.yaml has rules of its own in test_serve_yaml.py.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from helpers import ROOT

import cifar10.trainer
import imagenet.main
from cifar10 import networks as cifar_networks
from early_exit.cli import settings
from early_exit.config import Config
from early_exit.data.folders import FolderRun
from early_exit.errors import UserError

Files = dict[str, list[dict[str, Any]]]

CREATED_OFTEN = ("train_pod.yaml", "interactive_pod.yaml", "train_job.yaml")
ENUMS = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "medium": ("Memory",),
    "completionMode": ("Indexed", "NonIndexed"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    "action": ("FailJob", "FailIndex", "Ignore", "Count"),
    "operator": ("Exists", "Equal", "In", "NotIn"),
}
ACCESS_MODES = ("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod", "ReadOnlyMany")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
GPU = "nvidia.com/gpu"
LABEL = "app.kubernetes.io/"
SCRIPTS = {
    "imagenet/main.py": (imagenet.main, FolderRun),
    "cifar10/trainer.py": (cifar10.trainer, Config),
}


def problems(files: Files, dockerfile: str, ignored: str) -> Iterator[str]:
    """A line for every mistake in the parsed files, the Dockerfile and its ignore file."""
    specs = {name: spec for name, docs in files.items() for doc in docs if (spec := pod_spec(doc))}
    for name, docs in files.items():
        for doc in docs:
            yield from (f"{name}: {line}" for line in of_document(name, doc))
    for name, spec in specs.items():
        yield from (f"{name}: {line}" for line in of_pod(spec))
    yield from between(files, specs)
    yield from (f"train_multinode.yaml: {line}" for line in of_several_nodes(files))
    yield from (f"Dockerfile: {line}" for line in of_image(specs, dockerfile, ignored))


def pod_spec(doc: dict) -> dict | None:
    """The pod in a Pod or a Job."""
    if doc["kind"] == "Job":
        return doc["spec"]["template"]["spec"]
    return doc["spec"] if doc["kind"] == "Pod" else None


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else ()
    for key, part in items:
        yield key, part
    for part in value if isinstance(value, list) else (part for _, part in items):
        yield from pairs(part)


def of_document(name: str, doc: dict) -> Iterator[str]:
    """Enums, quantities, names and labels."""
    for key, value in pairs(doc):
        if key in ENUMS and value not in ENUMS[key]:
            yield f"enum: {key} is {value!r}, not one of {', '.join(ENUMS[key])}"
        if key == "accessModes" and not set(value) <= set(ACCESS_MODES):
            yield f"access-modes: accessModes are {value}"
        if key == "namespace":
            yield "namespace: a namespace; the user's own is meant"
        if key in ("requests", "limits"):
            for what, amount in value.items():
                yield from of_quantity(what, amount)
        if key == "sizeLimit":
            yield from of_quantity(key, value)
    meta = doc["metadata"]
    if ("generateName" in meta) != (name in CREATED_OFTEN):
        yield "name: a name where it is created once, generateName where more often"
    labelled = [meta]
    if "template" in doc["spec"]:
        labelled.append(doc["spec"]["template"]["metadata"])
    if doc["kind"] == "Job":
        rules = doc["spec"].get("podFailurePolicy", {}).get("rules", [])
        if pod_spec(doc)["restartPolicy"] != "Never":
            yield "restart-in-place: podFailurePolicy needs restartPolicy Never"
        codes = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
        names = [container["name"] for container in pod_spec(doc)["containers"]]
        if [(code["containerName"], code["values"]) for code in codes] != [(names[0], [2])]:
            yield "mistake-retried: exit code 2 of its container must end the Job"
        kept = [rule["onPodConditions"] for rule in rules if rule["action"] == "Ignore"]
        if kept != [[{"type": "DisruptionTarget", "status": "True"}]]:
            yield "disruption-counted: a disruption must not count"
    for labels in (one.get("labels", {}) for one in labelled):
        expected = "early-exit-serve" if name == "serve.yaml" else "early-exit"
        if labels.get(f"{LABEL}name") != expected or f"{LABEL}component" not in labels:
            yield f"labels: labels are {labels}"


def of_quantity(what: str, amount: Any) -> Iterator[str]:
    """Syntax, and whole GPUs."""
    if what == GPU:
        if not re.fullmatch(r"[1-9]\d*", str(amount)):
            yield f"gpu-count: {GPU} is {amount!r}, not a whole number"
    elif not QUANTITY.fullmatch(str(amount)):
        yield f"quantity: {what} is {amount!r}, not a quantity"


def of_pod(spec: dict) -> Iterator[str]:
    """What all pods need, shared memory and the grace period."""
    yield from of_any_pod(spec)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    shm = [volumes[name] for name, path in mounts.items() if path == "/dev/shm" and name in volumes]
    if not shm or not {"medium", "sizeLimit"} <= shm[0].get("emptyDir", {}).keys():
        yield "shared-memory: /dev/shm is not a memory volume with a size limit"
    limits = container["resources"].get("limits", {})
    requests = container["resources"].get("requests", {})
    if GPU in requests and requests[GPU] != limits.get(GPU):
        yield "gpu-limit: GPUs are limited as they are requested"
    patience = environment(container).get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0)
    if int(patience) + 10 > spec["terminationGracePeriodSeconds"] and "args" in container:
        yield "grace: torchrun waits longer than the pod is given"
    if "args" in container:
        yield from of_command(container)


def of_any_pod(spec: dict) -> Iterator[str]:
    """Volumes, rights (the restricted pod security standard) and resources."""
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    (container,) = spec["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    for name in sorted(mounts - volumes.keys()):
        yield f"volume-unknown: it mounts {name}, which is not a volume"
    for name in sorted(volumes.keys() - mounts):
        yield f"volume-unused: the volume {name} is mounted nowhere"
    if {"hostNetwork", "hostPID", "hostIPC"} & spec.keys():
        yield "node-namespace: it shares something of the node's"
    if any(volume.keys() & {"hostPath"} for volume in volumes.values()):
        yield "node-path: a volume is a path of the node's"
    rights = spec["securityContext"]
    wanted = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if not wanted.items() <= rights.items() or not rights.get("runAsUser"):
        yield f"pod-rights: the pod's rights are {rights}"
    if spec.get("automountServiceAccountToken") is not False:
        yield "token: it gets a token of the cluster's"
    rights = container["securityContext"]
    wanted = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    if not wanted.items() <= rights.items() or rights.get("privileged"):
        yield f"container-rights: the container's rights are {rights}"
    requests, limits = (container["resources"].get(key, {}) for key in ("requests", "limits"))
    for what in ("cpu", "memory"):
        if what not in requests or what not in limits:
            yield f"limit-missing: no request or no limit of {what}"
    if environment(container).get("OMP_NUM_THREADS") != limits.get("cpu"):
        yield "threads: OMP_NUM_THREADS is not the limit of CPUs"


def environment(container: dict) -> dict[str, str]:
    """The variables that a container sets; one that is taken from a limit or a request is what
    stands there."""
    values = {}
    for one in container.get("env", []):
        if "valueFrom" in one:
            kind, _, what = one["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
            values[one["name"]] = str(container["resources"].get(kind, {}).get(what))
        else:
            values[one["name"]] = one["value"]
    return values


def of_command(container: dict) -> Iterator[str]:
    """The script and its flags, understood by the script's own parser."""
    script, *flags = container["args"]
    if script not in SCRIPTS or not (ROOT / script).is_file():
        yield f"script-unknown: {script} is not a script of this repository"
        return
    yield from of_flags(script, *flags)
    if "--resume=auto" not in flags:
        yield "resume: it does not resume by itself"
    device = "cuda" if GPU in container["resources"]["limits"] else "cpu"
    if f"--device={device}" not in flags:
        yield f"device: its limits are for --device={device}, which it does not pass"
    for word in (
        '"$@" --check & wait $! || exit;',
        "torchrun --",
        'trap "kill -TERM $!" TERM',
        "EARLY_EXIT_LAST_LINE",
    ):
        if word not in " ".join(container["command"]):
            yield f"command: its command lacks {word}"


@functools.cache
def of_flags(script: str, *flags: str) -> list[str]:
    """What the script's parser and its configuration refuse in the flags."""
    module, config = SCRIPTS[script]
    try:
        args = module.parser().parse_args(flags)
        resolved = settings.resolve_config(args, None, getattr(module, "CLASSIC", None), config)
        if module is cifar10.trainer:
            cifar_networks.build_network(resolved.model.arch, resolved.model.exits)
        else:
            module.TASK.build_network(resolved, 1000)
    except (SystemExit, UserError) as error:
        return [f"flags: {script} does not understand {shlex.join(flags)} ({error})"]
    return []


def between(files: Files, specs: dict[str, dict]) -> Iterator[str]:
    """What several files must agree on."""
    claims = {doc["metadata"]["name"] for doc in files["volumes.yaml"]}
    first = specs["train_pod.yaml"]
    for name, spec in specs.items():
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in claims:
                yield f"{name}: claim-unknown: the claim {claim} is not in volumes.yaml"
        for key in ("volumes", "securityContext", "tolerations"):
            if spec.get(key) != first.get(key):
                yield f"{name}: differs: its {key} are not those of train_pod.yaml"
        for key in ("image", "imagePullPolicy", "volumeMounts", "securityContext"):
            if spec["containers"][0].get(key) != first["containers"][0].get(key):
                yield f"{name}: differs: its {key} is not that of train_pod.yaml"
    (shell,) = files["interactive_pod.yaml"]
    if GPU in str(shell["spec"]["containers"][0]["resources"]):
        yield "interactive_pod.yaml: gpu-unasked: it takes a GPU that was not asked for"
    terms = shell["spec"]["affinity"]["podAffinity"]
    (term,) = terms["preferredDuringSchedulingIgnoredDuringExecution"]
    sought = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
    if not sought or not sought.items() <= files["train_pod.yaml"][0]["metadata"]["labels"].items():
        yield "interactive_pod.yaml: affinity: it asks for a pod that is not among these"


def of_several_nodes(files: Files) -> Iterator[str]:
    """A Service and a Job that find each other."""
    service, job = files["train_multinode.yaml"]
    name, spec = job["metadata"]["name"], job["spec"]
    if not service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items():
        yield "service-selector: the Service selects other pods"
    if service["spec"]["clusterIP"] != "None" or not service["spec"]["publishNotReadyAddresses"]:
        yield "service-headless: the Service must be headless and name pods that are not ready"
    if pod_spec(job).get("subdomain") != service["metadata"]["name"]:
        yield "subdomain: the pods' subdomain is not the Service's name"
    command = pod_spec(job)["containers"][0]["command"][-2]
    flags = dict(re.findall(r"--([a-z-]+)=(\S+)", command))
    if flags.get("master-addr") != f"{name}-0.{service['metadata']['name']}":
        yield f"master-addr: the first node is not {flags.get('master-addr')}"
    if flags.get("master-port") != str(service["spec"]["ports"][0]["port"]):
        yield "master-port: the Service has another port"
    if flags.get("node-rank") != '"$JOB_COMPLETION_INDEX"' or spec["completionMode"] != "Indexed":
        yield "completion-mode: the pods do not know their number"
    if "backoffLimit" in spec or not spec.get("backoffLimitPerIndex"):
        yield "back-off: the back-off of the Job doubles with every pod of a lost node"
    if spec.get("maxFailedIndexes") != 0:
        yield "index-failed: the other pods continue without a pod that has failed too often"
    if {spec["completions"], spec["parallelism"], int(flags.get("nnodes", 0))} != {
        spec["completions"]
    }:
        yield "completions: completions, parallelism and --nnodes differ"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each with the rest of its line."""
    lines = re.sub("^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(key, rest) for key, _, rest in (line.partition(" ") for line in lines) if key]


def installs_here(words: list[str]) -> bool:
    """Whether a command installs the package of its directory."""
    return "pip" in words and any(re.fullmatch(r"\"?\.(\[.*\])?\"?", word) for word in words)


def of_image(specs: dict[str, dict], dockerfile: str, ignored: str) -> Iterator[str]:
    """The image holds what the pods run, for the user that they run as."""
    steps = [(key, rest.split()) for key, rest in instructions(dockerfile)]
    lines = {
        key: [rest for first, rest in steps if first == key]
        for key in ("USER", "COPY", "WORKDIR", "CMD", "ENTRYPOINT")
    }
    installed = next(number for number, (_, rest) in enumerate(steps) if installs_here(rest))
    for key, rest in steps[installed:]:
        if key == "COPY" and (ROOT / rest[0] / "__init__.py").exists():
            yield f"install-early: it installs the packages before it copies {rest[0]}"
    copied = [source for *sources, _ in lines["COPY"] for source in sources]
    shown = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    for source in copied:
        if not (ROOT / source).exists():
            yield f"copy-missing: it copies {source}, which does not exist"
        if not any(fnmatch(source, pattern) for pattern in shown):
            yield f"copy-ignored: it copies {source}, which its ignore file hides"
    for command in lines["CMD"] + lines["ENTRYPOINT"]:
        if not command[0].startswith("["):
            yield "shell-form: a command in shell form"
    home = lines["WORKDIR"][-1][0]
    for name, spec in specs.items():
        user = spec["securityContext"]["runAsUser"]
        if lines["USER"][-1] != [f"{user}:{spec['securityContext']['runAsGroup']}"]:
            yield f"user: its user is not that of {name}"
        container = spec["containers"][0]
        script = container.get("args", [copied[-1]])[0]
        if not any(Path(script).is_relative_to(source) for source in copied):
            yield f"image-script: it lacks {script} of {name}"
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        if not {f"{home}/data", f"{home}/runs", "/tmp"} <= set(paths):
            yield f"mount-paths: {name} mounts its volumes elsewhere than under {home}"
