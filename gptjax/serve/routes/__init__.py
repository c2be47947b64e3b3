"""The routes: each a function of the service, an HTTP request and the identity of its client."""
