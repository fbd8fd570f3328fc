"""The page in a headless Chromium: open a workflow, look for missing nodes and broken links, take a picture, save it again.

By hand, with a server running: ``python tests/browser.py URL workflow.json picture.png [resaved.json]``.
"""

import json
import shutil
import sys
import time
from pathlib import Path


def available():
    """Whether Chromium, its driver and selenium are installed."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return False
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Page:
    """``with Page(url) as page:`` opens the server's page and waits until its nodes are registered."""

    def __init__(self, url, width=2000, height=1150):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = shutil.which("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_script_timeout(60)
        self.url = url

    def __enter__(self):
        self.driver.get(self.url)
        self.until(
            "return !!(window.app && app.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 100)",
            90,
        )
        time.sleep(1)
        return self

    def __exit__(self, *error):
        self.driver.quit()

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def run_async(self, body, *arguments):
        """Run the body of an async function; its result is returned, its error raised."""
        reply = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1], args = [...arguments].slice(0, -1);"
            f"(async () => {{ {body} }})().then(value => done({{value}}), error => done({{error: String(error)}}));",
            *arguments,
        )
        if "error" in reply:
            raise AssertionError(reply["error"])
        return reply.get("value")

    def until(self, script, timeout):
        deadline = time.monotonic() + timeout
        while not self.run(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"The page did not get ready: {script}")
            time.sleep(0.2)

    def open(self, workflow):
        """Load a saved workflow (dict) into the canvas."""
        self.run_async("await app.loadGraphData(args[0]);", workflow)
        time.sleep(1)

    def nodes(self):
        """[{id, type, known, widgets: {name: value}, inputs: [{name, link}]}] of the open graph."""
        return self.run(
            "return app.graph._nodes.map(n => ({id: n.id, type: n.type, known: n.type in LiteGraph.registered_node_types && !n.has_errors,"
            " widgets: Object.fromEntries((n.widgets || []).map(w => [w.name, w.value])),"
            " inputs: (n.inputs || []).map(i => ({name: i.name, type: i.type, link: i.link ?? null, widget: !!i.widget}))}));"
        )

    def prompt(self):
        """The API prompt the page would send."""
        return self.run_async("return (await app.graphToPrompt()).output;")

    def serialize(self):
        return self.run("return app.graph.serialize();")

    def run_workflow(self):
        """Press Run."""
        self.run_async("await app.queuePrompt(0);")

    def fit(self):
        """Show the whole graph."""
        self.run(
            "const nodes = app.graph._nodes, ds = app.canvas.ds, c = app.canvas.canvas;"
            "const x0 = Math.min(...nodes.map(n => n.pos[0])) - 40, y0 = Math.min(...nodes.map(n => n.pos[1])) - 80;"
            "const x1 = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 40, y1 = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 40;"
            "const w = c.clientWidth - 80, h = c.clientHeight - 120; ds.scale = Math.min(w / (x1 - x0), h / (y1 - y0), 1);"
            "ds.offset[0] = -x0 + 70 / ds.scale; ds.offset[1] = -y0 + 60 / ds.scale; app.canvas.setDirty(true, true);"
        )
        time.sleep(1)

    def picture(self, path):
        self.fit()
        self.driver.save_screenshot(str(path))


if __name__ == "__main__":
    url, source, target, *resaved = sys.argv[1:]
    with Page(url) as page:
        page.open(json.loads(Path(source).read_text(encoding="utf-8")))
        page.picture(target)
        unknown = [node for node in page.nodes() if not node["known"]]
        print("unknown:", unknown)
        if resaved:
            Path(resaved[0]).write_text(
                json.dumps(page.serialize(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
