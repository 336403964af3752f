//! The registry client: references, authentication, transport with retries, manifests, blobs, catalog and tags.

pub mod reference;
