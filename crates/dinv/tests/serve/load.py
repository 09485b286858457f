"""Kills `dinv serve` again and again, loads it with clients, and fills its queue and its disk; prints what it found.

    cargo build --release
    python crates/dinv/tests/serve/load.py kills --times 200
    python crates/dinv/tests/serve/load.py clients --minutes 2
    python crates/dinv/tests/serve/load.py jobs --count 1000
    python crates/dinv/tests/serve/load.py posts --count 10000
    python crates/dinv/tests/serve/load.py slow --clients 300
    python crates/dinv/tests/serve/load.py full     # as root, for a small disk of its own

Only Python's standard library is needed. Jobs run on the demo model.
"""

import argparse
import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
OVER = {"done", "failed", "cancelled"}
STEPS = 60  # of a job that is killed, so that ten last for 200 kills


def data_url(name):
    picture = base64.b64encode((ROOT / "demo/images" / name).read_bytes()).decode()
    return f"data:image/png;base64,{picture}"


def children(parent):
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended
        if int(after_name[1]) == parent:
            found.append(int(stat.parent.name))
    return found


class Server:
    """A server on a port of its own."""

    def __init__(self, program, folder, *flags):
        command = [program, "serve", "--dir", folder, "--port", "0", *flags]
        environment = {"DINV_DEMO_MODEL": str(ROOT / "demo/model"), **os.environ}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.port = int(self.process.stdout.readline().strip().rstrip("/").rsplit(":", 1)[1])

    def ask(self, method, path, body=None, headers=None):
        """Status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def job(self, body):
        status, answer = self.ask("POST", "/v1/jobs", body)
        assert status == 202, answer
        return json.loads(answer)["id"]

    def jobs(self):
        return json.loads(self.ask("GET", "/v1/jobs")[1])["jobs"]

    def wait(self):
        while any(job["state"] not in OVER for job in self.jobs()):
            time.sleep(0.2)

    def kill(self, with_job):
        """Kills it, and if asked for its running command; returns how many commands that were."""
        commands = children(self.process.pid) if with_job else []
        self.process.kill()
        for command in commands:
            os.kill(command, signal.SIGKILL)
        self.process.wait()
        return len(commands)

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def memory(self):
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def learning(seed, steps=12):
    settings = {"steps": steps, "clip_first": 5, "checkpoint_every": 1, "seed": seed}
    pair = {"a": data_url("a.png"), "a_prime": data_url("a_prime.png"), "caption_a": "day", "caption_a_prime": "night"}
    return {"kind": "learn", "name": f"seed {seed}", "pairs": [pair], "settings": settings}


def results(server):
    """The tokens' file of each job, by its seed."""
    found = {}
    for job in server.jobs():
        assert job["state"] == "done", job
        names = [result["name"] for result in job["results"] if result["kind"] == "difference"]
        assert len(names) == 1, job
        found[job["request"]["settings"]["seed"]] = server.ask("GET", f"/v1/differences/{names[0].replace(' ', '%20')}")[1]
    return found


def kills(arguments):
    """Ten jobs, and kills at random moments: none lost, none done twice, no half file, the same tokens."""
    with tempfile.TemporaryDirectory() as quiet, tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.program, quiet)
        for seed in range(10):
            server.job(learning(seed, STEPS))
        server.wait()
        expected = results(server)
        server.stop()
        server = Server(arguments.program, folder)
        for seed in range(10):
            server.job(learning(seed, STEPS))
        chance, commands = random.Random(0), 0
        for _ in range(arguments.times):
            time.sleep(chance.uniform(0.05, 1.2))
            commands += server.kill(with_job=chance.random() < 0.5)
            server = Server(arguments.program, folder)
        done_early = sum(job["state"] == "done" for job in server.jobs())
        server.wait()
        found = results(server)
        differences = json.loads(server.ask("GET", "/v1/differences")[1])["differences"]
        server.stop()
        left = [str(path) for path in Path(folder).rglob(".dinv-*")] + [str(path) for path in Path(folder).rglob("*checkpoint*")]
        same = sum(found[seed] == expected[seed] for seed in expected)
        print(f"{arguments.times} kills, {commands} of them with the running command, {done_early} of 10 jobs done before the last: {len(found)} jobs done, {same} with the bytes of "
              f"an undisturbed run, {len(differences)} differences, {len(left)} files left over")
        for path in left:
            print(" ", path)
        assert len(found) == len(differences) == same == 10 and not left


