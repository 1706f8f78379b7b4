"""Settings of the report."""

from __future__ import annotations

from pydantic import Field

from lotlip.core.section import NonNegative, Section


class ReportConfig(Section):
    """The page that a person reads at the end."""

    title: str = Field("LoTLIP", description="title of the page")
    note: str = Field("", description="said in plain words at the top of the page")
    contact_sheet: NonNegative = Field(12, description="pictures shown with their captions")
