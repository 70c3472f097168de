"""Write operators into the folder of an mmcv without them, or remove them.

With torch 2.5 or newer you do not need this. With an older torch, use it for
programs that import mmcv.ops before mmela, such as MMDetection's test.py.

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