def clients(arguments):
    """Clients that post, follow, cancel and read, while jobs compute."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.program, folder, "--queue", "20")
        for seed in range(3):
            server.job(learning(seed))
        before, end = server.memory(), time.monotonic() + 60 * arguments.minutes
        reads, statuses, memory, lock = [], Counter(), [], threading.Lock()

        def client(number):
            chance = random.Random(number)
            while time.monotonic() < end:
                what = chance.choice(["jobs", "page", "differences", "capabilities", "post", "cancel", "follow", "upload"])
                status = act(what, chance)
                with lock:
                    statuses[what, status] += 1
                time.sleep(chance.uniform(0.1, 0.5))

        def act(what, chance):
            if what == "post":
                return server.ask("POST", "/v1/jobs", learning(chance.randrange(1000)))[0]
            if what == "upload":
                return server.ask("POST", "/v1/read-png", {"picture": data_url("b.png")})[0]
            if what in ["cancel", "follow"]:
                job = chance.choice(server.jobs())["id"]
                if what == "cancel":
                    return server.ask("POST", f"/v1/jobs/{job}/cancel")[0]
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request("GET", f"/v1/jobs/{job}/events")
                answer = connection.getresponse()
                answer.read(100)
                connection.close()
                return answer.status
            path = {"page": "/", "jobs": "/v1/jobs", "differences": "/v1/differences", "capabilities": "/v1/capabilities"}[what]
            started = time.perf_counter()
            status = server.ask("GET", path)[0]
            with lock:
                reads.append((time.perf_counter() - started) * 1000)
            return status

        threads = [threading.Thread(target=client, args=[number]) for number in range(arguments.clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            memory.append(server.memory())
            time.sleep(5)
        for thread in threads:
            thread.join()
        reads.sort()
        quantile = lambda share: reads[min(len(reads) - 1, int(share * len(reads)))]
        print(f"{arguments.clients} clients, {arguments.minutes} minutes: {len(reads)} reads, median {quantile(0.5):.1f} ms, 99th percentile "
              f"{quantile(0.99):.1f} ms, slowest {reads[-1]:.0f} ms; memory {before / 1e6:.0f} MB, at most {max(memory) / 1e6:.0f} MB")
        print(", ".join(f"{what} {status}: {count}" for (what, status), count in sorted(statuses.items())))
        server.stop()
        assert not [status for _, status in statuses if status >= 500], "the server failed"


def jobs(arguments):
    """Many jobs, each removed when it is done: memory."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.program, folder)
        memory = []
        for number in range(arguments.count):
            job = server.job(captioning())
            while json.loads(server.ask("GET", f"/v1/jobs/{job}")[1])["state"] not in OVER:
                time.sleep(0.02)
            assert server.ask("DELETE", f"/v1/jobs/{job}")[0] == 204
            if number % max(1, arguments.count // 10) == 0 or number == arguments.count - 1:
                memory.append(server.memory())
        server.stop()
        print(f"{arguments.count} jobs; memory in MB along the way: {', '.join(f'{bytes / 1e6:.1f}' for bytes in memory)}")
        assert max(memory) < 2 * memory[0], "memory grows"


def captioning():
    return {"kind": "caption", "targets": [{"picture": data_url("b.png")}]}


def posts(arguments):
    """A queue of many jobs behind a long one: what the server takes, and what it then answers."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.program, folder, "--queue", str(arguments.count))
        before = server.memory()
        server.job(learning(0, steps=100_000))
        time.sleep(2)  # until it runs
        started, statuses = time.monotonic(), Counter()
        with ThreadPoolExecutor(8) as pool:
            for status, _ in pool.map(lambda _: server.ask("POST", "/v1/jobs", captioning()), range(arguments.count + 20)):
                statuses[status] += 1
        seconds = time.monotonic() - started

        def timed(path):
            times = []
            for _ in range(20):
                started = time.perf_counter()
                status, _ = server.ask("GET", path)
                assert status == 200, status
                times.append((time.perf_counter() - started) * 1000)
            return max(times)

        newest, everything, memory = timed("/v1/jobs?limit=50"), timed("/v1/jobs"), server.memory()
        server.stop()
        started = time.monotonic()
        server = Server(arguments.program, folder)
        again = time.monotonic() - started
        assert json.loads(server.ask("GET", "/v1/jobs?limit=1")[1])["count"] == arguments.count + 1
        server.kill(with_job=True)
        print(f"{arguments.count} jobs queued at {arguments.count / seconds:.0f} a second, then {statuses[429]} refused; the slowest of 20 answers: 50 jobs {newest:.0f} ms, "
              f"all jobs {everything:.0f} ms; memory {before / 1e6:.0f} MB, then {memory / 1e6:.0f} MB; started again in {again:.1f} s")
        assert statuses == {202: arguments.count, 429: 20}, statuses


def slow(arguments):
    """More clients than the server has places, that ask for a large file and do not read it."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.program, folder)
        library = Path(folder) / "differences"
        with open(library / "large.safetensors", "wb") as large:
            large.truncate(64 << 20)
        sockets = []
        for _ in range(arguments.clients):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(b"GET /v1/differences/large HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            sockets.append(client)
        time.sleep(2)
        peak, started = server.memory(), time.monotonic()
        status, _ = server.ask("GET", "/v1/jobs")
        waited = time.monotonic() - started
        time.sleep(35)
        after = server.memory()
        print(f"{arguments.clients} clients that do not read: another one was answered after {waited:.1f} s; memory {peak / 1e6:.0f} MB, {after / 1e6:.0f} MB when they were given up")
        server.stop()
        assert status == 200


def full(arguments):
    """A full disk: requests are refused, reads are answered, and room makes it work again."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
        try:
            server = Server(arguments.program, folder, "--queue", "1000")
            held = server.job(learning(0, steps=100_000))
            statuses = Counter(server.ask("POST", "/v1/jobs", captioning())[0] for _ in range(400))
            answered = [server.ask("GET", path)[0] for path in ["/", "/v1/jobs", "/v1/differences", "/v1/models"]]
            for job in server.jobs():
                if job["id"] != held:
                    assert server.ask("DELETE", f"/v1/jobs/{job['id']}")[0] == 204
            server.ask("POST", f"/v1/jobs/{held}/cancel")
            job = server.job(captioning())
            server.wait()
            state = json.loads(server.ask("GET", f"/v1/jobs/{job}")[1])["state"]
            left = len(list((Path(folder) / "jobs").iterdir()))
            server.stop()
        finally:
            subprocess.run(["umount", folder], check=True)
        print(f"a disk of 1 MB: posts {dict(statuses)}, reads {answered}; after removing jobs, a new one is {state}; {left} folders of 2 jobs")
        assert set(statuses) == {202, 507} and set(answered) == {200} and state == "done" and left == 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=ROOT / "target/release/dinv")
    kinds = parser.add_subparsers(required=True)
    of_kills = kinds.add_parser("kills")
    of_kills.add_argument("--times", type=int, default=200)
    of_kills.set_defaults(run=kills)
    of_clients = kinds.add_parser("clients")
    of_clients.add_argument("--clients", type=int, default=50)
    of_clients.add_argument("--minutes", type=float, default=2)
    of_clients.set_defaults(run=clients)
    of_jobs = kinds.add_parser("jobs")
    of_jobs.add_argument("--count", type=int, default=1000)
    of_jobs.set_defaults(run=jobs)
    of_posts = kinds.add_parser("posts")
    of_posts.add_argument("--count", type=int, default=10_000)
    of_posts.set_defaults(run=posts)
    of_slow = kinds.add_parser("slow")
    of_slow.add_argument("--clients", type=int, default=300)
    of_slow.set_defaults(run=slow)
    of_full = kinds.add_parser("full")
    of_full.set_defaults(run=full)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
