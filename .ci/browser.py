"""The tutorials in a real JupyterLab and a real browser: `python .ci/browser.py [notebook ...]`, by default all of nbs/tutorials.

All cells of each are run by the menu, and none may fail or be left out. Widgets are then moved as a reader would (a slider dragged, a sentence typed, a picture clicked), and what
they show has to follow. Pictures of all of it, in the light theme and in the dark, go to _browser. The browser is the system's Chromium or Chrome, driven by Playwright; none is
fetched. JupyterLab works on a copy, with settings of its own, so neither the notebooks nor the reader's JupyterLab are touched."""
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from time import sleep

import nbformat

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "_browser"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, HIGH, PATIENCE = 1280, 900, 1200   # pixels of the window; seconds that a notebook may run


class Fault(Exception): "What a reader would have stumbled over."


def find_browser():
    "The path of a Chromium or Chrome; CHROMIUM names it where it is elsewhere."
    found = [path for name in (os.environ.get("CHROMIUM"), *BROWSERS) if name and (path := shutil.which(name))]
    if not found: raise SystemExit("browser: no Chromium or Chrome on this machine; install one (Debian: apt-get install chromium) or name it by CHROMIUM=path")
    return found[0]


# JupyterLab

@contextmanager
def jupyterlab(folder):
    "A server on this machine over a copy of nbs; yields its address, token and the copy."
    copy, home = folder / "nbs", folder / "jupyter"
    shutil.copytree(ROOT / "nbs", copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    settings = home / "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {f"JUPYTER_{name}_DIR": str(home) for name in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CALA_")} | places
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={copy}"]
    with open(folder / "lab.log", "w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        signal.signal(signal.SIGTERM, lambda *_: (server.terminate(), os._exit(143)))   # whoever ends us ends JupyterLab
        try: yield address(server, home, folder / "lab.log"), copy
        finally: server.terminate(); server.wait(30)


def address(server, home, log, patience=180):
    "Where a server that is starting listens, and its token."
    for _ in range(patience * 10):
        if server.poll() is not None: raise SystemExit(f"browser: JupyterLab did not start:\n{log.read_text()[-2000:]}")
        for path in home.glob("jpserver-*.json"):
            try: found = json.loads(path.read_text())
            except ValueError: continue   # still being written
            return found["url"], found["token"]
        sleep(0.1)
    raise SystemExit(f"browser: JupyterLab did not start within {patience} s:\n{log.read_text()[-2000:]}")


def menu(page, name, *items):
    "Choose from a menu, as a reader would."
    page.locator(".lm-MenuBar-item").get_by_text(name, exact=True).click()
    for item in items: page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def open_notebook(page, url, token, path):
    "Open one notebook, alone, and wait for its kernel."
    page.goto(f"{url}lab/workspaces/{path.stem}/tree/tutorials/{path.name}?token={token}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()   # asked before, JupyterLab would want to know which kernel


def run_all(page, look):
    "Run all cells by the menu; `look` is called again and again while they run."
    pending = page.locator(".jp-InputPrompt", has_text="[*]:")
    menu(page, "Run", "Run All Cells")
    pending.first.wait_for(state="attached")
    end = monotonic() + PATIENCE
    while pending.count():
        if monotonic() > end: raise Fault(f"still running after {PATIENCE} s")
        look()
        sleep(0.2)


def saved(page, path):
    "The notebook as JupyterLab writes it."
    page.locator('.jp-NotebookPanel-toolbar [data-command="docmanager:save"]').click()
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    return nbformat.read(path, as_version=4)


def faults(notebook):
    "Cells that failed or were never run: a line each."
    for n, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip(): continue
        wrong = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"] or ["was not run"] * (cell.execution_count is None)
        yield from (f"cell {n} ({cell.source.splitlines()[0][:60]}): {what}" for what in wrong)


# What a widget shows, and whether it follows

LOOK = """async widget => {
  const digest = async img => [...new Uint8Array(await crypto.subtle.digest("SHA-1", await (await fetch(img.src)).arrayBuffer()))].map(b => b.toString(16).padStart(2, "0")).join("");
  return {pictures: await Promise.all([...widget.querySelectorAll("img")].map(digest)),
          said: widget.innerText, sentence: widget.querySelector("input[type=text]")?.value}
}"""


def look(widget):
    "Fingerprints of a widget's pictures, its words and its sentence; None in the moment in which a picture is replaced."
    try: return widget.evaluate(LOOK)
    except Exception as error:
        if "fetch" in str(error): return None
        raise


def until(widget, true, what, patience=180):
    "What the widget shows once that is so, the kernel is idle and nothing moves any more."
    idle, last, end = widget.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]'), None, monotonic() + patience
    while monotonic() < end:
        sleep(0.3)
        now = look(widget) if idle.count() else None
        if now and now == last and true(now): return now
        last = now
    raise Fault(what)


def after(widget, act, what, changes="pictures"):
    "What the widget shows after a move; its pictures, or its words, have to be others."
    before = until(widget, bool, "the kernel does not come to rest")
    act()
    return until(widget, lambda now: now[changes] != before[changes], f"{what}, and the {'words' if changes == 'said' else changes} stay as they were")


def need(true, what):
    if not true: raise Fault(what)


def drag(page, widget, share, which=0):
    "Drag a slider's handle to a share of its track."
    handle, track = (widget.locator(part).nth(which).bounding_box() for part in (".noUi-handle", ".noUi-base"))
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2, steps=8)
    page.mouse.up()


