"""ListOrganizations."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from apikeys.v1 import organization_service_pb2 as pb
from support.keys import execute
from support.service import RunningService, refusal

pytestmark = pytest.mark.asyncio(loop_scope="session")

CLIENT_LIMIT_BYTES = 4 * 1024 * 1024


async def page(service: RunningService, **fields: Any) -> pb.ListOrganizationsResponse:
    """Calls ListOrganizations as root."""
    answer: pb.ListOrganizationsResponse = await service.organizations.ListOrganizations(
        pb.ListOrganizationsRequest(**fields), metadata=service.root
    )
    return answer


async def all_pages(service: RunningService, page_size: int) -> list[list[str]]:
    """Reads the whole list, page by page."""
    pages: list[list[str]] = []
    page_token = ""
    while not pages or page_token:
        answer = await page(service, page_size=page_size, page_token=page_token)
        pages.append([organization.id for organization in answer.organizations])
        page_token = answer.next_page_token
    return pages


async def test_by_id(alone: RunningService) -> None:
    """All organizations are listed by id, the service's own among them, each as GetOrganization shows it."""
    for organization_id in ("zeta", "acme", "org_b", "org-a"):
        await alone.create_organization(organization_id)
    listed = (await page(alone)).organizations
    assert ["acme", "org-a", "org_b", "org_root", "zeta"] == [organization.id for organization in listed]
    for organization in listed:
        read: pb.GetOrganizationResponse = await alone.organizations.GetOrganization(
            pb.GetOrganizationRequest(organization_id=organization.id), metadata=alone.root
        )
        assert read.organization == organization


async def test_pages(alone: RunningService) -> None:
    """Pages go on where the one before ended, also when organizations are made in between; the sizes keep to 1000."""
    for organization_id in ("aaa", "ccc", "eee"):
        await alone.create_organization(organization_id)
    first = await page(alone, page_size=2)
    await alone.create_organization("bbb")
    await alone.create_organization("ddd")
    second = await page(alone, page_size=2, page_token=first.next_page_token)
    assert [["aaa", "ccc"], ["ddd", "eee"]] == [
        [organization.id for organization in answer.organizations] for answer in (first, second)
    ]
    assert [["aaa", "bbb", "ccc"], ["ddd", "eee", "org_root"]] == await all_pages(alone, 3)
    await execute(
        alone,
        "INSERT INTO organization (id, name, plan_id) "
        "SELECT 'many' || n, 'Many', 'default' FROM generate_series(1, 1000) n",
    )
    assert 100 == len((await page(alone)).organizations)
    assert [1000, 6] == [len(ids) for ids in await all_pages(alone, 2**31 - 1)]
    error = await refusal(page(alone, page_size=-1))
    assert ("INVALID_FIELD", ["page_size"]) == (error.reason, list(error.violations))


async def test_pages_fit_into_an_answer(alone: RunningService) -> None:
    """A page of organizations with as many scopes as can be is cut where clients would refuse the answer."""
    await execute(
        alone,
        """
        INSERT INTO organization (id, name, plan_id, scopes)
        SELECT 'big' || n, 'Big', 'default', (
            SELECT jsonb_agg(jsonb_build_object('name', 'scope' || s, 'description', repeat(U&'\\2603', 500)))
            FROM generate_series(1, 1000) s
        )
        FROM generate_series(1, 5) n
        """,
    )
    pages = await all_pages(alone, 100)
    assert [["big1", "big2"], ["big3", "big4"], ["big5", "org_root"]] == pages


async def test_page_tokens_of_other_lists(alone: RunningService) -> None:
    """A page token goes on with its own list alone, and can not be made up."""
    await alone.create_organization("acme")
    plans: pb.ListPlansResponse = await alone.organizations.ListPlans(
        pb.ListPlansRequest(page_size=1), metadata=alone.root
    )
    token = (await page(alone, page_size=1)).next_page_token
    for forged in (plans.next_page_token, token[:-1], token[:20] + "A" + token[21:] + "A", "acme", "\N{SNOWMAN}"):
        error = await refusal(page(alone, page_size=1, page_token=forged))
        assert (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") == (error.code, error.reason)
