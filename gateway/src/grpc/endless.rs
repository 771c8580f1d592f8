//! Streams that do not end by themselves end with the gateway: see [`oc_mesh::endless`]. Their callers resume them through
//! another.

use http::Response;
use oc_mesh::{
    endless,
    error::{Reason, status},
};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

use crate::surface::Rpc;

/// Whether the answers of an RPC do not end by themselves.
#[must_use]
pub fn is_endless(rpc: &Rpc) -> bool {
    endless::is_endless(rpc.path.as_str())
}

/// The same answer, that ends with `HOST_UNAVAILABLE` at the latest when `stop` is cancelled.
#[must_use]
pub fn until(response: Response<Body>, stop: CancellationToken) -> Response<Body> {
    endless::until(response, stop, status(Reason::HostUnavailable, "the gateway is stopping, try again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::surface::Surface;

    #[test]
    fn every_endless_rpc_is_public() {
        let surface = Surface::load().unwrap();
        let found: Vec<_> = surface.rpcs().filter(|rpc| is_endless(rpc)).collect();
        assert_eq!(found.len(), endless::ENDLESS.len());
    }
}
