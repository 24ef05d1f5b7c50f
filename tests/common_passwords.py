"""The block list: those of Django's common passwords that service.py would accept.

    python tests/common_passwords.py > common-passwords.txt

Only ASCII, since the few others are garbled, and 8 characters or more.
"""

from django.contrib.auth.password_validation import CommonPasswordValidator


def common_passwords():
    """The list, sorted."""
    return sorted(password for password in CommonPasswordValidator().passwords
                  if password.isascii() and len(password) >= 8)


if __name__ == "__main__":
    print(*common_passwords(), sep="\n")
