"""The page at /docs in a real browser: nothing is stopped by its policy, nothing is wider than a telephone."""

import pytest

pytest.importorskip("uvicorn")

from tests.serve.test_bounds import running_server
from tests.serve.test_http import engine  # noqa: F401

pytestmark = pytest.mark.slow


def test_it_is_shown_whole_and_its_links_lead_to_paths(request, engine):  # noqa: F811
    browser = request.getfixturevalue("_chromium")
    browser.get_log("browser")
    with running_server(engine) as ((host, port), _):
        for width in (390, 1200):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 800}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(f"http://{host}:{port}/docs")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            table = browser.find_element("css selector", "table")
            assert browser.execute_script("return getComputedStyle(arguments[0]).borderCollapse", table) == "collapse"
            link = browser.find_element("css selector", "nav a[href='#v1-responses']")
            link.click()
            place = browser.execute_script("return document.querySelector(':target').getBoundingClientRect().top")
            assert abs(place) < 60
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
