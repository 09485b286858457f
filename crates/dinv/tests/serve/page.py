"""Uses the page of `dinv serve` in a real browser, with the demo model, and checks what a user would see.

    cargo build --release
    python crates/dinv/tests/serve/page.py --out screenshots

Needs the packages `playwright` and `axe-playwright-python`, and Chromium (`--browser` names it). Every state is
photographed at three widths, light and dark, and checked by axe-core for accessibility.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[4]
WIDTHS = [360, 768, 1440]
MINUTES = 60_000  # milliseconds


class Server:
    def __init__(self, program, folder):
        command = [program, "serve", "--dir", folder, "--port", "0"]
        environment = {
            "DINV_DEMO_MODEL": str(ROOT / "demo/model"), **os.environ, "HF_HOME": f"{folder}/hub", "HF_ENDPOINT": "http://127.0.0.1:9",
        }
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        self.url = self.process.stdout.readline().split()[-1]

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


class Watcher:
    """Photographs a state of the page, and collects what is wrong with it."""

    def __init__(self, page, out):
        self.page, self.out, self.problems = page, out, []
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("console", lambda message: message.type == "error" and self.problems.append(f"console: {message.text}"))

    def look(self, state):
        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 900})
            for scheme in ["light", "dark"]:
                self.page.emulate_media(color_scheme=scheme)
                self.page.screenshot(path=self.out / f"{state}-{width}-{scheme}.png", full_page=True)
                for violation in Axe().run(self.page).response["violations"]:
                    nodes = "; ".join(node["html"][:100] for node in violation["nodes"][:3])
                    self.problems.append(f"{state}, {width}, {scheme}: {violation['id']}: {violation['help']}: {nodes}")
            wide = self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            if wide:
                self.problems.append(f"{state}, {width}: the page scrolls sideways")


def drop(page, target, path):
    """Drops a file or a folder of this machine, as a user does."""
    box = target.bounding_box()
    session = page.context.new_cdp_session(page)
    for kind in ["dragEnter", "dragOver", "drop"]:
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})


def newest(page):
    return page.locator("article.job").first


def done(card):
    expect(card.locator(".state")).to_have_text("done", timeout=5 * MINUTES)


def use(page, server, watcher, restarted):
    pictures = ROOT / "demo/images"
    page.goto(server.url)
    expect(page.locator("#hint")).to_contain_text("Choose two pictures")
    expect(page.locator("#go")).to_be_disabled()
    watcher.look("empty")
    for key in ["a", "a_prime", "b"]:
        page.locator(f"#tile-{key} input[type=file]").set_input_files(pictures / f"{key}.png")
    expect(page.locator("#go")).to_be_enabled()
    watcher.look("chosen")
    page.locator("#tile-a").get_by_role("button", name="Describe").click()
    expect(page.locator("#tile-a .caption input")).not_to_have_value("", timeout=MINUTES)
    page.locator("#settings-box summary").click()
    page.locator("#find").fill("guidance")
    page.locator("#find").press("Enter")  # is a search and no job
    page.locator("#find").fill("")
    page.locator("#settings-box summary").click()
    jobs = page.evaluate("fetch('/v1/jobs').then((answer) => answer.json())")
    assert jobs["count"] == 0, jobs  # the job that described A is gone, too

    expect(page.locator("#model-note")).to_contain_text("of memory")
    page.locator("#model").select_option("sdxl")
    expect(page.locator("#model-note")).to_contain_text("to download")
    expect(page.get_by_role("button", name="Download", exact=True)).to_be_visible()
    watcher.look("large-model")
    page.locator("#model").select_option("sd21")
    page.get_by_role("button", name="Download", exact=True).click()
    card = page.locator("article.job").filter(has_text="Download")
    expect(card.locator("h3")).to_have_text("sd21")
    expect(page.locator("#tile-result")).to_contain_text("appears here")
    # There is no Hub behind the address that the server was given.
    expect(card.locator(".state")).to_have_text("failed", timeout=MINUTES)
    watcher.look("download-failed")
    card.get_by_role("button", name="Delete").click()
    expect(page.locator("article.job")).to_have_count(0)
    page.locator("#model").select_option("demo")
    expect(page.get_by_role("button", name="Download", exact=True)).to_be_hidden()

    page.locator("#draft").click()
    done(newest(page))
    expect(newest(page).locator("time")).to_contain_text("(draft)")
    expect(page.locator("#tile-result img")).to_be_visible()
    watcher.look("draft")
    page.evaluate("""() => {
        const drawing = () => document.querySelector("#tile-result img[alt='B′ as it is being drawn']");
        window.previews = new Set();
        const note = () => { const image = drawing(); if (image) window.previews.add(image.src); };
        new MutationObserver(note).observe(document.body, { childList: true, subtree: true });
    }""")
    newest(page).get_by_role("button", name="Refine").click()
    expect(page.locator("article.job")).to_have_count(2)
    expect(newest(page).locator("svg.loss").or_(newest(page).locator("details.more"))).to_be_attached(timeout=5 * MINUTES)
    watcher.look("learning")
    done(newest(page))
    assert page.evaluate("window.previews.size") > 1, "the picture was not shown while it was drawn"

    newest(page).get_by_role("button", name="Strengths").click()
    expect(page.locator("article.job")).to_have_count(3)
    done(newest(page))
    expect(newest(page).locator(".strip button.picture")).to_have_count(7)
    watcher.look("strip")
    page.set_viewport_size({"width": 1100, "height": 1024})
    page.emulate_media(color_scheme="light")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # for transitions of colour
    page.screenshot(path=watcher.out / "page.png")  # docs/images/page.png
    newest(page).get_by_role("button", name="Undo on B").click()
    expect(page.locator("article.job")).to_have_count(4)
    done(newest(page))
    newest(page).locator("button.picture").last.click()
    expect(page.locator("#viewer")).to_be_visible()
    page.locator("#slide").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#slide")).to_have_value("51")
    watcher.look("viewer")
    with page.expect_download() as saved:
        page.locator("#save").click()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()

    server = restarted(server)
    page.goto(server.url)
    expect(page.locator("article.job")).to_have_count(4)
    page.locator("#restore").set_input_files(saved.value.path())
    expect(page.locator("#changed")).to_contain_text("changed")
    expect(page.locator("#setting-reverse")).to_have_value("true")
    expect(page.locator("#setting-num-inference-steps")).to_have_value(re.compile(r"\d+"))
    page.locator("#defaults").click()
    page.locator(".difference").first.get_by_role("button", name="Export").click()
    expect(page.locator("#programs article")).to_have_count(1)  # diffusers opens the demo model
    page.locator("#back").check()
    expect(page.locator("#programs")).to_contain_text("-back>")
    page.locator("#word").fill("not a word")
    page.keyboard.press("Tab")
    expect(page.locator("#exports-problem")).to_contain_text("letters")
    page.locator("#word").fill("my-word")
    page.keyboard.press("Tab")
    expect(page.locator("#programs")).to_contain_text("<my-word>")
    watcher.look("exports")
    with page.expect_download() as saved:
        page.locator("#programs .files a").first.click()
    assert Path(saved.value.path()).stat().st_size > 1000
    page.locator("#exports-close").click()

    for key in ["a", "a_prime"]:
        page.locator(f"#tile-{key} input[type=file]").set_input_files(pictures / f"{key}.png")
    page.locator("#tile-b input[type=file]").set_input_files([pictures / "b.png", pictures / "a.png"])
    watcher.look("many-new")
    page.locator("#draft").click()
    done(newest(page))
    expect(newest(page).locator("button.picture")).to_have_count(2)
    page.get_by_role("button", name="Clear").click()
    page.locator("#tab-use").click()
    page.get_by_label("Difference", exact=True).select_option(index=1)
    page.locator("#tile-b input[type=file]").set_input_files([pictures / "b.png", pictures / "a.png"])
    watcher.look("many")
    page.get_by_role("button", name="Clear").click()
    with tempfile.TemporaryDirectory() as folder:
        for name in ["b.png", "a.png"]:
            shutil.copy(pictures / name, folder)
        drop(page, page.locator("#tile-b .drop"), folder)
        expect(page.locator("#tile-b .many img")).to_have_count(2)
    page.get_by_label("Difference", exact=True).select_option(index=1)
    page.locator("#all").check()
    page.locator("#setting-num-inference-steps").fill("900")
    page.locator("#go").click()
    expect(newest(page).locator(".state")).to_have_text("running", timeout=MINUTES)
    newest(page).get_by_role("button", name="Cancel").click()
    expect(newest(page).locator(".state")).to_have_text("cancelled", timeout=MINUTES)
    page.locator("#setting-num-inference-steps").fill("0")
    page.locator("#go").click()
    expect(page.locator("#problem")).to_contain_text("num_inference_steps")
    watcher.look("refused")
    return server


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=ROOT / "target/release/dinv")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        def restarted(server):
            server.stop()
            return Server(arguments.program, folder)

        server = Server(arguments.program, folder)
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        try:
            page = browser.new_page(accept_downloads=True)
            watcher = Watcher(page, arguments.out)
            server = use(page, server, watcher, restarted)
        finally:
            browser.close()
            server.stop()
    problems = [problem for problem in watcher.problems if "422" not in problem]  # the refusal that is asked for
    for problem in problems:
        print(problem)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
