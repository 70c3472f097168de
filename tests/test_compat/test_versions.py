import pytest

from mmela.compat.versions import check_versions


def test_check_versions_names_what_does_not_fit():
    check_versions()
    with pytest.raises(
        ImportError,
        match=r'mmengine >= 9.0.0, < 10.0.0, but '
        r'mmengine 0\.\d+\.\d+ is installed',
    ):
        check_versions({'mmengine': ('9.0.0', '10.0.0')})


def test_check_versions_of_what_is_missing():
    check_versions({'no_such_package': ('1.0', '2.0')})
    import mmela.compat.versions as compat

    required = compat._REQUIRED
    compat._REQUIRED = {'no_such_package': 'pip install it'}
    try:
        with pytest.raises(
            ImportError, match='no_such_package.*install it with: pip install it'
        ):
            check_versions({'no_such_package': ('1.0', '2.0')})
    finally:
        compat._REQUIRED = required
