"""The API page as people use it, in real Chromium."""

from __future__ import annotations

from typing import Any

import httpx


def test_every_operation_is_shown(blank_page: Any, site: Any):
    blank_page.goto(f"{site.url}/docs")
    blank_page.wait_for_selector(".opblock-summary-path")
    shown = blank_page.locator(".opblock").count()
    document = httpx.get(f"{site.url}/openapi.json").json()

    assert shown == sum(len(methods) for methods in document["paths"].values())
    assert blank_page.title() == "Stepserve API"
    text = blank_page.inner_text("#swagger-ui")
    assert all(tag["description"].replace("`", "") in text for tag in document["tags"])


def test_all_that_can_be_unfolded_is_shown(blank_page: Any, site: Any):
    blank_page.goto(f"{site.url}/docs")
    blank_page.wait_for_selector(".opblock-summary-control")
    blank_page.eval_on_selector_all(".opblock-summary-control", "all => all.map(c => c.click())")
    blank_page.wait_for_function(
        "() => document.querySelectorAll('.opblock-body').length"
        " === document.querySelectorAll('.opblock').length"
    )
    schema = blank_page.locator("section.models article", has_text="ImageRequest").first
    schema.locator("button", has_text="Expand all").first.click()

    assert "negative_prompt" in blank_page.inner_text("section.models")


def test_an_operation_is_tried(blank_page: Any, site: Any):
    blank_page.goto(f"{site.url}/docs")
    blank_page.click("#operations-models-list_models .opblock-summary-control")
    blank_page.click("text=Try it out")
    blank_page.click("button.execute")
    blank_page.wait_for_selector(".live-responses-table .response-col_status >> text=200")

    assert "emoji" in blank_page.inner_text(".live-responses-table")
