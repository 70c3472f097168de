"""Put operators into the folder of an mmcv that has none, or take them out.

From torch 2.5 on nothing needs this where mmela is installed. It is for an older
torch, and for programs there that import mmcv.ops before mmela, such as
MMDetection's own test.py.

Example:
  mmela operators write
"""

from mmela_light.arguments import tool_parser


def main() -> None:
    parser = tool_parser('operators', __doc__)
    parser.add_argument(
        'action', choices=('write', 'remove'), help='write or remove mmcv/_ext.py'
    )
    action = parser.parse_args().action
    from ..compat.operators import remove_operators, write_operators

    try:
        path = write_operators() if action == 'write' else remove_operators()
    except (ImportError, OSError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{"wrote" if action == "write" else "removed"} {path}')
