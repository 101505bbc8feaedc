"""What every request passes before the application sees it: connection, key and origin, size and time.

`protocol` bounds what a connection may send before there is a request, `auth` asks for a key on every path, `limits`
bounds bodies. `keys` says which keys there are, and `replies` sends what is refused.
"""
