"""``recap-ds serve EXPORT``: a policy behind a websocket, as ``openpi-client`` speaks it. Parses, calls and prints."""

import argparse
import ipaddress
import os
from pathlib import Path

from recap_ds.cli.numbers import count
from recap_ds.cli.sizes import parse_bytes
from recap_ds.errors import UsageError

KEY_VARIABLE = "RECAP_DS_API_KEY"
MIN_KEY_LENGTH = 16
MIN_MESSAGE_BYTES, MAX_MESSAGE_BYTES = 10**5, 10**9


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a policy to robots over a websocket",
        description="Serve a policy in the protocol of openpi-client. Requests that wait together are computed "
        "together. SIGTERM and Ctrl-C answer what was asked and end with exit code 0.",
        epilog="example: recap-ds serve exports/mine --port 8000",
    )
    parser.add_argument("export", metavar="EXPORT", help="an export, a hub id, a run or one of its checkpoints")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE),
        help=f"what clients must show; needed beyond loopback (default: ${KEY_VARIABLE})",
    )
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: an accelerator, if there is one)")
    parser.add_argument(
        "--max-batch", type=count, default=8, metavar="N", help="requests in one forward (default: %(default)s)"
    )
    parser.add_argument(
        "--max-clients", type=count, default=64, metavar="N", help="at the same time (default: %(default)s)"
    )
    parser.add_argument("--max-message", default="32MB", metavar="SIZE", help="of one request (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_access(args.host, args.api_key)
    max_message_bytes = parse_bytes("--max-message", args.max_message, MIN_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
    from recap_ds.serve.packages import require_packages

    require_packages("recap-ds serve")
    from recap_ds.checkpoint.on_demand import export_of
    from recap_ds.distributed.runtime import RankInfo
    from recap_ds.models.export_weights import locate_export
    from recap_ds.serve.run import serve_export
    from recap_ds.serve.server import ServerSettings

    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        max_batch=args.max_batch,
        max_clients=args.max_clients,
        max_message_bytes=max_message_bytes,
    )
    folder = export_of(args.export, RankInfo()) if Path(args.export).exists() else locate_export(args.export)
    tally = serve_export(folder, settings, args.device, lambda line: print(line, flush=True))
    print(tally, flush=True)
    return 0


def check_access(host: str, api_key: str | None) -> None:
    """UsageError for a key that is none, and for a server that strangers reach without one."""
    if api_key is not None and not (len(api_key) >= MIN_KEY_LENGTH and api_key.isascii() and api_key.isprintable()):
        raise UsageError(
            f"--api-key: give at least {MIN_KEY_LENGTH} printable characters, such as openssl rand -hex 16"
        )
    if api_key is None and not is_loopback(host):
        raise UsageError(f"--host {host}: is reached from other machines; give --api-key, or leave it at 127.0.0.1")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)
