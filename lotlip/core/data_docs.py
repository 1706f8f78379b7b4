"""The pages of Great Expectations, with templates that are compiled once in a process instead of once a page."""

from __future__ import annotations

from typing import Any

from great_expectations.render.view import DefaultJinjaIndexPageView, DefaultJinjaPageView
from jinja2.bccache import Bucket, BytecodeCache


class _Compiled(BytecodeCache):
    """Keeps compiled templates in memory. Forks have those of the fork server."""

    def __init__(self) -> None:
        self.templates: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self.templates:
            bucket.bytecode_from_string(self.templates[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self.templates[bucket.key] = bucket.bytecode_to_string()


_COMPILED = _Compiled()


class PageView(DefaultJinjaPageView):
    """Renders a page of expectations or of results."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.env.bytecode_cache = _COMPILED


class IndexPageView(DefaultJinjaIndexPageView):
    """Renders the index."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.env.bytecode_cache = _COMPILED


def compile_templates() -> None:
    """Compiles all templates, for the processes that will be forked from this one."""
    environment = PageView().env
    for name in environment.list_templates(extensions=["j2"]):
        environment.get_template(name)


def site(folder: str) -> dict[str, Any]:
    """Great Expectations' configuration of a site in a folder."""

    def view(kind: type) -> dict[str, Any]:
        return {"view": {"module_name": __name__, "class_name": kind.__name__}}

    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", **view(IndexPageView)},
        "site_section_builders": {"expectations": view(PageView), "validations": view(PageView)},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": folder},
    }
