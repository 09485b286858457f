"""Runs `dinv batch` on Slurm and HyperQueue and compares what they make with what one machine makes.

    cargo build --release
    python integrations/cluster/prove.py slurm          # as root; Debian: slurmctld slurmd slurm-client munge
    python integrations/cluster/prove.py hyperqueue     # pip install hyperqueue
    python integrations/cluster/prove.py efficiency     # 1, 2 and 4 parts on this machine
    just static && python integrations/cluster/prove.py container --program dist/dinv     # as root; Debian: buildah

A Slurm of one controller and four nodes of one core is started in a temporary folder. An array of eight tasks makes 40
pictures of four differences with the demo model. Two tasks are killed and sent again, and one node is drained.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TASKS = 8
USER = 65532  # the user of the image
EFFORT = ["--clip-first", "40", "--steps", "10", "--num-inference-steps", "16", "--checkpoint-every", "2"]


def manifest(folder):
    """40 jobs: ten pictures for each of four differences, which are copied next to the file."""
    suite = ROOT / "demo/benchmark/validation"
    cases = sorted(path for path in suite.iterdir() if (path / "a_prime.png").is_file())
    lines = []
    for case in cases[:4]:
        for other in cases[10:20]:
            paths = {"a": case / "a.png", "a_prime": case / "a_prime.png", "b": other / "b.png"}
            for name, source in paths.items():
                copy = folder / f"{source.parent.name}-{source.name}"
                shutil.copyfile(source, copy)
                paths[name] = copy.name
            lines.append({**paths, "name": f"{case.name}-{other.name}"})
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(program, jobs, made, *more):
    return [str(program), "batch", str(jobs), "-o", str(made), "-q", *EFFORT, *more]


def environment(threads=1):
    return {"DINV_DEMO_MODEL": str(ROOT / "demo/model"), **os.environ, "RAYON_NUM_THREADS": str(threads)}


def contents(made):
    files = [path for path in made.rglob("*") if path.is_file() and not path.name.startswith("times-")]
    return {str(path.relative_to(made)): path.read_bytes() for path in files}


def done(made):
    """How many differences were learned and pictures made, as the runs noted."""
    lines = [json.loads(line) for path in made.glob("times-*.jsonl") for line in path.read_text().splitlines()]
    return [sum(line["kind"] == kind for line in lines) for kind in ["learn", "apply"]]


def whole(program, jobs, folder):
    started = time.monotonic()
    subprocess.run(batch(program, jobs, folder / "whole"), env=environment(), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    found = contents(folder / "whole")
    assert len(found) == 44, sorted(found)
    return found, seconds


def report(engine, made, expected, seconds, what):
    found, (learned, applied) = contents(made), done(made)
    same = sum(found.get(name) == content for name, content in expected.items())
    print(f"{engine}: {what}; {seconds:.0f} s; {same} of {len(expected)} files with the bytes of one machine, "
          f"{len(found) - len(expected)} others; {learned} differences learned, {applied} pictures made")
    assert same == len(expected) == len(found) and (learned, applied) == (4, 40)


class Slurm:
    """One controller and nodes of one core, on this machine."""

    def __init__(self, folder, nodes=4):
        self.folder, self.processes = folder, []
        host = os.uname().nodename.split(".")[0]
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        lines = {
            "ClusterName": "proof", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "SlurmdUser": "root",
            "AuthType": "auth/munge", "AuthInfo": f"socket={folder}/munge.socket", "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core", "ReturnToService": "2", "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool-%n", "SlurmctldPidFile": f"{folder}/controller.pid",
            "SlurmdPidFile": f"{folder}/%n.pid", "SlurmctldLogFile": f"{folder}/controller.log",
            "SlurmdLogFile": f"{folder}/%n.log", "SlurmctldPort": "16817", "KillWait": "20", "RequeueExit": "75",
            "SchedulerParameters": "sched_interval=1",
            "NodeName": f"n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=17001-{17000 + nodes} CPUs=1 State=UNKNOWN",
            "PartitionName": f"all Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP",
        }
        (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        self.environment = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        files = [f"--{name}={folder}/munge.{ending}" for name, ending in
                 [("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")]]
        self.start("munged", "--force", "--foreground", *files)
        time.sleep(1)
        self.start("slurmctld", "-D")
        for number in range(1, nodes + 1):
            (folder / f"spool-n{number}").mkdir()
            self.start("slurmd", "-D", "-N", f"n{number}")
        for _ in range(60):
            time.sleep(0.5)
            if self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(nodes):
                return
        raise SystemExit(f"Slurm did not start: {folder}/controller.log")

    def start(self, *command):
        self.processes.append(subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def ask(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def stop(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(30)

    def running(self):
        """Task number, job and node of each running task."""
        return [line.split() for line in self.ask("squeue", "-h", "-t", "running", "-O", "ArrayTaskID,JobID,NodeList").splitlines()]


def programs():
    """The running processes of `dinv batch`, with their array task."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        task = [word.split(b"=")[1].decode() for word in variables if word.startswith(b"SLURM_ARRAY_TASK_ID=")]
        if b"batch" in words[1:2] and task:
            found.append((int(place.name), task[0]))
    return found


