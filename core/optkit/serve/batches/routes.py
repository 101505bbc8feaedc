"""`/v1/files` and `/v1/batches`, as OpenAI defines them.

https://platform.openai.com/docs/api-reference/files and https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from optkit.serve.batches.service import Batches
from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import Tenant

__all__ = ["router"]

router = APIRouter()


def _batches(request: Request) -> Batches:
    batches: Batches | None = request.app.state.serving.batches
    if batches is None:
        message = "files and batches are switched off on this server; start it with --state DIRECTORY"
        raise ApiError(404, message, code="batches_off")
    return batches


def _tenant(request: Request) -> Tenant:
    tenant: Tenant = request.state.tenant
    return tenant


On = Annotated[Batches, Depends(_batches)]
By = Annotated[Tenant, Depends(_tenant)]
After = Annotated[str | None, Query(max_length=64)]


class BatchBody(BaseModel):
    """Of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: Annotated[str, Field(max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


@router.post("/v1/files")
async def upload_file(request: Request, batches: On, tenant: By) -> dict[str, Any]:
    """Take a file of requests: a form with `file` and `purpose`, which must be `batch`."""
    return await batches.upload(tenant, request.headers.get("content-type"), request.stream())


@router.get("/v1/files")
async def list_files(
    batches: On,
    tenant: By,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The tenant's files, uploaded and produced."""
    return await batches.list_files(tenant, purpose=purpose, after=after, limit=limit, descending=order == "desc")


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, batches: On, tenant: By) -> dict[str, Any]:
    """What is known about a file."""
    return await batches.file(tenant, file_id)


@router.get("/v1/files/{file_id}/content", response_class=StreamingResponse)
async def file_content(file_id: str, batches: On, tenant: By) -> StreamingResponse:
    """What is in a file."""
    size, pieces = await batches.content(tenant, file_id)
    # Never as something that a browser would show, and never under the client's name for it.
    headers = {"content-length": str(size), "content-disposition": "attachment", "x-content-type-options": "nosniff"}
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, batches: On, tenant: By) -> dict[str, Any]:
    """Remove a file that no open batch reads."""
    return await batches.delete_file(tenant, file_id)


@router.post("/v1/batches")
async def create_batch(body: BatchBody, batches: On, tenant: By) -> dict[str, Any]:
    """Queue a batch."""
    return await batches.create(tenant, input_file=body.input_file_id, endpoint=body.endpoint, metadata=body.metadata)


@router.get("/v1/batches")
async def list_batches(
    batches: On, tenant: By, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The tenant's batches, the newest first."""
    return await batches.list_batches(tenant, after=after, limit=limit)


@router.get("/v1/batches/{batch_id}")
async def retrieve_batch(batch_id: str, batches: On, tenant: By) -> dict[str, Any]:
    """How far a batch is."""
    return await batches.batch(tenant, batch_id)


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, batches: On, tenant: By) -> dict[str, Any]:
    """Stop a batch; what is answered is kept."""
    return await batches.cancel(tenant, batch_id)
