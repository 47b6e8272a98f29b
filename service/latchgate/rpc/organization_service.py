"""OrganizationService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

from apikeys.v1 import organization_service_pb2 as pb
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.model import Caller
from latchgate.domain.organizations import OrganizationManager
from latchgate.rpc import convert
from latchgate.rpc.pages import PageTokens, fitting, page_size


class OrganizationService:
    """Serves apikeys.v1.OrganizationService."""

    def __init__(self, *, organizations: OrganizationManager, pages: PageTokens) -> None:
        """Takes the use cases."""
        self._organizations = organizations
        self._pages = pages

    async def create_organization(
        self, request: pb.CreateOrganizationRequest, caller: Caller
    ) -> pb.CreateOrganizationResponse:
        """Creates an organization."""
        organization = await self._organizations.create(
            caller, request.organization_id, request.name, request.plan_id, convert.scopes(request.scopes)
        )
        return pb.CreateOrganizationResponse(organization=convert.organization_message(organization))

    async def get_organization(self, request: pb.GetOrganizationRequest, caller: Caller) -> pb.GetOrganizationResponse:
        """Reads an organization."""
        organization = await self._organizations.get(caller, request.organization_id)
        return pb.GetOrganizationResponse(organization=convert.organization_message(organization))

    async def list_organizations(
        self, request: pb.ListOrganizationsRequest, caller: Caller
    ) -> pb.ListOrganizationsResponse:
        """Lists organizations."""
        listing = ("organizations", caller.organization_id)
        after = self._pages.read(listing, request.page_token)
        page = await self._organizations.list(caller, after, page_size(request.page_size))
        organizations, is_cut = fitting(convert.organization_message(each) for each in page.organizations)
        return pb.ListOrganizationsResponse(
            organizations=organizations,
            next_page_token=self._pages.make(listing, organizations[-1].id) if page.more or is_cut else "",
        )

    async def update_organization(
        self, request: pb.UpdateOrganizationRequest, caller: Caller
    ) -> pb.UpdateOrganizationResponse:
        """Changes an organization."""
        if not request.organization.id:
            raise InvalidFieldError([("organization.id", "must name the organization to change")])
        changes = convert.organization_changes(request)
        with convert.fields_of("organization"):
            organization, effect = await self._organizations.update(caller, request.organization.id, changes)
        return pb.UpdateOrganizationResponse(
            organization=convert.organization_message(organization), effect=convert.effect_message(effect)
        )

    async def create_plan(self, request: pb.CreatePlanRequest, caller: Caller) -> pb.CreatePlanResponse:
        """Creates a plan."""
        asked = request.plan
        plan = await self._organizations.create_plan(caller, asked.id, asked.rate_limit_per_minute, asked.max_keys)
        return pb.CreatePlanResponse(plan=convert.plan_message(plan))

    async def list_plans(self, request: pb.ListPlansRequest, caller: Caller) -> pb.ListPlansResponse:
        """Lists plans."""
        listing = ("plans", caller.organization_id)
        after = self._pages.read(listing, request.page_token)
        page = await self._organizations.list_plans(caller, after, page_size(request.page_size))
        return pb.ListPlansResponse(
            plans=[convert.plan_message(plan) for plan in page.plans],
            next_page_token=self._pages.make(listing, page.plans[-1].id) if page.more else "",
        )

    async def update_plan(self, request: pb.UpdatePlanRequest, caller: Caller) -> pb.UpdatePlanResponse:
        """Changes a plan."""
        changes = convert.plan_changes(request)
        plan, effect = await self._organizations.update_plan(caller, request.plan.id, changes)
        return pb.UpdatePlanResponse(plan=convert.plan_message(plan), effect=convert.effect_message(effect))
