//! Both HTTP contracts (manager and agent): paths, bodies, error codes, typed client, TLS.
