#!/usr/bin/env python3
"""Kubernetes on Google Cloud: node pools of TPU slices or GPUs, and a JobSet that trains on them.

    launch/gke.py run --name wan --type v5p:8x8x8 --image IMAGE --bucket BUCKET -- \\
        sora-jax train --config configs/t2v_14b.py --workdir /mnt/sora/t2v_14b

The manifest is made here and not by a template: a command line has quotes and colons of its own,
and json.dumps gets them all right, which kubectl reads as it reads YAML. Without PyYAML it needs
only python3. XPK makes clusters and JobSets too, from a command line of its own; this one knows
statuses 75 and 2, and prints what it would do.
"""

import argparse
import json
import sys

import shell
import slices

JOBSET = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
PORT = 8476  # of JAX's coordinator, among GPUs; TPUs find each other by what GKE tells them
GROUP = "slice"  # the JobSet's one group of Jobs, one Job a slice
ACTIONS = {
    "create": "make the cluster (if it is not there), JobSet's controller and a node pool a slice",
    "run": "apply the JobSet; unchanged, that changes nothing",
    "watch": "follow the log of the first host",
    "stop": "delete the JobSet; the run saves its checkpoint first",
    "delete": "delete the JobSet and the node pools, and stop paying for them",
}


def parser() -> argparse.ArgumentParser:
    top = shell.action_parser(
        "launch/gke.py", "--name NAME [OPTIONS] [-- COMMAND [ARGUMENT ...]]", __doc__, ACTIONS
    )
    add = top.add_argument
    add("--name", required=True, type=shell.check_name, help="of JobSet and node pools")
    kind = top.add_mutually_exclusive_group()
    kind.add_argument("--type", metavar="CHIP:TOPOLOGY", help="TPUs, as `sora-jax plan` has it")
    kind.add_argument("--gpu", metavar="NAME", help=f"hosts of 8: {', '.join(slices.GPUS)}")
    add("--slices", type=int, default=1, metavar="N", help="of TPUs, joined over the network")
    add("--hosts", type=int, default=1, metavar="N", help="of GPUs")
    add("--image", help="container image (launch/Containerfile) that the hosts can pull")
    add("--namespace", default="default")
    add("--service-account", default="default", metavar="NAME", help="of the pods")
    disk = top.add_mutually_exclusive_group()
    disk.add_argument("--bucket", metavar="NAME", help=f"mounted at {shell.MOUNT} by gcsfuse")
    disk.add_argument("--nfs", metavar="SERVER:/SHARE", help=f"mounted at {shell.MOUNT}")
    add(
        "--secret",
        action="append",
        default=[],
        type=shell.check_secret,
        metavar="VARIABLE=SECRET/KEY",
        help="set VARIABLE from a Secret of the namespace; may be repeated",
    )
    add("--restarts", type=int, default=10, metavar="K", help="after crashes; preemptions are free")
    add("--grace", type=int, default=120, metavar="S", help="seconds to save in after SIGTERM")
    add("--dry-run", action="store_true", help="print every command and the manifest, run none")
    cluster = top.add_argument_group("create and delete")
    cluster.add_argument("--cluster", type=shell.check_name, help="default: NAME")
    cluster.add_argument("--location", help="region or zone of the cluster, such as us-east5")
    cluster.add_argument("--zone", help="of the nodes, such as us-east5-a")
    cluster.add_argument("--project")
    cluster.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    cluster.add_argument("--reservation", metavar="NAME")
    cluster.add_argument("--with-cluster", action="store_true", help="delete the cluster too")
    return top


def manifest(args, command: list[str]) -> dict:
    """The JobSet, as `kubectl apply` takes it.

    Raises:
      ValueError: no accelerator or no image, or --secret of another form.
    """
    if not args.image:
        raise ValueError("--image is missing; build one from launch/Containerfile and push it.")
    hosts, selector, resources, environment = accelerator(args)
    labels = {"app.kubernetes.io/name": "sora-jax", "app.kubernetes.io/instance": args.name}
    container = {
        "name": "train",
        "image": args.image,
        "command": command,
        "env": [*environment, *map(secret, args.secret)],
        "resources": {"limits": resources},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "serviceAccountName": args.service_account,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": args.grace,
        "nodeSelector": selector,
        "containers": [container],
        # Reader processes hand batches over in shared memory, of which a pod has 64 MiB.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.type:
        # The device files of TPUs belong to root.
        container["securityContext"] = {"runAsUser": 0, "privileged": True}
    else:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    annotations = {}
    if volume := disk(args):
        pod["volumes"].append(volume)
        container["volumeMounts"].append({"name": "disk", "mountPath": shell.MOUNT})
        annotations = {"gke-gcsfuse/volumes": "true"} if args.bucket else {}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": pod_rules()},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "namespace": args.namespace,
            "labels": labels,
            # A slice is a node pool, and takes one Job.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": restart_rules()},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {
                    "name": GROUP,
                    "replicas": args.slices if args.type else 1,
                    "template": {"metadata": {"labels": labels}, "spec": job},
                }
            ],
        },
    }


