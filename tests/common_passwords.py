"""Prints the block list of passwords: those of Django's common ones that the program
would accept. `make common-passwords` runs this."""

from django.contrib.auth.password_validation import CommonPasswordValidator

# Only ASCII, since the few others are garbled, and 8 characters or more.
print(*sorted(password for password in CommonPasswordValidator().passwords
              if password.isascii() and len(password) >= 8), sep="\n")