def type_in(widget, sentence):
    box = widget.locator("input[type=text]").first
    box.fill(sentence)
    box.press("Enter")


def move_explorer(page, widget, shot):
    "A slider, a sentence, an association, a picture: each has to change the ranking."
    first = until(widget, bool, "the kernel does not come to rest")
    shot("as it opens")
    slid = after(widget, lambda: drag(page, widget, 0.6), "the slider was dragged")
    need(slid["sentence"] != first["sentence"] and slid["pictures"][1:] != first["pictures"][1:], "another triplet, and its sentence or ranking is still the old one")
    shot("slider dragged")
    for sentence in (first["sentence"], "add a large red star in the centre", "make everything small"):   # each has other scores; not each has other answers
        typed = after(widget, lambda: type_in(widget, sentence), "a sentence was typed", changes="said")
        need(typed["pictures"][0] == slid["pictures"][0], "a sentence was typed, and the reference changed")
        if typed["pictures"] != slid["pictures"]: break
    need(typed["pictures"] != slid["pictures"], "sentences were typed, and the ranking is still the old one")
    shot("sentence typed")
    back = after(widget, lambda: type_in(widget, slid["sentence"]), "the old sentence was typed again")
    need(back["pictures"] == slid["pictures"], "the old sentence does not bring the old ranking back")
    votes = widget.locator("input[type=checkbox]:enabled")
    if votes.count():
        votes.last.check()
        until(widget, lambda now: now["said"] != back["said"], "an association was added, and no score changed")
        shot("an association votes")
        votes.last.uncheck()
        until(widget, lambda now: now == back, "an association was added and removed, and the ranking is not what it was")
    clicked = after(widget, lambda: widget.locator("button").nth(3).click(), "a picture was clicked")
    need(clicked["pictures"][0] == back["pictures"][3], "the picture that was clicked is not the reference now")
    need(clicked["pictures"][1:] != back["pictures"][1:], "a picture was clicked, and the ranking is still the old one")
    shot("third answer clicked")


def move_triplets(page, widget, shot):
    "A kind of edit, a word, the next one."
    shot("as it opens")
    after(widget, lambda: widget.locator("select").select_option("colour"), "a kind was chosen")
    typed = after(widget, lambda: type_in(widget, "orange"), "a word was typed", changes="said")   # how many there are
    need("1 of " in typed["said"], "a filtered list does not begin at its first triplet")
    after(widget, lambda: widget.get_by_role("button", name="next").click(), "next was pressed")
    shot("filtered, second")


def move_atlas(page, widget, shot):
    "A triplet, a sentence, another token, every sheet."
    first = until(widget, bool, "the kernel does not come to rest")
    shot("as it opens")
    slid = after(widget, lambda: drag(page, widget, 0.3), "the slider was dragged")
    need(slid["sentence"] != first["sentence"], "another triplet with the old sentence")
    after(widget, lambda: drag(page, widget, 0.7, which=1), "the slider of the hinge's query was dragged")
    shot("another query of the hinge")
    for sheet in ("twins", "looks of the reference", "looks of the target"):
        after(widget, lambda: widget.get_by_role("button", name=sheet).click(), f"the sheet {sheet} was chosen")
        shot(sheet)
    widget.get_by_role("button", name="looks of the reference").click()
    after(widget, lambda: type_in(widget, "make everything small"), "a sentence was typed")
    shot("sentence typed")


WIDGETS = {"explorer": ('.lm-Widget.widget-vbox:has(> .widget-hbox input[type="checkbox"])', move_explorer),
           "triplets": ('.lm-Widget.widget-vbox:has(> .widget-hbox input[placeholder="words in the sentence"])', move_triplets),
           "atlas": (".lm-Widget.widget-vbox:has(> .widget-hbox .widget-toggle-buttons)", move_atlas)}
PANEL = ".lm-Widget.widget-vbox:has(> .widget-hprogress)"
EXPECTED = {"first_run": ["triplets", "panel", "examples", "explorer"], "attention_atlas": ["atlas"]}   # a widget that does not come at all is a fault too


