"""The page in headless Chromium: nothing is wider than a phone, nothing is refused by the page's own policy."""

import shutil
import subprocess

import pytest

from recap_ds.cli.main import main
from tests.report.made_run import made_config, write_run

CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 1280)
# Each frame tells its parent how wide its content is.
PROBE = "<script>onload=()=>parent.postMessage([innerWidth,document.documentElement.scrollWidth,name],'*')</script>"
PARENT = """<body><script>onmessage=e=>document.body.append('[',e.data.join(' '),']')</script>{frames}</body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")
def test_the_page_fits_a_phone_and_a_desktop(tmp_path):
    long = {"name": "a" * 120, "data": {"shards": "/a/long/path/" + "shards" * 30}}
    runs = [
        write_run(tmp_path / f"{'run' * 20}{number}", made_config(**long), train__lr__vlm=1e-4, train__grad_norm=2.0)
        for number in range(3)
    ]
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(page)]) == 0
    text = page.read_text()
    policy = text[text.index('<meta http-equiv="Content') : text.index('<meta name="referrer"')]
    (tmp_path / "probed.html").write_text(text.replace(policy, "").replace("</main>", f"</main>{PROBE}"))
    frames = [f'<iframe name="probed" src="probed.html" style="width:{w}px;border:0"></iframe>' for w in WIDTHS]
    frames.append('<iframe src="page.html"></iframe>')  # as it is, under its own policy
    (tmp_path / "parent.html").write_text(PARENT.format(frames="".join(frames)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/parent.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for width in WIDTHS:
        assert f"[{width} {width} probed]" in done.stdout, done.stdout[-500:]
    assert "Content Security Policy" not in done.stderr
