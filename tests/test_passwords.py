"""The block list of passwords: those of Django's common ones that would be accepted.

`make common-passwords` runs this file to write the list anew.
"""

from django.contrib.auth.password_validation import CommonPasswordValidator
from servers.process import TOP


def common_passwords():
    """The list, sorted.

    Only ASCII, since the few others are garbled, and 8 characters or more.
    """
    return sorted(password for password in CommonPasswordValidator().passwords
                  if password.isascii() and len(password) >= 8)


def test_it_has_the_common_passwords_of_django():
    listed = (TOP / "common-passwords.txt").read_text().splitlines()

    assert listed == common_passwords()


def test_its_licence_says_whose_list_of_common_passwords_it_is():
    licence = (TOP / "LICENSE").read_text()

    assert "common-passwords.txt is taken from Django" in licence
    assert "(BSD-3-Clause)" in licence
    assert "Copyright (c) Django Software Foundation" in licence


if __name__ == "__main__":
    print(*common_passwords(), sep="\n")