def slurm(program, folder):
    jobs = manifest(folder)
    expected, alone = whole(program, jobs, folder)
    cluster, made = Slurm(folder), folder / "made"
    try:
        cluster.environment["DINV"] = str(program)
        script = Path(__file__).with_name("slurm.sbatch")
        started = time.monotonic()
        cluster.ask("sbatch", f"--output={folder}/%a.out", str(script), str(jobs), str(made), *EFFORT)
        killed, drained = [], None
        while cluster.ask("squeue", "-h"):
            time.sleep(0.5)
            for process, task in programs():
                if len(killed) < 2 and task not in killed and time.monotonic() - started > 4 + 4 * len(killed):
                    job = next((job for number, job, _ in cluster.running() if number == task), None)
                    if job:
                        os.kill(process, signal.SIGKILL)
                        time.sleep(0.5)
                        cluster.ask("scontrol", "requeue", job)
                        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
                        killed.append(task)
            if len(killed) == 2 and drained is None:
                drained = "n4"
                cluster.ask("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=proof")
            if time.monotonic() - started > 900:
                raise SystemExit("the array did not end: " + cluster.ask("squeue"))
        seconds = time.monotonic() - started
    finally:
        cluster.stop()
    what = f"array of {TASKS} on 4 nodes of one core (this machine has {os.cpu_count()}), tasks {' and '.join(killed)} killed and sent again, {drained} drained; one run with one thread {alone:.0f} s"
    report("Slurm", made, expected, seconds, what)
    assert len(killed) == 2 and drained


def hyperqueue(program, folder):
    from hyperqueue import Job, LocalCluster
    from hyperqueue.cluster import WorkerConfig
    jobs, made = manifest(folder), folder / "made"
    expected, alone = whole(program, jobs, folder)
    with LocalCluster() as cluster:
        for _ in range(2):
            cluster.start_worker(WorkerConfig(cores=1))
        client, job = cluster.client(), Job()
        job.program(["true"], stdout=None, stderr=None)  # task 0: Python's interface counts from it, `hq submit --array=1-8` from 1
        for _ in range(TASKS):
            job.program(batch(program, jobs, made, "--shard", f"auto/{TASKS}"), env=environment(), stdout=None, stderr=None)
        started = time.monotonic()
        client.wait_for_jobs([client.submit(job)])
        seconds = time.monotonic() - started
    report("HyperQueue", made, expected, seconds, f"{TASKS} tasks on two workers of one core; one run with one thread {alone:.0f} s")


def efficiency(program, folder):
    """Parts at the same time, each with one thread, beside one run with one thread."""
    jobs = manifest(folder)
    expected, alone = whole(program, jobs, folder)
    print(f"1 part: {alone:.1f} s")
    for parts in [2, 4]:
        made, started = folder / f"made-{parts}", time.monotonic()
        running = [subprocess.Popen(batch(program, jobs, made, "--shard", f"{number}/{parts}"), env=environment(), stdout=subprocess.DEVNULL)
                   for number in range(1, parts + 1)]
        assert not any(process.wait() for process in running)
        seconds = time.monotonic() - started
        cores = min(parts, os.cpu_count())
        print(f"{parts} parts on {cores} cores: {seconds:.1f} s, {alone / seconds:.2f} times as fast, efficiency {alone / seconds / cores:.2f}")
        assert contents(made) == expected and done(made) == [4, 40]


def container(program, folder):
    """Eight parts in the image of the Containerfile, numbered as Kubernetes does: as an unprivileged user, the model read-only."""
    work, made = folder / "work", folder / "work/made"
    work.mkdir()
    jobs = manifest(work)
    expected, alone = whole(program, jobs, folder)
    folder.chmod(0o755)
    os.chown(work, USER, USER)
    (folder / "image").mkdir()
    shutil.copy(program, folder / "image/dinv")

    def buildah(*words, **more):
        command = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, **more).stdout.strip()

    file = Path(__file__).with_name("Containerfile")
    buildah("build", "--isolation", "chroot", "-f", str(file), "-t", "dinv", str(folder / "image"))
    size = json.loads(buildah("images", "--json"))[0]["size"]
    names = [buildah("from", "dinv") for _ in range(2)]
    started = time.monotonic()

    def parts(number):
        for index in range(number, TASKS, 2):
            words = batch("/bin/dinv", "/work/jobs.jsonl", "/work/made", "--shard", f"auto/{TASKS}")
            variables = ["DINV_DEMO_MODEL=/models/demo/model", "RAYON_NUM_THREADS=1", f"JOB_COMPLETION_INDEX={index}"]
            buildah("run", "--isolation", "chroot", *[word for variable in variables for word in ("--env", variable)],
                    "--volume", f"{ROOT}/demo/model:/models/demo/model:ro", "--volume", f"{work}:/work", names[number], "--", *words)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(parts, range(2)))
    seconds = time.monotonic() - started
    owners = {path.stat().st_uid for path in made.rglob("*")}
    assert owners == {USER}, owners
    report("container", made, expected, seconds, f"image of {size}, {TASKS} parts as user {USER}, two at a time; one run outside with one thread {alone:.0f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/dinv")
    parser.add_argument("engine", choices=["slurm", "hyperqueue", "efficiency", "container"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        globals()[arguments.engine](arguments.program.resolve(), Path(folder))


if __name__ == "__main__":
    main()