def pod_rules() -> list[dict]:
    """What ends a Job: a mistake (rule 0), a wish to be restarted, a host that was taken away."""

    def codes(*values: int) -> dict:
        return {"containerName": "train", "operator": "In", "values": list(values)}

    return [
        {"action": "FailJob", "onExitCodes": codes(*shell.MISTAKES)},
        {"action": "FailJob", "onExitCodes": codes(shell.RESTART)},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def restart_rules() -> list[dict]:
    """What follows: an end after a mistake; a restart that is free; else one that counts."""
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    return [
        {
            "name": "mistake",
            "action": "FailJobSet",
            # Kubernetes' message names the rule of the list above.
            "onJobFailureMessagePatterns": [".*rule at index 0.*"],
            **by_policy,
        },
        {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_policy},
    ]


def accelerator(args) -> tuple[int, dict, dict, list[dict]]:
    """Hosts of a Job, their labels, what a host gives, and variables by which they meet."""
    if args.type:
        wanted = slices.parse(args.type)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": wanted.chip.gke,
            "cloud.google.com/gke-tpu-topology": wanted.topology,
        }
        return wanted.hosts, selector, {"google.com/tpu": wanted.chips_a_host}, []
    label, _ = gpu(args)
    rank = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    first = f"{args.name}-{GROUP}-0-0.{args.name}:{PORT}"
    environment = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
        {"name": "JAX_NUM_PROCESSES", "value": str(args.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": rank}},
    ]
    selector = {"cloud.google.com/gke-accelerator": label}
    return args.hosts, selector, {"nvidia.com/gpu": slices.GPUS_A_HOST}, environment


def gpu(args) -> tuple[str, str]:
    """Node label and machine type of --gpu."""
    if not args.gpu:
        raise ValueError("--type or --gpu is missing; give one, such as --type v5p:4x4x8.")
    return slices.find_gpu(args.gpu)


def secret(text: str) -> dict:
    variable, _, name = text.partition("=")
    name, slash, key = name.partition("/")
    if not slash or not key or "/" in key:
        raise ValueError(f"--secret {text}: write VARIABLE=SECRET/KEY, of a Secret in Kubernetes.")
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def disk(args) -> dict | None:
    if args.bucket:
        # Checkpoints are folders that are renamed, which gcsfuse refuses without a limit.
        options = "implicit-dirs,rename-dir-limit=200000"
        attributes = {"bucketName": args.bucket, "mountOptions": options}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        return {"name": "disk", "csi": driver}
    if args.nfs:
        server, _, share = args.nfs.partition(":")
        if not share.startswith("/"):
            raise ValueError(f"--nfs {args.nfs}: write SERVER:/SHARE.")
        return {"name": "disk", "nfs": {"server": server, "path": share}}
    return None


def located(args) -> list[str]:
    if not args.location:
        raise ValueError("--location is missing; give the cluster's region, such as us-east5.")
    return [f"--location={args.location}", *project(args)]


def project(args) -> list[str]:
    return [f"--project={args.project}"] if args.project else []


def pools(args) -> list[str]:
    return [f"{args.name}-{i}" for i in range(args.slices if args.type else 1)]


def create(sh: shell.Shell, args) -> None:
    """Cluster, controller and node pools, each unless it is there."""
    accelerator(args)
    where = located(args)
    cluster = args.cluster or args.name
    clusters = ("gcloud", "container", "clusters")
    if not sh.exists(*clusters, "describe", cluster, *where):
        if not args.project:
            raise ValueError(
                "--project is missing; a new cluster's pods have their accounts in it."
            )
        sh.run(
            *(*clusters, "create", cluster, *where, "--num-nodes=1"),
            *("--machine-type=e2-standard-8", "--addons=GcsFuseCsiDriver"),
            f"--workload-pool={args.project}.svc.id.goog",
        )
    sh.run(*clusters, "get-credentials", cluster, *where)
    sh.run("kubectl", "apply", "--server-side", "--filename", JOBSET)
    policy = workload_policy(sh, args)
    for pool in pools(args):
        command = ("gcloud", "container", "node-pools")
        here = (pool, f"--cluster={cluster}", *where)
        if not sh.exists(*command, "describe", *here):
            sh.run(*command, "create", *here, *nodes(args), *policy)


def workload_policy(sh: shell.Shell, args) -> list[str]:
    """What places the hosts of a tpu7x slice, which take no --tpu-topology; made unless there."""
    if not args.type or slices.parse(args.type).name != "tpu7x":
        return []
    region = f"--region={'-'.join(args.location.split('-')[:2])}"
    policies = ("gcloud", "compute", "resource-policies")
    if not sh.exists(*policies, "describe", args.name, region, *project(args)):
        topology = f"--accelerator-topology={slices.parse(args.type).topology}"
        sh.run(
            *(*policies, "create", "workload-policy", args.name, "--type=HIGH_THROUGHPUT"),
            *(topology, region, *project(args)),
        )
    return [f"--placement-policy={args.name}"]


def nodes(args) -> list[str]:
    """Options of a node pool: its machines, how many, and how they are laid out."""
    if args.type:
        wanted = slices.parse(args.type)
        shape = [f"--machine-type={wanted.machine}", f"--num-nodes={wanted.hosts}"]
        if wanted.hosts > 1 and wanted.name != "tpu7x":
            shape.append(f"--tpu-topology={wanted.topology}")
    else:
        label, machine = gpu(args)
        kind = f"--accelerator=type={label},count={slices.GPUS_A_HOST},gpu-driver-version=latest"
        shape = [f"--machine-type={machine}", f"--num-nodes={args.hosts}", kind]
    if args.spot and args.reservation:
        raise ValueError("--spot and --reservation: give one of them.")
    reservation = f"--reservation-affinity=specific,--reservation={args.reservation}".split(",")
    return [
        *shape,
        *([f"--node-locations={args.zone}"] if args.zone else []),
        *(["--spot"] if args.spot else []),
        *(reservation if args.reservation else []),
        # Pods read the bucket by accounts of their own.
        "--workload-metadata=GKE_METADATA",
    ]


def run(sh: shell.Shell, args, command: list[str]) -> None:
    text = json.dumps(manifest(args, shell.as_one_job(command)), indent=2) + "\n"
    sh.run("kubectl", "apply", "--filename", "-", stdin=text)


def watch(sh: shell.Shell, args) -> int:
    space = f"--namespace={args.namespace}"
    sh.run("kubectl", "get", "jobset", args.name, space, "--output=wide")
    first = (
        f"jobset.sigs.k8s.io/jobset-name={args.name},jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0"
    )
    follow = ("--follow", "--tail=20", "--container=train", "--pod-running-timeout=30m")
    return sh.run("kubectl", "logs", f"--selector={first}", space, *follow, check=False)


def stop(sh: shell.Shell, args) -> None:
    space = f"--namespace={args.namespace}"
    sh.run("kubectl", "delete", "jobset", args.name, space, "--ignore-not-found")


def delete(sh: shell.Shell, args) -> None:
    """JobSet, node pools and on request the cluster, as far as they are there."""
    accelerator(args)
    where = located(args)
    cluster = args.cluster or args.name
    stop(sh, args)
    for pool in pools(args):
        here = (pool, f"--cluster={cluster}", *where)
        if sh.exists("gcloud", "container", "node-pools", "describe", *here) or sh.dry_run:
            sh.run("gcloud", "container", "node-pools", "delete", *here, "--quiet")
    if args.with_cluster:
        there = sh.exists("gcloud", "container", "clusters", "describe", cluster, *where)
        if there or sh.dry_run:
            sh.run("gcloud", "container", "clusters", "delete", cluster, *where, "--quiet")


def main(argv: list[str]) -> int:
    options, command = shell.split_command(argv)
    args = parser().parse_args(options)
    sh = shell.Shell(dry_run=args.dry_run)
    try:
        if min(args.slices, args.hosts) < 1 or min(args.restarts, args.grace) < 0:
            raise ValueError(
                "--slices and --hosts take 1 or more, --restarts and --grace 0 or more."
            )
        if command and args.action != "run":
            raise ValueError(f"`{args.action}` takes no command; `run` does.")
        if args.action == "run":
            run(sh, args, command)
        elif args.action == "watch":
            return watch(sh, args)
        else:
            {"create": create, "stop": stop, "delete": delete}[args.action](sh, args)
    except ValueError as error:
        print(f"launch/gke.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launch/gke.py: left; the run goes on, and so does the bill.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
