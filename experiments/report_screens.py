"""What the results page of a sweep looks like on a screen and on a phone, for the README.

    python experiments/report_screens.py SWEEP_FOLDER

Writes figures/report_1440.png and figures/report_390.png (the page's upper part).
"""

import base64
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the browser

from browser import as_device, browser

from rlhf_ray.report.gathering import at
from rlhf_ray.report.live import write_report

SIZES = ((1440, 1900), (390, 1560))
"""Width and height in CSS pixels."""


def main() -> None:
    file = Path(write_report(*at(sys.argv[1])))
    folder = Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as driver:
        for width, height in SIZES:
            as_device(driver, width)
            driver.get(f"file://{file}")
            while not driver.execute_script("return document.documentElement.dataset.ready"):
                time.sleep(0.1)
            time.sleep(1)  # marks fade in
            box = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            shot = driver.execute_cdp_cmd(
                "Page.captureScreenshot",
                {"format": "png", "captureBeyondViewport": True, "clip": box},
            )
            (folder / f"report_{width}.png").write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