def panel_watcher(page):
    "A function that looks at the training panel, if there is one, and a list of what it saw: how many pictures, which words."
    seen, panel = [], page.locator(PANEL)
    def watch():
        if not panel.count(): return
        if not seen: panel.first.scroll_into_view_if_needed()
        seen.append((panel.locator("img").count(), panel.first.inner_text()))
    return watch, seen


# One notebook, all of it

def picture_of_all(page, path):
    "The whole notebook in one picture, down to the longest that a browser can draw."
    height = page.evaluate("Math.max(...[...document.querySelectorAll('.jp-Notebook, .jp-WindowedPanel-outer')].map(part => part.scrollHeight))")
    page.set_viewport_size(dict(width=WIDE, height=min(height + 300, 16_000)))
    page.evaluate("for (const part of document.querySelectorAll('.jp-WindowedPanel-outer')) part.scrollTop = 0")
    sleep(0.5)
    whole, last = (page.locator(part).last.bounding_box() for part in (".jp-NotebookPanel-notebook", ".jp-Notebook .jp-Cell"))
    page.screenshot(path=path, clip=whole | dict(height=min(last["y"] + last["height"], 16_000) - whole["y"]))
    page.set_viewport_size(dict(width=WIDE, height=HIGH))


def visit(page, url, token, path):
    "Run a notebook, move its widgets, picture it; raises a Fault at the first that a reader would notice."
    open_notebook(page, url, token, path)
    watch, seen = panel_watcher(page)
    run_all(page, watch)
    if found := list(faults(saved(page, path))): raise Fault("\n    ".join(found))
    there = [name for n, name in enumerate(("panel", "examples")) if any(pictures > n and "loss" in said for pictures, said in seen)]
    for name, (selector, move) in WIDGETS.items():
        for n, widget in enumerate(page.locator(selector).all()):
            there.append(name)
            widget.scroll_into_view_if_needed()
            move(page, widget, lambda moment: widget.screenshot(path=PICTURES / f"{path.stem} {name}{n or ''} {moment}.png".replace(" ", "-")))
    need(not page.get_by_text("Error displaying widget").count(), "JupyterLab says: Error displaying widget")
    absent = set(EXPECTED.get(path.stem, [])) - set(there)
    need(not absent, f"no {', '.join(sorted(absent))} to be seen" + " while the cells ran" * bool({"panel", "examples"} & absent))
    for theme in ("Light", "Dark"):
        menu(page, "Settings", "Theme", f"JupyterLab {theme}")
        page.locator(f'body[data-jp-theme-name="JupyterLab {theme}"]').wait_for(state="attached")
        picture_of_all(page, PICTURES / f"{path.stem}-{theme.lower()}.png")
    return there


def main(names):
    try: from playwright.sync_api import sync_playwright
    except ImportError: raise SystemExit('browser: no Playwright here; pip install -e ".[browser]" (make browser does)')
    executable, failed = find_browser(), []
    with TemporaryDirectory() as scratch, jupyterlab(Path(scratch)) as ((url, token), copy), sync_playwright() as driver:
        paths = sorted((copy / "tutorials").glob("*.ipynb"))
        if unknown := set(names) - {path.stem for path in paths}: raise SystemExit(f"browser: no tutorial {', '.join(sorted(unknown))}; there are {', '.join(path.stem for path in paths)}")
        shutil.rmtree(PICTURES, ignore_errors=True); PICTURES.mkdir()
        browser = driver.chromium.launch_persistent_context(f"{scratch}/profile", executable_path=executable, headless=True, args=FLAGS, viewport=dict(width=WIDE, height=HIGH))
        browser.set_default_timeout(180_000)   # a machine may have other things to do
        for path in paths if not names else [path for path in paths if path.stem in names]:
            page, began = browser.new_page(), monotonic()
            try: told = "all cells" + "".join(f", {name}" for name in visit(page, url, token, path))
            except Exception as error:
                told = f"FAULT\n    {error}"
                failed.append(path.stem)
                page.screenshot(path=PICTURES / f"{path.stem}-FAULT.png")
            print(f"{path.stem:24} {monotonic() - began:5.0f} s  {told}", flush=True)
            for kernel in page.request.get(f"{url}api/kernels?token={token}").json(): page.request.delete(f"{url}api/kernels/{kernel['id']}?token={token}")
            page.close()
        browser.close()
    print(f"{len(list(PICTURES.glob('*.png')))} pictures in {PICTURES}")
    if failed: raise SystemExit(f"browser: {', '.join(failed)}")


if __name__ == "__main__": main([Path(name).stem for name in sys.argv[1:]])
