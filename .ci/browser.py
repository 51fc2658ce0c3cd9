"""Open the tutorials in a real JupyterLab and a real browser.

python .ci/browser.py                 all notebooks of nbs/tutorials
python .ci/browser.py first_run ...   only these

It runs all cells of a tutorial with the menu; no cell may fail or be left out. Then it uses the widgets as a reader
does: it drags a slider, types a sentence, clicks a picture. What a widget shows must follow. Pictures in the light and
in the dark theme go to _browser.

The browser is the Chromium or Chrome of the system, driven by Playwright; nothing is downloaded. JupyterLab works on a
copy of nbs and with settings of its own, so the notebooks and the reader's own JupyterLab stay as they are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

from nbformat import NotebookNode

from notebooks import ROOT, read_notebook

PICTURES = ROOT / "_browser"
BROWSERS = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
]
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1280, 900  # pixels of the window
LONGEST_PICTURE = 16_000  # pixels that a browser can draw
RUN_TIMEOUT = 1200  # seconds that a notebook may run
TIMEOUT = 180  # seconds that any other step may take, on a machine that is busy


class Fault(Exception):
    "Something that a reader would notice."


def require(
    condition: bool,
    message: str,
):
    "Raise a Fault unless the condition is true."
    if not condition:
        raise Fault(message)


def find_browser() -> str:
    "The path of a Chromium or Chrome; the environment variable CHROMIUM can name it."
    for name in (os.environ.get("CHROMIUM"), *BROWSERS):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise SystemExit(
        "browser: no Chromium or Chrome on this machine; "
        "install one (Debian: apt-get install chromium) or name it with CHROMIUM=path"
    )


# JupyterLab


@contextmanager
def start_jupyterlab(
    folder: Path,  # an empty folder for the copy of nbs and for all settings
) -> Iterator[tuple[str, str, Path]]:
    "Run a server on this machine over a copy of nbs; yields its address, its token and the copy."
    copy, home = folder / "nbs", folder / "jupyter"
    shutil.copytree(ROOT / "nbs", copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    settings = home / "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CALA_")}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(home)
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(home / "workspaces")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={copy}"]
    log_path = folder / "lab.log"
    with open(log_path, "w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

        def end_both(*_):
            server.terminate()
            os._exit(143)

        signal.signal(signal.SIGTERM, end_both)  # JupyterLab must not run on when this process is ended
        try:
            yield *wait_for_server(server, home, log_path), copy
        finally:
            server.terminate()
            server.wait(30)


def wait_for_server(
    server: subprocess.Popen,
    home: Path,  # where the server writes a file with its address
    log_path: Path,
) -> tuple[str, str]:  # address and token
    "Wait until the server has started."
    end = monotonic() + TIMEOUT
    while monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"browser: JupyterLab did not start:\n{log_path.read_text()[-2000:]}")
        for path in home.glob("jpserver-*.json"):
            try:
                state = json.loads(path.read_text())
            except ValueError:  # the server is still writing it
                continue
            return state["url"], state["token"]
        sleep(0.1)
    raise SystemExit(f"browser: JupyterLab did not start within {TIMEOUT} s:\n{log_path.read_text()[-2000:]}")


def choose_in_menu(
    page,
    menu: str,
    *items: str,  # an item of the menu, of its submenu, ...
):
    "Choose from a menu, as a reader does."
    page.locator(".lm-MenuBar-item").get_by_text(menu, exact=True).click()
    for item in items:
        page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def open_notebook(
    page,
    url: str,
    token: str,
    path: Path,
):
    "Open one notebook alone and wait for its kernel."
    page.goto(f"{url}lab/workspaces/{path.stem}/tree/tutorials/{path.name}?token={token}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    # A cell that is run before the kernel is ready makes JupyterLab ask which kernel to use.
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()


def run_all_cells(
    page,
    watch: Callable[[], None],  # called again and again while the cells run
):
    "Run all cells with the menu and wait for the last."
    pending = page.locator(".jp-InputPrompt", has_text="[*]:")
    choose_in_menu(page, "Run", "Run All Cells")
    pending.first.wait_for(state="attached")
    end = monotonic() + RUN_TIMEOUT
    while pending.count():
        require(monotonic() < end, f"still running after {RUN_TIMEOUT} s")
        watch()
        sleep(0.2)


def save_notebook(
    page,
    path: Path,
) -> NotebookNode:
    "Save the notebook in JupyterLab and read the file."
    page.locator('.jp-NotebookPanel-toolbar [data-command="docmanager:save"]').click()
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    return read_notebook(path)


def cell_faults(
    notebook: NotebookNode,
) -> list[str]:
    "A line for each code cell that failed or was not run."
    faults = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        messages = [f"{part.ename}: {part.evalue}" for part in cell.outputs if part.output_type == "error"]
        if not messages and cell.execution_count is None:
            messages = ["was not run"]
        for message in messages:
            faults.append(f"cell {number} ({cell.source.splitlines()[0][:60]}): {message}")
    return faults


# What a widget shows, and whether it follows

READ_WIDGET = """async widget => {
  const digest = async image => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-1", bytes));
    return [...hash].map(byte => byte.toString(16).padStart(2, "0")).join("");
  };
  return {
    pictures: await Promise.all([...widget.querySelectorAll("img")].map(digest)),
    words: widget.innerText,
    sentence: widget.querySelector("input[type=text]")?.value,
  };
}"""


def read_widget(
    widget,
) -> dict | None:
    "The hashes of a widget's pictures, its words and its sentence; None at the moment when a picture is replaced."
    try:
        return widget.evaluate(READ_WIDGET)
    except Exception as error:
        if "fetch" in str(error):
            return None
        raise


def wait_until(
    widget,
    condition: Callable[[dict], bool],  # of what `read_widget` returns
    message: str,  # of the Fault, if the condition stays false
) -> dict:
    "What the widget shows when the condition is true, the kernel is idle and the widget no longer changes."
    idle = widget.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    previous, end = None, monotonic() + TIMEOUT
    while monotonic() < end:
        sleep(0.3)
        current = read_widget(widget) if idle.count() else None
        if current and current == previous and condition(current):
            return current
        previous = current
    raise Fault(message)


def wait_until_idle(
    widget,
) -> dict:
    "What the widget shows when the kernel is idle."
    return wait_until(widget, bool, "the kernel does not become idle")


def see_change(
    widget,
    move: Callable[[], object],  # uses a control
    description: str,  # what `move` does, for the message
    part: str = "pictures",  # or words: what must change
) -> dict:
    "What the widget shows after a move, which must change its pictures or its words."
    before = wait_until_idle(widget)
    move()
    message = f"{description}, and the {part} do not change"
    return wait_until(widget, lambda current: current[part] != before[part], message)


def drag_slider(
    page,
    widget,
    share: float,  # of the track, from 0 to 1
    number: int = 0,  # which slider of the widget
):
    "Drag a slider's handle to a place on its track."
    handle = widget.locator(".noUi-handle").nth(number).bounding_box()
    track = widget.locator(".noUi-base").nth(number).bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2, steps=8)
    page.mouse.up()


def type_sentence(
    widget,
    sentence: str,
):
    "Type into the widget's text box and press Enter."
    box = widget.locator("input[type=text]").first
    box.fill(sentence)
    box.press("Enter")


def use_explorer(
    page,
    widget,
    save_picture: Callable[[str], None],  # takes the name of a moment
):
    "Drag the slider, type a sentence, let an association vote, click a picture: each must change the ranking."
    first = wait_until_idle(widget)
    save_picture("at first")

    dragged = see_change(widget, lambda: drag_slider(page, widget, 0.6), "the slider was dragged")
    require(dragged["sentence"] != first["sentence"], "another triplet was chosen, and the sentence did not change")
    require(
        dragged["pictures"][1:] != first["pictures"][1:], "another triplet was chosen, and the ranking did not change"
    )
    save_picture("slider dragged")

    # Each sentence changes the scores, but not each changes the order of the pictures that are shown.
    for sentence in (first["sentence"], "add a large red star in the centre", "make everything small"):
        typed = see_change(widget, lambda text=sentence: type_sentence(widget, text), "a sentence was typed", "words")
        require(typed["pictures"][0] == dragged["pictures"][0], "a sentence was typed, and the reference changed")
        if typed["pictures"] != dragged["pictures"]:
            break
    require(typed["pictures"] != dragged["pictures"], "sentences were typed, and the ranking did not change")
    save_picture("sentence typed")

    restored = see_change(widget, lambda: type_sentence(widget, dragged["sentence"]), "the first sentence was typed")
    require(restored["pictures"] == dragged["pictures"], "the first sentence does not bring the first ranking back")

    voters = widget.locator("input[type=checkbox]:enabled")
    if voters.count():
        voters.last.check()
        message = "an association votes, and no score changed"
        wait_until(widget, lambda current: current["words"] != restored["words"], message)
        save_picture("an association votes")
        voters.last.uncheck()
        message = "the association votes no longer, and the ranking is not the same as before"
        wait_until(widget, lambda current: current == restored, message)

    again = widget.locator("label", has_text="rank again").locator("input:enabled")
    if again.count():
        both = see_change(widget, again.check, "the switch `rank again` was turned on", "words")
        require("was 1" in both["words"], "the second ranking does not show the ranks of the first")
        save_picture("ranked again")
        again.uncheck()
        message = "the second ranking was turned off, and the first is not the same as before"
        wait_until(widget, lambda current: current == restored, message)

    clicked = see_change(widget, lambda: widget.locator("button").nth(3).click(), "a picture was clicked")
    require(clicked["pictures"][0] == restored["pictures"][3], "the picture that was clicked is not the reference now")
    require(
        clicked["pictures"][1:] != restored["pictures"][1:], "a picture was clicked, and the ranking did not change"
    )
    save_picture("third answer clicked")


def use_triplets(
    page,
    widget,
    save_picture: Callable[[str], None],  # takes the name of a moment
):
    "Choose a kind of edit, type a word, go to the next triplet."
    save_picture("at first")
    see_change(widget, lambda: widget.locator("select").select_option("colour"), "a kind was chosen")
    typed = see_change(widget, lambda: type_sentence(widget, "orange"), "a word was typed", "words")
    require("1 of " in typed["words"], "a filtered list does not begin at its first triplet")
    see_change(widget, lambda: widget.get_by_role("button", name="next").click(), "next was pressed")
    save_picture("second of the filtered list")


def use_atlas(
    page,
    widget,
    save_picture: Callable[[str], None],  # takes the name of a moment
):
    "Choose another triplet, another query token, every sheet, and type a sentence."
    first = wait_until_idle(widget)
    save_picture("at first")
    dragged = see_change(widget, lambda: drag_slider(page, widget, 0.3), "the slider was dragged")
    require(dragged["sentence"] != first["sentence"], "another triplet was chosen, and the sentence did not change")
    see_change(widget, lambda: drag_slider(page, widget, 0.7, number=1), "the slider of HCA's query was dragged")
    save_picture("another query of HCA")
    for sheet in ("TAC", "looks of the reference", "looks of the target"):
        button = widget.get_by_role("button", name=sheet, exact=True)
        see_change(widget, button.click, f"the sheet {sheet} was chosen")
        save_picture(sheet)
    widget.get_by_role("button", name="looks of the reference", exact=True).click()
    see_change(widget, lambda: type_sentence(widget, "make everything small"), "a sentence was typed")
    save_picture("sentence typed")


# A widget by what it holds, and what a reader does with it.
WIDGETS = {
    "explorer": ('.lm-Widget.widget-vbox:has(> .widget-hbox input[type="checkbox"])', use_explorer),
    "triplets": (
        '.lm-Widget.widget-vbox:has(> .widget-hbox input[placeholder="words in the sentence"])',
        use_triplets,
    ),
    "atlas": (".lm-Widget.widget-vbox:has(> .widget-hbox .widget-toggle-buttons)", use_atlas),
}
PANEL = ".lm-Widget.widget-vbox:has(> .widget-hprogress)"
# What must appear in a tutorial; the panel and its examples must appear while the cells run.
EXPECTED = {
    "first_run": ["triplets", "panel", "examples", "explorer"],
    "attention_atlas": ["atlas"],
}


class PanelWatcher:
    "Looks at the training panel while the cells run."

    def __init__(self, page):
        self.panel = page.locator(PANEL)
        self.moments = []  # (number of pictures, words) of each look

    def __call__(self):
        if not self.panel.count():
            return
        if not self.moments:
            self.panel.first.scroll_into_view_if_needed()
        self.moments.append((self.panel.locator("img").count(), self.panel.first.inner_text()))

    def parts(self) -> list[str]:
        "What appeared: the panel (with its curves) and the examples (a second picture)."
        most = max((pictures for pictures, words in self.moments if "loss" in words), default=0)
        return ["panel", "examples"][:most]


# One notebook


def save_whole_notebook(
    page,
    path: Path,
):
    "Save one picture of the whole notebook, as far as the browser can draw it."
    height = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.jp-Notebook, .jp-WindowedPanel-outer')].map(e => e.scrollHeight))"
    )
    page.set_viewport_size(dict(width=WIDTH, height=min(height + 300, LONGEST_PICTURE)))
    page.evaluate("for (const e of document.querySelectorAll('.jp-WindowedPanel-outer')) e.scrollTop = 0")
    sleep(0.5)
    clip = page.locator(".jp-NotebookPanel-notebook").last.bounding_box()
    last = page.locator(".jp-Notebook .jp-Cell").last.bounding_box()
    clip["height"] = min(last["y"] + last["height"], LONGEST_PICTURE) - clip["y"]
    page.screenshot(path=path, clip=clip)
    page.set_viewport_size(dict(width=WIDTH, height=HEIGHT))


def use_widgets(
    page,
    name: str,  # of the notebook
) -> list[str]:  # the names of the widgets
    "Use all widgets of a notebook that has run."
    used = []
    for kind, (selector, use) in WIDGETS.items():
        for number, widget in enumerate(page.locator(selector).all()):
            start = f"{name} {kind}{number or ''}"

            def save_picture(moment, widget=widget, start=start):
                widget.screenshot(path=PICTURES / f"{start} {moment}.png".replace(" ", "-"))

            used.append(kind)
            widget.scroll_into_view_if_needed()
            use(page, widget, save_picture)
    return used


def check_notebook(
    page,
    url: str,
    token: str,
    path: Path,
) -> list[str]:  # what appeared
    "Run a notebook, use its widgets, save pictures. Raises a Fault at the first thing that a reader would notice."
    open_notebook(page, url, token, path)
    watcher = PanelWatcher(page)
    run_all_cells(page, watcher)
    faults = cell_faults(save_notebook(page, path))
    require(not faults, "\n    ".join(faults))
    parts = watcher.parts() + use_widgets(page, path.stem)
    require(not page.get_by_text("Error displaying widget").count(), "JupyterLab shows: Error displaying widget")
    absent = set(EXPECTED.get(path.stem, [])) - set(parts)
    require(not absent, f"these do not appear: {', '.join(sorted(absent))}")
    for theme in ("Light", "Dark"):
        choose_in_menu(page, "Settings", "Theme", f"JupyterLab {theme}")
        page.locator(f'body[data-jp-theme-name="JupyterLab {theme}"]').wait_for(state="attached")
        save_whole_notebook(page, PICTURES / f"{path.stem}-{theme.lower()}.png")
    return parts


def choose_tutorials(
    folder: Path,
    names: list[str],  # all, if empty
) -> list[Path]:
    "The notebooks of a folder with these names."
    paths = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    unknown = set(names) - set(paths)
    if unknown:
        raise SystemExit(f"browser: no tutorial {', '.join(sorted(unknown))}; there are {', '.join(paths)}")
    return [paths[name] for name in paths if not names or name in names]


def main(
    names: list[str],  # of tutorials; all, if empty
):
    "Check the tutorials, print a line for each, and exit with an error if one has a fault."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise SystemExit(
            'browser: Playwright is missing; pip install -e ".[browser]" (make browser does it)'
        ) from error
    executable, failed = find_browser(), []
    with (
        TemporaryDirectory() as scratch,
        start_jupyterlab(Path(scratch)) as (url, token, copy),
        sync_playwright() as driver,
    ):
        paths = choose_tutorials(copy / "tutorials", names)
        shutil.rmtree(PICTURES, ignore_errors=True)
        PICTURES.mkdir()
        browser = driver.chromium.launch_persistent_context(
            f"{scratch}/profile",
            executable_path=executable,
            headless=True,
            args=BROWSER_FLAGS,
            viewport=dict(width=WIDTH, height=HEIGHT),
        )
        browser.set_default_timeout(1000 * TIMEOUT)
        for path in paths:
            page, start = browser.new_page(), monotonic()
            try:
                message = ", ".join(["all cells", *check_notebook(page, url, token, path)])
            except Exception as error:
                message = f"FAULT\n    {error}"
                failed.append(path.stem)
                page.screenshot(path=PICTURES / f"{path.stem}-FAULT.png")
            print(f"{path.stem:24} {monotonic() - start:5.0f} s  {message}", flush=True)
            for kernel in page.request.get(f"{url}api/kernels?token={token}").json():
                page.request.delete(f"{url}api/kernels/{kernel['id']}?token={token}")
            page.close()
        browser.close()
    print(f"{len(list(PICTURES.glob('*.png')))} pictures in {PICTURES}")
    if failed:
        raise SystemExit(f"browser: {', '.join(failed)}")


if __name__ == "__main__":
    main([Path(name).stem for name in sys.argv[1:]])
