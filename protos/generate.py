"""Makes all that follows from the protos: Python stubs, descriptor sets, and the API reference.

Imports of the contract (google/api, buf/validate) are taken from the descriptors that the installed packages carry, so
that nothing is fetched and the versions are those of the lock file.

Usage: python protos/generate.py stubs | image FILE | baseline FILE
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from api_reference import write_reference
from google.api import annotations_pb2, field_behavior_pb2, http_pb2
from google.protobuf import any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

PROTOS = Path(__file__).parent
ROOT = PROTOS.parent
GENERATED = ROOT / "generated"
REFERENCE = ROOT / "docs" / "api.md"
TRANSCODING = ROOT / "deploy" / "envoy" / "apikeys.binpb"
CONTRACT = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("apikeys/v1/*.proto"))
# Named by no file of the contract, but sent with every error: a transcoder writes only what it has descriptors of.
ERRORS = ("google/rpc/status.proto", "google/rpc/error_details.proto")
# protovalidate brings its own message classes; the stubs of this contract need google.protobuf's.
RULES = "buf/validate/validate.proto"
# protoc's plugins stand beside this Python; PATH need not name them.
SCRIPTS = Path(sysconfig.get_path("scripts"))
PLUGINS = [f"--plugin={name}={SCRIPTS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]


def _imports() -> descriptor_pb2.FileDescriptorSet:
    """Gathers the descriptors of everything that the contract imports."""
    imports = descriptor_pb2.FileDescriptorSet()
    for module in (
        any_pb2,
        descriptor_pb2,
        timestamp_pb2,
        duration_pb2,
        field_mask_pb2,
        struct_pb2,
        http_pb2,
        annotations_pb2,
        field_behavior_pb2,
        status_pb2,
        error_details_pb2,
    ):
        file = imports.file.add()
        module.DESCRIPTOR.CopyToProto(file)
        # Two installed packages bring google.api and google.rpc, and the one that was installed last wins. They differ
        # in these options alone.
        file.options.ClearField("cc_enable_arenas")
        for extension in file.extension:
            extension.ClearField("options")
    imports.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    return imports


def _protoc(*arguments: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".binpb") as imports:
        imports.write(_imports().SerializeToString(deterministic=True))
        imports.flush()
        status = protoc.main(["protoc", f"--descriptor_set_in={imports.name}", f"-I{PROTOS}", *PLUGINS, *arguments])
    if status != 0:
        sys.exit(status)


def image(path: Path) -> None:
    """Compiles the contract, with comments and imports, into a descriptor set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}", *CONTRACT)


def baseline(path: Path) -> None:
    """Compiles the contract, with imports but without comments, into what compatibility is judged by."""
    _protoc("--include_imports", f"--descriptor_set_out={path}", *CONTRACT)


def transcoding() -> None:
    """Compiles what a gateway needs to serve the contract as JSON: it, its imports, and what errors carry."""
    _protoc("--include_imports", f"--descriptor_set_out={TRANSCODING}", *CONTRACT, *ERRORS)


def stubs() -> None:
    """Makes generated/, docs/api.md and the transcoder's descriptor set anew."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir()
    _protoc(f"--python_out={GENERATED}", f"--mypy_out=quiet:{GENERATED}", RULES, *CONTRACT)
    services = [name for name in CONTRACT if name.endswith("_service.proto")]
    _protoc(f"--grpc_python_out={GENERATED}", f"--mypy_grpc_out=quiet,only_async:{GENERATED}", *services)
    for package in ("apikeys", "apikeys/v1", "buf", "buf/validate"):
        (GENERATED / package / "py.typed").touch()
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "image.binpb"
        image(compiled)
        REFERENCE.parent.mkdir(exist_ok=True)
        write_reference(compiled, REFERENCE)
    transcoding()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stubs"]:
            stubs()
        case ["image", target]:
            image(Path(target))
        case ["baseline", target]:
            baseline(Path(target))
        case _:
            sys.exit(__doc__)
